"""The owner's side of one tier, without the bytes: what ``tier.py`` does to a policy, at a replay's speed.

A request stores what it misses and touches what it finds. Blocks are made room for from the front, since a block is
worth nothing without those before it: at the first that is not admitted, or that finds no room beside its own
neighbours (which are pinned meanwhile), the rest is left out. The policy is told of the deepest block first, stored
ones before found ones, so that a leaf is never younger than its root.
"""

from __future__ import annotations

from collections.abc import Callable

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.trace.base import Request

BLOCK_NBYTES = 1
"""Capacities are in blocks: to a policy a replay's blocks have one byte each."""


class Owner:
    """One policy and what is resident under it, never more than ``capacity`` blocks."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.resident: set[BlockKey] = set()
        self.stored = 0
        self.evicted = 0

    def prefix(self, keys: tuple[BlockKey, ...]) -> int:
        """Blocks of the longest prefix that is resident."""
        resident = self.resident
        hits = 0
        for key in keys:
            if key not in resident:
                break
            hits += 1
        return hits

    def serve(self, request: Request, hits: int) -> None:
        """Store what is missing, then touch what was there; ``hits`` is what :meth:`prefix` said."""
        keys, now, start = request.keys, request.now, request.start
        resident = self.resident
        there: list[int] = []
        missing: list[int] = []
        for at in range(len(keys) - 1, start - 1, -1):
            (there if keys[at] in resident else missing).append(at)
        if missing:
            self._store(request, missing[::-1], hits)
        touch, count = self.policy.touch, len(keys)
        for at in there:
            touch(keys[at], Access(now, at, count, hits, keys[at - 1] if at else None))

    def _store(self, request: Request, missing: list[int], hits: int) -> None:
        keys, now = request.keys, request.now
        resident, policy, capacity = self.resident, self.policy, self.capacity
        count = len(keys)
        used = len(resident)
        own: set[BlockKey] = set()
        allowed: Callable[[BlockKey], bool] = lambda key: key not in own  # noqa: E731
        admit, victim, remove = policy.admit, policy.victim, policy.remove
        accepted: list[tuple[BlockKey, Access]] = []
        for at in missing:
            key = keys[at]
            access = Access(now, at, count, hits, keys[at - 1] if at else None)
            if not admit(key, BLOCK_NBYTES, access):
                break
            if used >= capacity:
                if not own:
                    own.update(keys)
                out = victim(allowed)
                if out is None:
                    break
                resident.discard(out)
                remove(out, evicted=True)
                self.evicted += 1
                used -= 1
            used += 1
            accepted.append((key, access))
        self.stored += len(accepted)
        insert = policy.insert
        for key, access in reversed(accepted):
            insert(key, BLOCK_NBYTES, access)
            resident.add(key)
