"""LFU-DA: LFU with dynamic aging. A block's rank is its count plus the rank of the last victim when it was used.

M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content management techniques for Web proxy
caches", 1999. What was popular once does not stay for ever: the ranks of those that come later start higher.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.ranking import Ranking


class LFUDA(EvictionPolicy):
    """Of equal ranks the block that was used longest ago goes first."""

    name: ClassVar[str] = "lfuda"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ranks = Ranking()
        self._counts: dict[BlockKey, int] = {}
        self._age = 0.0

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._counts[key] = 1
        self._ranks[key] = self._age + 1

    def touch(self, key: BlockKey, access: Access) -> None:
        self._counts[key] += 1
        self._ranks[key] = self._age + self._counts[key]

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if self._counts.pop(key, None) is not None:
            if evicted:
                self._age = max(self._age, self._ranks[key])
            self._ranks.discard(key)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return self._ranks.first(allowed)

    def __len__(self) -> int:
        return len(self._counts)
