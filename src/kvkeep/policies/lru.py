"""LRU: evict what was used longest ago. (Belady 1966 names it; folklore before.)"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class LRU(EvictionPolicy):
    """A touch moves a block to the young end; victims come from the old end.

    The blocks of one prompt, told from the front to the back, are used at one time. Once another prompt comes they are
    turned round, so that the end of a prompt goes before its front.
    """

    name: ClassVar[str] = "lru"
    leaf_first: ClassVar[bool] = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[BlockKey, None] = OrderedDict()
        self._prompt: list[BlockKey] = []  # the youngest blocks as they came, each the parent of the next

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._follow(key, access.parent)
        self._order[key] = None

    def touch(self, key: BlockKey, access: Access) -> None:
        self._follow(key, access.parent)
        self._order.move_to_end(key)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._order.pop(key, None)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in self._order if allowed(key)), None)

    def __len__(self) -> int:
        return len(self._order)

    def _follow(self, key: BlockKey, parent: BlockKey | None) -> None:
        prompt = self._prompt
        if prompt and prompt[-1] != parent:
            if len(prompt) > 1:
                order = self._order
                for block in reversed(prompt):
                    if block in order:
                        order.move_to_end(block)
            prompt.clear()
        prompt.append(key)
