"""LRU: evict what was used longest ago. (Belady 1966 names it; folklore before.)"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class LRU(EvictionPolicy):
    """A touch moves a block to the young end; victims come from the old end."""

    name: ClassVar[str] = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._order[key] = None

    def touch(self, key: BlockKey, access: Access) -> None:
        self._order.move_to_end(key)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._order.pop(key, None)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in self._order if allowed(key)), None)

    def __len__(self) -> int:
        return len(self._order)
