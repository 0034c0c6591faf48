"""SIEVE: a hand walks from the oldest block to the newest and evicts the first that was not used since it last passed.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU", NSDI 2024. Blocks stay in the
order of their arrival; what survives a pass is not moved. The order is kept in two halves, the blocks behind the hand
and those ahead of it, so that a removal anywhere and a step of the hand are O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class SIEVE(EvictionPolicy):
    """Oldest to newest is ``behind`` + ``ahead``; the hand points at the first of ``ahead``, which is empty only with
    no block at all. Values say whether a block was used. A block that is not allowed is passed and stays marked."""

    name: ClassVar[str] = "sieve"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._behind: OrderedDict[BlockKey, bool] = OrderedDict()
        self._ahead: OrderedDict[BlockKey, bool] = OrderedDict()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._ahead[key] = False

    def touch(self, key: BlockKey, access: Access) -> None:
        half = self._ahead if key in self._ahead else self._behind
        half[key] = True

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if self._behind.pop(key, None) is None:
            self._ahead.pop(key, None)
            self._wrap()

    def victim(self, allowed: Allowed) -> BlockKey | None:
        # One round clears marks, a second finds what the first cleared; if both fail, the hand is where it was.
        for _ in range(2 * len(self)):
            key, used = next(iter(self._ahead.items()))
            free = allowed(key)
            if free and not used:
                return key
            del self._ahead[key]
            self._behind[key] = used and not free
            self._wrap()
        return None

    def __len__(self) -> int:
        return len(self._behind) + len(self._ahead)

    def _wrap(self) -> None:
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead
