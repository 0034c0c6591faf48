"""LFU: evict what was used least often; of equals, what was used longest ago.

K. Shah, A. Mitra, D. Matani, "An O(1) algorithm for implementing the LFU cache eviction scheme", 2010: the blocks of
one count form a row, and the rows a list in order of their counts. Counts do not age and end with the block.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class _Row:
    """Blocks used ``count`` times, by last use. The list of rows is a ring through a sentinel of count 0."""

    __slots__ = ("count", "keys", "next", "prev")

    def __init__(self, count: int) -> None:
        self.count = count
        self.keys: OrderedDict[BlockKey, None] = OrderedDict()
        self.prev = self.next = self


class LFU(EvictionPolicy):
    """A touch moves a block to the row of the next count; victims come from the lowest row that has an allowed one."""

    name: ClassVar[str] = "lfu"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ring = _Row(0)
        self._row: dict[BlockKey, _Row] = {}

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._place(key, self._ring)

    def touch(self, key: BlockKey, access: Access) -> None:
        row = self._row[key]
        self._place(key, row)
        self._take(key, row)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        row = self._row.pop(key, None)
        if row is not None:
            self._take(key, row)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        row = self._ring.next
        while row is not self._ring:
            for key in row.keys:
                if allowed(key):
                    return key
            row = row.next
        return None

    def __len__(self) -> int:
        return len(self._row)

    def _place(self, key: BlockKey, below: _Row) -> None:
        """Put ``key`` into the row one count above ``below``."""
        row = below.next
        if row.count != below.count + 1:
            row = _Row(below.count + 1)
            row.prev, row.next = below, below.next
            row.prev.next = row.next.prev = row
        row.keys[key] = None
        self._row[key] = row

    def _take(self, key: BlockKey, row: _Row) -> None:
        del row.keys[key]
        if not row.keys:
            row.prev.next, row.next.prev = row.next, row.prev
