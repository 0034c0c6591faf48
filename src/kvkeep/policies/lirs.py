"""LIRS: keep the blocks whose last two uses lie close together, whenever the last one was.

S. Jiang, X. Zhang, "LIRS: an efficient low inter-reference recency set replacement policy to improve buffer cache
performance", SIGMETRICS 2002. Nearly all room is for blocks of low inter-reference recency (LIR); the others (HIR)
pass through a hundredth of it, in order of arrival. The stack has, by last use, everything down to the oldest LIR
block; an HIR block that is used while it is in the stack, resident or not, becomes LIR, and the oldest LIR becomes HIR.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue

HIR_SHARE = 0.01
MAX_STACK = 2
"""Bytes that the blocks named in the stack may have, as a multiple of the capacity. (The paper sets no bound.)"""


class LIRS(EvictionPolicy):
    """``_low`` are the LIR blocks, ``_high`` the resident HIR ones, ``_gone`` those of the stack that are not here."""

    name: ClassVar[str] = "lirs"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._stack: OrderedDict[BlockKey, int] = OrderedDict()  # → bytes
        self._stack_nbytes = 0
        self._low, self._high, self._gone = Queue(), Queue(), Queue()
        self._low_room = capacity - max(int(capacity * HIR_SHARE), 1)

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        known = self._gone.pop(key) is not None
        self._raise(key, nbytes)
        if known or self._low.nbytes + nbytes <= self._low_room:
            self._low.push(key, nbytes)
            self._settle()
        else:
            self._high.push(key, nbytes)
        self._limit()

    def touch(self, key: BlockKey, access: Access) -> None:
        if key in self._low:
            self._stack.move_to_end(key)
        elif key in self._stack:
            self._stack.move_to_end(key)
            self._low.push(key, self._high.pop(key) or 0)
        else:
            nbytes = self._high.pop(key) or 0
            self._high.push(key, nbytes)
            self._raise(key, nbytes)
            self._limit()
        self._settle()

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        nbytes = self._high.pop(key)
        if nbytes is not None and evicted and key in self._stack:
            self._gone.push(key, nbytes)
        elif nbytes is not None or self._low.pop(key) is not None:
            self._drop(key)
            self._prune()

    def victim(self, allowed: Allowed) -> BlockKey | None:
        first = self._high.first(allowed)
        if first is None:
            first = next((key for key in self._stack if key in self._low and allowed(key)), None)
        return first

    def __len__(self) -> int:
        return len(self._low) + len(self._high)

    def _raise(self, key: BlockKey, nbytes: int) -> None:
        self._drop(key)
        self._stack[key] = nbytes
        self._stack_nbytes += nbytes

    def _drop(self, key: BlockKey) -> None:
        self._stack_nbytes -= self._stack.pop(key, 0)

    def _settle(self) -> None:
        """Give the LIR blocks no more than their room, and end the stack with one of them."""
        self._prune()
        while self._low.nbytes > self._low_room and len(self._low) > 1:
            oldest = next(iter(self._stack))
            self._high.push(oldest, self._low.pop(oldest) or 0)
            self._drop(oldest)
            self._prune()

    def _prune(self) -> None:
        while self._stack:
            oldest = next(iter(self._stack))
            if oldest in self._low:
                return
            self._gone.pop(oldest)
            self._drop(oldest)

    def _limit(self) -> None:
        while self._stack_nbytes > MAX_STACK * self.capacity and len(self._gone):
            oldest = self._gone.first(lambda _: True)
            assert oldest is not None
            self._gone.pop(oldest)
            self._drop(oldest)
