"""W-TinyLFU: a new block must be asked for more often, lately, than the one that it would displace.

G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM TOS 13(4), 2017. An LRU
window of a hundredth of the capacity, before a segmented LRU whose protected part has four fifths of the rest. Counts
are halved after ten uses a resident block. They are exact, where the paper has a sketch: a name is small next to a
block of keys and values, and the decision does not hang on collisions.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
SAMPLE = 10
"""Uses a resident block between two halvings."""
MAX_COUNT = 15


class WTinyLFU(EvictionPolicy):
    """A block that is not allowed is passed over and keeps its place."""

    name: ClassVar[str] = "wtinylfu"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._window, self._probation, self._protected = Queue(), Queue(), Queue()
        self._window_room = max(int(capacity * WINDOW_SHARE), 1)
        self._protected_room = int((capacity - self._window_room) * PROTECTED_SHARE)
        self._counts: dict[BlockKey, int] = {}
        self._sampled = 0

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._count(key)
        self._window.push(key, nbytes)
        self._spill()

    def touch(self, key: BlockKey, access: Access) -> None:
        self._count(key)
        if key in self._window:
            self._window.renew(key)
        elif key in self._protected:
            self._protected.renew(key)
        else:
            self._protected.push(key, self._probation.pop(key) or 0)
            while self._protected.nbytes > self._protected_room:
                self._move(self._protected, self._probation)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        for queue in (self._window, self._probation, self._protected):
            queue.pop(key)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        kept = self._probation.first(allowed)
        if kept is None:
            kept = self._protected.first(allowed)
        coming = self._window.first(allowed)
        if coming is None or kept is None:
            return kept if coming is None else coming
        return kept if self._counts.get(coming, 0) > self._counts.get(kept, 0) else coming

    def __len__(self) -> int:
        return len(self._window) + len(self._probation) + len(self._protected)

    def _count(self, key: BlockKey) -> None:
        self._counts[key] = min(self._counts.get(key, 0) + 1, MAX_COUNT)
        self._sampled += 1
        if self._sampled > SAMPLE * max(len(self), 1):
            self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}
            self._sampled //= 2

    def _spill(self) -> None:
        """What the window has no room for goes to the main part: it won against a victim, or there was room."""
        while self._window.nbytes > self._window_room:
            self._move(self._window, self._probation)

    @staticmethod
    def _move(source: Queue, target: Queue) -> None:
        key = source.first(lambda _: True)
        assert key is not None
        target.push(key, source.pop(key) or 0)
