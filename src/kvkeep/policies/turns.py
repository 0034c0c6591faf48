"""A part of the hazard policy: the turns of conversations, remembered, sorted into classes and learned from.

A turn is one request, or one use of a beginning that several conversations share. It extends an earlier one, or begins.
The policy finds out which, and tells it here; what has been seen of each class goes to a
:class:`~kvkeep.policies.survival.Survival`, of which requests and beginnings have one each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from kvkeep.keys import BlockKey
from kvkeep.policies.survival import BINS, EDGES, Survival, bin_of

TURNS = 1, 2, 3, 5, 9, 17
"""Limits of the classes by how many turns a conversation has had …"""
NEW_BLOCKS = 1, 3, 8
"""… how many blocks this one adds …"""
LENGTHS = 2, 8, 40
"""… and at the first turn by its length in blocks, later by how long the last turns took, in seconds."""
GAPS = 8.0, 25.0, 70.0, 200.0
USUAL_GAPS = 3.0, 14.0, 42.0, 130.0, 350.0
"""What stands for each class of those: the next turn often takes about as long."""
FEATURES = len(TURNS) + 1, len(NEW_BLOCKS) + 1, len(LENGTHS) + 1 + len(GAPS) + 1
SHARED_FEATURES = len(TURNS) + 1, 1 + len(GAPS) + 1
"""Of a beginning: how many uses it has had, and nothing, or how long the last ones took."""
MAX_TURNS = 1 << 16
"""Turns that are remembered, whether any of their blocks is still resident or not."""
MAX_WAITING = 256
"""Requests with one beginning that may be computed at the same time."""


class Turn:
    """One request, or one use of a shared beginning. ``gap``: a mean of what the last two turns took, ``last_gap`` the
    last; -1 at the first. ``kind``: its class in ``table``; ``heap``: the number of that among all classes."""

    __slots__ = (
        "asked", "blocks", "done", "found", "gap", "ghost", "heap", "hits", "kind", "last_gap", "now", "number",
        "shared", "table", "turns", "uses",
    )  # fmt: skip

    def __init__(self, number: int, now: float, blocks: int, hits: int, table: Survival) -> None:
        self.number = number
        self.now = now
        self.blocks = blocks
        self.hits = hits
        self.table = table
        self.turns = 0
        self.gap = self.last_gap = -1.0
        self.kind = self.heap = 0
        self.asked = False  # has it come to storing what was missing?
        self.done = False  # was it extended?
        self.ghost: BlockKey | None = None  # the first of its blocks that is not resident
        self.found: Turn | None = None  # whose the deepest of the found blocks was
        self.shared: Turn | None = None  # of a request: the beginning that it has in common with others …
        self.uses: Uses | None = None  # … and of that all uses

    def worth(self, now: float) -> float:
        """The index of its blocks at ``now``; of those that nearly all reuses would have come for by then, -1."""
        age = now - self.now
        return -1.0 if age > self.table.guard else self.table.index[self.kind][bin_of(age)]

    def waits(self, now: float) -> bool:
        """Is it younger than turns usually are when they are extended?"""
        return now - self.now < self.table.usual


class Uses:
    """Those of one shared beginning: the last one, whose request that was, and requests that have not come to storing
    what they miss."""

    __slots__ = ("last", "user", "waiting")

    def __init__(self, last: Turn, user: Turn) -> None:
        self.last, self.user = last, user
        self.waiting: deque[Turn] = deque(maxlen=MAX_WAITING)


class Turns:
    """The last :data:`MAX_TURNS` turns, by number, and what was learned from them and from those before."""

    def __init__(self) -> None:
        self.requests = Survival(*FEATURES, usual_times=USUAL_GAPS)
        self.beginnings = Survival(*SHARED_FEATURES, usual_times=USUAL_GAPS)
        self._ghosts: dict[BlockKey, Turn] = {}
        self._turns: list[Turn] = []
        self._forgotten = 0  # turns that are no longer in that list
        self._aged = [0] * BINS  # for each age bin the number of the first turn that has not passed it

    def begin(self, now: float, blocks: int, hits: int) -> Turn:
        """A request for ``blocks``, of which ``hits`` were found; not known to extend any."""
        turn = self._append(now, blocks, hits, self.requests)
        self.classify(turn, blocks)
        return turn

    def share(self, turn: Turn, before: Turn, blocks: int) -> None:
        """The first ``blocks`` of ``turn`` are others' as well, of whom ``before`` is one."""
        shared = turn.shared = self._append(turn.now, blocks, blocks, self.beginnings)
        if before.uses is None:
            shared.uses = Uses(shared, turn)
        else:
            shared.uses = before.uses
            self.follow(shared, before.uses.last)
            before.uses.last, before.uses.user = shared, turn
        self.classify(shared, 0)

    def follow(self, turn: Turn, earlier: Turn) -> None:
        """Learn that ``earlier`` is used again now, by ``turn``."""
        gap = max(0.0, turn.now - earlier.now)
        if not earlier.done:
            earlier.done = True
            if earlier.number >= self._forgotten:
                weight = earlier.blocks**0.5
                for at in range(bin_of(gap)):
                    if earlier.number >= self._aged[at]:  # not told of yet
                        earlier.table.wait(earlier.kind, at, weight)
                earlier.table.reuse(earlier.kind, gap, weight)
        turn.turns = earlier.turns + 1
        turn.last_gap = gap
        turn.gap = gap if earlier.last_gap < 0 else ((gap + 0.5) * (earlier.last_gap + 0.5)) ** 0.5

    def classify(self, turn: Turn, new_blocks: int) -> None:
        """Sort ``turn`` in, which adds ``new_blocks`` to what it extends."""
        turns, of_gap = bisect_right(TURNS, turn.turns), bisect_right(GAPS, turn.gap)
        if turn.table is self.beginnings:
            turn.kind = turns * SHARED_FEATURES[-1] + (0 if turn.gap < 0 else 1 + of_gap)
            turn.heap = -1 - turn.kind
        else:
            last = bisect_right(LENGTHS, turn.blocks) if turn.gap < 0 else len(LENGTHS) + 1 + of_gap
            _, of_new, of_last = FEATURES
            turn.kind = turn.heap = (turns * of_new + bisect_right(NEW_BLOCKS, new_blocks)) * of_last + last

    def haunt(self, turn: Turn, key: BlockKey) -> None:
        """Remember the first block of ``turn`` that is not resident: whoever extends it will ask for that one."""
        if turn.number < self._forgotten:
            return
        if turn.ghost is not None:
            self._ghosts.pop(turn.ghost, None)
        self.forget(key)
        turn.ghost = key
        self._ghosts[key] = turn

    def ghost(self, key: BlockKey) -> Turn | None:
        """The turn whose first missing block is ``key``."""
        return self._ghosts.get(key)

    def forget(self, key: BlockKey) -> None:
        """``key`` is resident again, or another turn's."""
        turn = self._ghosts.pop(key, None)
        if turn is not None:
            turn.ghost = None

    def age(self, now: float) -> None:
        """Tell of the time that turns have waited; forget the oldest."""
        end = self._forgotten + len(self._turns)
        for at in range(BINS - 1):
            until = now - EDGES[at + 1]
            number = max(self._aged[at], self._forgotten)
            while number < end and self._turns[number - self._forgotten].now <= until:
                turn = self._turns[number - self._forgotten]
                if not turn.done:
                    turn.table.wait(turn.kind, at, turn.blocks**0.5)
                number += 1
            self._aged[at] = number
        if len(self._turns) > MAX_TURNS + MAX_TURNS // 4:
            for turn in self._turns[: MAX_TURNS // 4]:
                if turn.ghost is not None:
                    self._ghosts.pop(turn.ghost, None)
            del self._turns[: MAX_TURNS // 4]
            self._forgotten += MAX_TURNS // 4

    def refresh(self) -> None:
        """Compute what each class is worth from what was seen until now. That takes milliseconds."""
        self.requests.refresh()
        self.beginnings.refresh()

    def _append(self, now: float, blocks: int, hits: int, table: Survival) -> Turn:
        turn = Turn(self._forgotten + len(self._turns), now, blocks, hits, table)
        self._turns.append(turn)
        return turn
