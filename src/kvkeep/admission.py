"""Write rules: which blocks are worth writing to a slower tier, where a write costs time, wear or a network.

Keys, sizes and accesses only, no clock and no randomness, as policies; the same objects serve production and replays.
Not thread-safe: the owner calls them under a lock. What they remember is bounded.

The owner calls :meth:`WriteRule.seen` once for each block of each request, found or new, from the front to the back,
then :meth:`WriteRule.wants` for those that the slower tier does not have: new ones, and ones that lie in a faster tier
(or a block that proves its worth in memory would never reach the disk). A block that is not wanted is passed over;
those behind it are asked about on their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import ClassVar, Generic, TypeVar

from kvkeep.errors import ConfigError, nearest
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access

Value = TypeVar("Value")

MEMORY_BLOCKS = 1 << 18
"""Blocks that a rule remembers, twice."""


class WriteRule(ABC):
    """Says which blocks a tier should be given."""

    name: ClassVar[str]

    @abstractmethod
    def seen(self, key: BlockKey, access: Access) -> None:
        """A request has this block."""

    @abstractmethod
    def wants(self, key: BlockKey, access: Access) -> bool:
        """Should it be written now? Changes nothing."""


class All(WriteRule):
    """Every block."""

    name: ClassVar[str] = "all"

    def seen(self, key: BlockKey, access: Access) -> None:
        pass

    def wants(self, key: BlockKey, access: Access) -> bool:
        return True


class SeenTwice(WriteRule):
    """A block that a second request has, within the last ``memory_blocks`` different blocks at least."""

    name: ClassVar[str] = "seen-twice"

    def __init__(self, *, memory_blocks: int = MEMORY_BLOCKS) -> None:
        self._counts: _Recent[int] = _Recent(memory_blocks)

    def seen(self, key: BlockKey, access: Access) -> None:
        self._counts.put(key, min(2, 1 + (self._counts.get(key) or 0)))

    def wants(self, key: BlockKey, access: Access) -> bool:
        return (self._counts.get(key) or 0) >= 2


class Predicted(WriteRule):
    """A block that will be used again within ``horizon`` seconds with a probability of ``threshold`` or more.

    The probability is learned, on a quarter of the keys, for each class of block: how often it was used, how often
    the deepest found block of its request was, how far it is from the prompt's end, how long the prompt is. Classes
    with few observations lean on their use count, and that on all blocks. Until ``horizon`` has passed once, nothing
    is known and everything is written.
    """

    name: ClassVar[str] = "predicted"

    def __init__(self, *, horizon: float = 600.0, threshold: float = 0.3, memory_blocks: int = MEMORY_BLOCKS) -> None:
        self._horizon = horizon
        self._threshold = threshold
        self._blocks: _Recent[_Block] = _Recent(memory_blocks)
        self._pending: deque[_Use] = deque()  # uses whose outcome is not known yet, oldest first
        self._most_pending = memory_blocks
        self._tables: dict[_Class, _Tally] = {}

    def seen(self, key: BlockKey, access: Access) -> None:
        self._settle(access.now - self._horizon)
        before = self._blocks.get(key)
        if before is not None and before.use is not None:
            before.use.again = True
        count = 1 if before is None else before.count + 1
        block = _Block(count, self._found_count(count, access))
        if key[0] & 3 == 0 and len(self._pending) < self._most_pending:
            block.use = _Use(access.now, _class_of(block, access))
            self._pending.append(block.use)
        self._blocks.put(key, block)

    def wants(self, key: BlockKey, access: Access) -> bool:
        block = self._blocks.get(key)
        return block is None or self._probability(_class_of(block, access)) >= self._threshold

    def _found_count(self, count: int, access: Access) -> int:
        """How often the deepest found block of this request was used: handed down from parent to child."""
        if access.position < access.hit_blocks:
            return count
        parent = self._blocks.get(access.parent) if access.parent is not None and access.hit_blocks else None
        return 0 if parent is None else parent.found_count

    def _settle(self, until: float) -> None:
        while self._pending and self._pending[0].now <= until:
            use = self._pending.popleft()
            for group in (use.group, use.group[:1], ()):
                self._tables.setdefault(group, _Tally()).add(use.again)

    def _probability(self, group: _Class) -> float:
        estimate = 1.0
        for part in ((), group[:1], group):
            tally = self._tables.get(part)
            if tally is not None:
                estimate = (tally.again + PRIOR_USES * estimate) / (tally.uses + PRIOR_USES)
        return estimate


_Class = tuple[int, ...]
PRIOR_USES = 20.0
"""How many observations the estimate of the wider class is worth."""
FADE_USES = 4096.0
"""Observations after which a class forgets half of what it knows."""


class _Use:
    """One use of a sampled block; ``again``: another one came within the horizon."""

    __slots__ = ("again", "group", "now")

    def __init__(self, now: float, group: _Class) -> None:
        self.now, self.group, self.again = now, group, False


class _Block:
    __slots__ = ("count", "found_count", "use")

    def __init__(self, count: int, found_count: int) -> None:
        self.count, self.found_count = count, found_count
        self.use: _Use | None = None


class _Tally:
    __slots__ = ("again", "uses")

    def __init__(self) -> None:
        self.again = self.uses = 0.0

    def add(self, again: bool) -> None:
        self.uses += 1
        self.again += again
        if self.uses >= FADE_USES:
            self.uses /= 2
            self.again /= 2


def _class_of(block: _Block, access: Access) -> _Class:
    behind = access.prompt_blocks - 1 - access.position
    return (
        min(7, (block.count - 1).bit_length()),
        0 if not block.found_count else 1 if block.found_count == 1 else 2 if block.found_count <= 4 else 3,
        0 if behind <= 0 else 1 if behind <= 3 else 2,
        0 if access.prompt_blocks < 8 else 1 if access.prompt_blocks < 40 else 2,
    )


class _Recent(Generic[Value]):
    """A dict of the last ``size`` to ``2 * size`` keys that were put."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[BlockKey, Value] = {}
        self._old: dict[BlockKey, Value] = {}

    def get(self, key: BlockKey) -> Value | None:
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def put(self, key: BlockKey, value: Value) -> None:
        self._young[key] = value
        if len(self._young) >= self._size:
            self._young, self._old = {}, self._young


RULES: dict[str, type[WriteRule]] = {rule.name: rule for rule in (All, Predicted, SeenTwice)}


def write_rule(name: str) -> WriteRule:
    """A new rule by its name. Raises :class:`ConfigError` with the nearest name if there is none."""
    rule = RULES.get(name)
    if rule is None:
        raise ConfigError(f"no write rule is called {name!r}; {nearest(name, list(RULES))}")
    return rule()
