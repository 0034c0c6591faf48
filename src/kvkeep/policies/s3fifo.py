"""S3-FIFO: a small FIFO filters what is used once; what is used more moves on to a large one.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023. A tenth
of the capacity is the small queue's; as many names as fill the main queue are remembered, and who is among them enters
the main queue at once.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue

MAX_COUNT = 3
MOVE_COUNT = 2
"""Uses in the small queue that are enough for the main one."""


class S3FIFO(EvictionPolicy):
    """A block that is not allowed is passed as if it had been used, but keeps its count."""

    name: ClassVar[str] = "s3fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small, self._main, self._gone = Queue(), Queue(), Queue()
        self._small_room = capacity // 10
        self._counts: dict[BlockKey, int] = {}
        self._named: BlockKey | None = None  # the last answer: holds until it is used or gone
        self._filling = True

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        known = self._gone.pop(key) is not None
        early = self._filling and self._small.nbytes + nbytes > self._small_room
        (self._main if known or early else self._small).push(key, nbytes)
        self._counts[key] = 0

    def touch(self, key: BlockKey, access: Access) -> None:
        self._counts[key] = min(self._counts[key] + 1, MAX_COUNT)
        if key == self._named:
            self._named = None

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if self._counts.pop(key, None) is None:
            return
        if key == self._named:
            self._named = None
        nbytes = self._small.pop(key)
        if nbytes is None:
            self._main.pop(key)
        elif evicted:
            self._gone.push(key, nbytes)
            self._gone.trim(self.capacity - self._small_room)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        self._filling = False
        if self._named is not None and allowed(self._named):
            return self._named
        main_first = self._main.nbytes > self.capacity - self._small_room
        search = (self._from_main, self._from_small) if main_first else (self._from_small, self._from_main)
        self._named = search[0](allowed) or search[1](allowed)
        return self._named

    def _from_small(self, allowed: Allowed) -> BlockKey | None:
        for _ in range(len(self._small)):
            key = self._small.first(_any)
            assert key is not None
            if self._counts[key] < MOVE_COUNT and allowed(key):
                return key
            nbytes = self._small.pop(key) or 0
            if self._counts[key] < MOVE_COUNT:
                self._small.push(key, nbytes)
            else:
                self._counts[key] = 0
                self._main.push(key, nbytes)
        return None

    def _from_main(self, allowed: Allowed) -> BlockKey | None:
        for _ in range((MAX_COUNT + 1) * len(self._main)):
            key = self._main.first(_any)
            assert key is not None
            free = allowed(key)
            if free and not self._counts[key]:
                return key
            if free:
                self._counts[key] -= 1
            self._main.renew(key)
        return None

    def __len__(self) -> int:
        return len(self._counts)


def _any(_: BlockKey) -> bool:
    return True
