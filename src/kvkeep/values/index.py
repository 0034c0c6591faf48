"""The index: names and what they stand for now. Small entries that change, each with a life, beside immutable bytes.

- An entry is replaced as a whole and at once: of two writers one wins, and nobody sees parts of both.
- An entry whose life is over is missing, on the tick of the medium's own clock.
- An entry may belong to a *group*: those whose values are equal. Who removes the last of a group is told, so that its
  bytes can go. On a medium that evicts by itself a group may be incomplete: whoever asks checks its members.
- Any entry may vanish. A broken medium raises :class:`~kvkeep.errors.StoreError`. Where it is only one of its nodes,
  what lies there is missing, and a change of it raises :class:`~kvkeep.errors.NodeError`. Every method may be called
  from any thread.

:class:`MemoryIndex` is one process's; the others stand in files of their own.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

NAME_NBYTES = 32
PROBE = bytes(NAME_NBYTES)
"""The name of an entry that says nothing."""

OVERHEAD_NBYTES = 400
"""What a process pays for an entry beside its body."""


class Item(NamedTuple):
    """An entry to set. ``life`` in seconds, for ever if None; ``nbytes`` of the value it stands for."""

    name: bytes
    body: bytes
    life: float | None = None
    group: bytes | None = None
    nbytes: int = 0


class Found(NamedTuple):
    """An entry that was there. ``left``: seconds it still lives, if it does not live for ever."""

    body: bytes
    left: float | None


class Usage(NamedTuple):
    """``names`` of entries with a group, and their ``nbytes``; how many groups, and the bytes of one value each."""

    names: int
    nbytes: int
    values: int
    stored_nbytes: int


class Index(ABC):
    """The contract is the module's text. Names and groups have :data:`NAME_NBYTES` bytes."""

    @abstractmethod
    def get_many(self, names: Sequence[bytes]) -> list[Found | None]: ...

    @abstractmethod
    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        """Set, or replace; the groups that are empty now. Raises once all is set that can be."""

    @abstractmethod
    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        """Was it there, and the groups that are empty now."""

    @abstractmethod
    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        """Set it unless it is there; was it set?"""

    @abstractmethod
    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        """Give it ``life`` seconds more if its body is still this one; was it?"""

    @abstractmethod
    def release(self, name: bytes, body: bytes) -> bool:
        """Delete it if its body is still this one; was it?"""

    @abstractmethod
    def members(self, group: bytes) -> list[bytes]:
        """Names of the entries that are, or were, in ``group``."""

    @abstractmethod
    def names(self) -> list[bytes]:
        """Those that stand, as far as the medium can list them."""

    @abstractmethod
    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        """Put ``new`` in place of the body ``old``; life and group stay. Was it still the body?"""

    def tidy(self) -> None:  # noqa: B027
        """Leave nothing on the medium of what was deleted or replaced."""

    def contains_any(self, names: Sequence[bytes]) -> bool:
        return any(found is not None for found in self.get_many(names))

    def usage(self) -> Usage | None:
        """None where counting would cost too much."""
        return None

    def maintain(self) -> list[bytes]:
        """About once a second: drop what has run out; the groups that are empty now."""
        return []

    def ping(self) -> None:  # noqa: B027
        """Raises ``StoreError`` unless the medium answers."""

    def ping_writes(self) -> None:
        """Raises ``StoreError`` unless it can be written to."""
        self.add(PROBE, b"", 1.0)

    def after_fork(self) -> None:  # noqa: B027
        """In a forked child."""

    def close(self) -> None:  # noqa: B027
        """Give back files and connections."""


def write_seconds(lookup_timeout: float, save_timeout: float) -> float:
    """What a write to an index on a server may take: it is small, and its caller waits for it."""
    return min(4 * lookup_timeout, save_timeout)


