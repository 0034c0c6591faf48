"""CLOCK: FIFO in which a block that was used gets one more round.

F. J. Corbató, "A paging experiment with the Multics system", 1969. The ring is a row whose oldest end is the hand: to
pass a block is to move it to the young end.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class CLOCK(EvictionPolicy):
    """Values say whether a block was used. A block that is not allowed is passed and stays marked."""

    name: ClassVar[str] = "clock"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used: OrderedDict[BlockKey, bool] = OrderedDict()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._used[key] = False

    def touch(self, key: BlockKey, access: Access) -> None:
        self._used[key] = True

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._used.pop(key, None)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        # One round clears marks, a second finds what the first cleared; if both fail, all is as it was.
        for _ in range(2 * len(self._used)):
            key, used = next(iter(self._used.items()))
            free = allowed(key)
            if free and not used:
                return key
            self._used[key] = used and not free
            self._used.move_to_end(key)
        return None

    def __len__(self) -> int:
        return len(self._used)
