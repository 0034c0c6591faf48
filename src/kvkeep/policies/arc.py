"""ARC: recency and frequency share the room as their ghosts say they should.

N. Megiddo, D. S. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. T1 has blocks used once, T2
those used again, B1 and B2 the names of what was evicted from each; a miss that a ghost list knows moves the target
size of T1 towards that list.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue


class ARC(EvictionPolicy):
    """Learns when it is asked to admit a block, which is before the victim is chosen, as in the paper."""

    name: ClassVar[str] = "arc"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._once, self._again = Queue(), Queue()
        self._once_gone, self._again_gone = Queue(), Queue()
        self._target = 0.0  # bytes that T1 may have
        self._coming_again = False  # is the block that is to come one that B2 knows?

    def admit(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        once, again = self._once_gone, self._again_gone
        self._coming_again = key in again
        if key in once:
            self._target = min(self.capacity, self._target + nbytes * max(1.0, again.nbytes / once.nbytes))
        elif self._coming_again:
            self._target = max(0.0, self._target - nbytes * max(1.0, once.nbytes / again.nbytes))
        return True

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        known = self._once_gone.pop(key) is not None or self._again_gone.pop(key) is not None
        (self._again if known else self._once).push(key, nbytes)
        self._once_gone.trim(self.capacity - self._once.nbytes)
        resident = self._once.nbytes + self._again.nbytes
        self._again_gone.trim(2 * self.capacity - resident - self._once_gone.nbytes)

    def touch(self, key: BlockKey, access: Access) -> None:
        nbytes = self._once.pop(key)
        if nbytes is None:
            self._again.renew(key)
        else:
            self._again.push(key, nbytes)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        for queue, ghosts in ((self._once, self._once_gone), (self._again, self._again_gone)):
            nbytes = queue.pop(key)
            if nbytes is not None and evicted:
                ghosts.push(key, nbytes)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        over = self._once.nbytes - self._target
        order = (
            (self._once, self._again) if over > 0 or (over == 0 and self._coming_again) else (self._again, self._once)
        )
        first = order[0].first(allowed)
        return order[1].first(allowed) if first is None else first

    def __len__(self) -> int:
        return len(self._once) + len(self._again)
