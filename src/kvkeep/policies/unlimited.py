"""Unlimited: nothing is ever evicted. In a replay the ceiling of what any room can give; in production a full tier
stores no more."""

from __future__ import annotations

from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class Unlimited(EvictionPolicy):
    """Knows what is resident, and never names a victim."""

    name: ClassVar[str] = "unlimited"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._keys: set[BlockKey] = set()

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._keys.add(key)

    def touch(self, key: BlockKey, access: Access) -> None:
        pass

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._keys.discard(key)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return None

    def __len__(self) -> int:
        return len(self._keys)
