"""FIFO: evict what came first. (The baseline of Belady, "A study of replacement algorithms", 1966.)"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class FIFO(EvictionPolicy):
    """A touch changes nothing. A block that is not allowed is passed over and keeps its place."""

    name: ClassVar[str] = "fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        # Not a dict: finding its first key takes longer the more have been deleted before it.
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._order[key] = None

    def touch(self, key: BlockKey, access: Access) -> None:
        pass

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._order.pop(key, None)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in self._order if allowed(key)), None)

    def __len__(self) -> int:
        return len(self._order)