def boot_clock() -> float:
    """Seconds that no setting of the clock changes and that count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Entry:
    __slots__ = ("body", "group", "nbytes", "until")

    def __init__(self, body: bytes, until: float | None, group: bytes | None, nbytes: int) -> None:
        self.body, self.until, self.group, self.nbytes = body, until, group, nbytes

    @property
    def cost(self) -> int:
        return len(self.body) + OVERHEAD_NBYTES


class MemoryIndex(Index):
    """One process's. At most ``capacity`` bytes: what was not asked for longest goes first."""

    def __init__(self, capacity: int = 64 << 20, *, clock: Callable[[], float] = boot_clock) -> None:
        self._capacity = capacity
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._groups: dict[bytes, set[bytes]] = {}
        self._used = 0

    def get_many(self, names: Sequence[bytes]) -> list[Found | None]:
        with self._lock:
            now = self._clock()
            return [self._get(name, now) for name in names]

    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        with self._lock:
            now = self._clock()
            left: set[bytes] = set()
            for name, body, life, group, nbytes in items:
                left |= self._drop(name)
                entry = _Entry(body, None if life is None else now + life, group, nbytes)
                self._entries[name] = entry
                self._used += entry.cost
                if group is not None:
                    self._groups.setdefault(group, set()).add(name)
            while self._used > self._capacity and self._entries:
                left |= self._drop(next(iter(self._entries)))
            return self._empty(left)

    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        with self._lock:
            there = self._get(name, self._clock()) is not None
            return there, self._empty(self._drop(name))

    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        with self._lock:
            now = self._clock()
            if self._get(name, now) is not None:
                return False
            self._drop(name)
            entry = self._entries[name] = _Entry(body, None if life is None else now + life, None, 0)
            self._used += entry.cost
            return True

    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        with self._lock:
            now = self._clock()
            found = self._get(name, now)
            if found is None or found.body != body:
                return False
            self._entries[name].until = now + life
            return True

    def release(self, name: bytes, body: bytes) -> bool:
        with self._lock:
            found = self._get(name, self._clock())
            if found is None or found.body != body:
                return False
            self._drop(name)
            return True

    def members(self, group: bytes) -> list[bytes]:
        with self._lock:
            return list(self._groups.get(group, ()))

    def names(self) -> list[bytes]:
        with self._lock:
            return list(self._entries)

    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        with self._lock:
            found = self._get(name, self._clock())
            if found is None or found.body != old:
                return False
            entry = self._entries[name]
            self._used += len(new) - len(old)
            entry.body = new
            return True

    def usage(self) -> Usage:
        with self._lock:
            sizes = {entry.group: entry.nbytes for entry in self._entries.values() if entry.group is not None}
            all_nbytes = [entry.nbytes for entry in self._entries.values() if entry.group is not None]
            return Usage(len(all_nbytes), sum(all_nbytes), len(sizes), sum(sizes.values()))

    def maintain(self) -> list[bytes]:
        with self._lock:
            now = self._clock()
            over = [name for name, entry in self._entries.items() if entry.until is not None and entry.until <= now]
            left: set[bytes] = set()
            for name in over:
                left |= self._drop(name)
            return self._empty(left)

    def after_fork(self) -> None:
        self._start()

    def _get(self, name: bytes, now: float) -> Found | None:
        entry = self._entries.get(name)
        if entry is None or (entry.until is not None and entry.until <= now):
            return None
        self._entries.move_to_end(name)
        return Found(entry.body, None if entry.until is None else entry.until - now)

    def _drop(self, name: bytes) -> set[bytes]:
        """Forget ``name``; the groups that lost a member."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return set()
        self._used -= entry.cost
        if entry.group is None:
            return set()
        self._groups[entry.group].discard(name)
        return {entry.group}

    def _empty(self, groups: set[bytes]) -> list[bytes]:
        empty = [group for group in groups if not self._groups.get(group)]
        for group in empty:
            self._groups.pop(group, None)
        return empty
