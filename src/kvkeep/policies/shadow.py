"""A part of the hazard policy: what LRU would have found of the same requests.

Of what nobody has learned yet, and where time says nothing, the best guess is that what was used lately is used again.
So the keys that LRU would hold are kept, and once it is ahead by more than chance, it is followed for a while; then the
policy is tried again. Following the better of two experts at small cost: A. Blum and C. Burch, "On-line learning and
the metrical task system problem", Machine Learning 39, 2000.
"""

from __future__ import annotations

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access
from kvkeep.policies.lru import LRU

SLACK = 0.002
"""Share of the bytes asked for that LRU may be ahead …"""
SLACK_BLOCKS = 48
"""… beside so many blocks, before it is followed."""
TURNOVERS = 0.5
"""Times its capacity that LRU stores before the policy is tried again …"""
LONGER = 8
"""… and how many times as long after each try. Few tries: each costs what LRU may be ahead, and then some."""
MEMORY = 64
"""Times the capacity that is asked for before what was seen counts half."""


class Shadow(LRU):
    """The keys that LRU would hold, and how far it is ahead. ``room``, of each call: bytes that there are for them."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.followed = False
        self._sizes: dict[BlockKey, int] = {}
        self._used = self._stored = 0
        self._lead = self._asked = 0.0
        self._until = 0.0  # so much has been stored: LRU is followed until then
        self._turnovers = TURNOVERS

    def found(self, key: BlockKey, nbytes: int, access: Access, room: int) -> None:
        """A block is used that is resident."""
        self._asked += nbytes
        if key in self._sizes:
            self.touch(key, access)
        else:
            self._lead -= nbytes
            self.store(key, nbytes, access, room)

    def missed(self, key: BlockKey, nbytes: int, access: Access, room: int) -> None:
        """A block is used that is not."""
        self._asked += nbytes
        size = self._sizes.get(key)
        if size is None:
            self.store(key, nbytes, access, room)
            return
        self._lead += min(size, nbytes * max(1, access.prompt_blocks - access.position))
        self._used += nbytes - size
        self._sizes[key] = nbytes
        self.touch(key, access)

    def refused(self, key: BlockKey, nbytes: int, access: Access, room: int) -> None:
        """… nor is stored now, so nobody will say what follows it: here it stands for the rest of the prompt."""
        rest = nbytes * (access.prompt_blocks - access.position - 1)
        if key in self._sizes and rest > 0:
            self._sizes[key] += rest
            self._used += rest
            self._stored += rest
            self._asked += rest
            self._shrink(room)

    def store(self, key: BlockKey, nbytes: int, access: Access, room: int) -> None:
        """A block is stored, whether somebody used it or not."""
        if key not in self._sizes:
            self._sizes[key] = nbytes
            self._used += nbytes
            self._stored += nbytes
            self.insert(key, nbytes, access)
            self._shrink(room)

    def gone(self, key: BlockKey) -> None:
        """A block was deleted, not evicted."""
        size = self._sizes.pop(key, None)
        if size is not None:
            self._used -= size
            self.remove(key, evicted=False)

    def judge(self, block_nbytes: int) -> bool:
        """Between two requests: is LRU to be followed? Tells whether that has changed."""
        before = self.followed
        if self.followed:
            if self._stored >= self._until:
                self.followed = False
                self._lead = self._asked = 0.0
        elif self._lead > SLACK * self._asked + SLACK_BLOCKS * block_nbytes:
            self.followed = True
            self._until = self._stored + self._turnovers * self.capacity
            self._turnovers *= LONGER
        elif self._asked > MEMORY * self.capacity:
            self._asked /= 2
            self._lead /= 2
        return self.followed != before

    def _shrink(self, room: int) -> None:
        while self._used > room and self._order:
            key, _ = self._order.popitem(last=False)
            self._used -= self._sizes.pop(key)
