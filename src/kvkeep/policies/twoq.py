"""2Q: new blocks wait in a FIFO; only those that are asked for again after it are kept by LRU.

T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management replacement algorithm", VLDB 1994, the
full version: A1in holds a quarter of the capacity, A1out the names of as many blocks as fill half of it.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue


class TwoQ(EvictionPolicy):
    """A use while in A1in changes nothing: it is likely to belong to the same burst."""

    name: ClassVar[str] = "2q"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._new, self._gone, self._kept = Queue(), Queue(), Queue()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        known = self._gone.pop(key) is not None
        (self._kept if known else self._new).push(key, nbytes)

    def touch(self, key: BlockKey, access: Access) -> None:
        if key in self._kept:
            self._kept.renew(key)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        nbytes = self._new.pop(key)
        if nbytes is None:
            self._kept.pop(key)
        elif evicted:
            self._gone.push(key, nbytes)
            self._gone.trim(self.capacity // 2)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        order = (self._new, self._kept) if self._new.nbytes > self.capacity // 4 else (self._kept, self._new)
        first = order[0].first(allowed)
        return order[1].first(allowed) if first is None else first

    def __len__(self) -> int:
        return len(self._new) + len(self._kept)
