"""Leaf-first: any policy, but a block goes only after those that follow it in a prompt.

A block is worth nothing without the blocks before it, so what is evicted should be the end of a resident chain. This
wraps a policy: where its victim has resident children, the walk goes down from it to a leaf, and that goes. SGLang's
radix cache evicts leaves for the same reason (L. Zheng et al., "SGLang: efficient execution of structured language
model programs", NeurIPS 2024).
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy


class LeafFirst(EvictionPolicy):
    """Subclasses, made by :func:`leaf_first`, say which policy they wrap.

    When pins keep all leaves below the victim, the wrapped policy chooses among the allowed leaves, and if there are
    none, among all that is allowed.
    """

    leaf_first: ClassVar[bool] = True
    inner: ClassVar[type[EvictionPolicy]]

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._policy = self.inner(capacity)
        self._parent: dict[BlockKey, BlockKey | None] = {}
        self._children: dict[BlockKey, dict[BlockKey, None]] = {}  # resident ones, of any block, resident or not
        self._path: list[BlockKey] = []  # from the wrapped policy's last victim down

    def admit(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        return self._policy.admit(key, nbytes, access)

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._parent[key] = access.parent
        if access.parent is not None:
            self._children.setdefault(access.parent, {})[key] = None
        self._policy.insert(key, nbytes, access)

    def touch(self, key: BlockKey, access: Access) -> None:
        self._policy.touch(key, access)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        parent = self._parent.pop(key, None)
        if parent is not None:
            siblings = self._children[parent]
            del siblings[key]
            if not siblings:
                del self._children[parent]
        self._policy.remove(key, evicted=evicted)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        chosen = self._policy.victim(allowed)
        if chosen is None or chosen not in self._children:
            return chosen
        leaf = self._below(chosen)
        if not allowed(leaf):
            leaf = self._policy.victim(lambda key: key not in self._children and allowed(key)) or chosen
        return leaf

    def __len__(self) -> int:
        return len(self._policy)

    def _below(self, top: BlockKey) -> BlockKey:
        """The end of the oldest chain below ``top``. Goes on where it stopped: a chain is walked once."""
        path = self._path
        if not path or path[0] != top:
            path[:] = [top]
        while len(path) > 1 and (path[-1] not in self._parent or self._parent[path[-1]] != path[-2]):
            path.pop()
        while path[-1] in self._children:
            path.append(next(iter(self._children[path[-1]])))
        return path[-1]


@cache
def leaf_first(inner: type[EvictionPolicy]) -> type[LeafFirst]:
    """The class of ``inner`` policies that evict leaves first, called ``leaf-NAME``."""
    return type(f"LeafFirst{inner.__name__}", (LeafFirst,), {"inner": inner, "name": f"leaf-{inner.name}"})
