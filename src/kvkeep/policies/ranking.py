"""A part of several policies: keys by rank, the lowest first, in O(log n) a change.

A heap whose outdated entries are skipped, and thrown out when they are the majority. Of equal ranks the one that was
set first comes first.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Allowed

Rank = float
_Entry = tuple[Rank, int, BlockKey]


class Ranking:
    """Behaves as a dict of ranks that also knows its lowest allowed key."""

    def __init__(self) -> None:
        self._valid: dict[BlockKey, _Entry] = {}
        self._heap: list[_Entry] = []
        self._number = 0

    def __setitem__(self, key: BlockKey, rank: Rank) -> None:
        self._number += 1
        entry = self._valid[key] = (rank, self._number, key)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._valid) + 16:
            self._heap = list(self._valid.values())
            heapify(self._heap)

    def __getitem__(self, key: BlockKey) -> Rank:
        return self._valid[key][0]

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._valid

    def __len__(self) -> int:
        return len(self._valid)

    def discard(self, key: BlockKey) -> None:
        self._valid.pop(key, None)

    def first(self, allowed: Allowed) -> BlockKey | None:
        """The key of lowest rank among those allowed."""
        passed: list[_Entry] = []
        found = None
        while self._heap:
            entry = self._heap[0]
            key = entry[2]
            if self._valid.get(key) is not entry:
                heappop(self._heap)
            elif allowed(key):
                found = key
                break
            else:
                passed.append(heappop(self._heap))
        for entry in passed:
            heappush(self._heap, entry)
        return found
