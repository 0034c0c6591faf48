"""GDSF: large blocks must be used more often to stay. Rank = age + count / size.

L. Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HPL-98-69R1, 1998,
with a cost of 1 a block: it maximises the share of blocks found, not of bytes. Age is the rank of the last victim.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.ranking import Ranking


class GDSF(EvictionPolicy):
    """Of equal ranks the block that was used longest ago goes first."""

    name: ClassVar[str] = "gdsf"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ranks = Ranking()
        self._uses: dict[BlockKey, tuple[int, int]] = {}  # → count, bytes
        self._age = 0.0

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._rank(key, 1, nbytes)

    def touch(self, key: BlockKey, access: Access) -> None:
        count, nbytes = self._uses[key]
        self._rank(key, count + 1, nbytes)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if self._uses.pop(key, None) is not None:
            if evicted:
                self._age = max(self._age, self._ranks[key])
            self._ranks.discard(key)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return self._ranks.first(allowed)

    def __len__(self) -> int:
        return len(self._uses)

    def _rank(self, key: BlockKey, count: int, nbytes: int) -> None:
        self._uses[key] = count, nbytes
        self._ranks[key] = self._age + count / max(nbytes, 1)
