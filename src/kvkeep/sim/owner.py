"""The owner's side of a tier, without the bytes: what ``tier.py`` does to a policy, at a replay's speed.

A request stores what it misses and touches what it finds. Blocks are made room for from the front, since a block is
worth nothing without those before it: at the first that is not admitted, or that finds no room beside its own
neighbours (which are pinned meanwhile), the rest is left out. The policy is told of the deepest block first, stored
ones before found ones, so that a leaf is never younger than its root.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.trace.base import Request

BLOCK_NBYTES = 1
"""Capacities are in blocks: to a policy a replay's blocks have one byte each."""


def accesses_of(request: Request, hits: int) -> list[Access]:
    """What policies are told of each of its blocks."""
    keys, now = request.keys, request.now
    count = len(keys)
    parents = (None, *keys[:-1])
    return [Access(now, at, count, hits, parent) for at, parent in zip(range(count), parents, strict=False)]


class Owner:
    """One policy and what is resident under it, never more than ``capacity`` blocks."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.resident: set[BlockKey] = set()
        self.stored = 0
        self.evicted = 0

    def prefix(self, keys: Sequence[BlockKey]) -> int:
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
        keys, resident = request.keys, self.resident
        accesses = accesses_of(request, hits)
        there: list[int] = []
        missing: list[int] = []
        for at in range(len(keys) - 1, request.start - 1, -1):
            (there if keys[at] in resident else missing).append(at)
        if missing:
            self.store(keys, missing[::-1], accesses)
        touch = self.policy.touch
        for at in there:
            touch(keys[at], accesses[at])

    def store(self, keys: Sequence[BlockKey], missing: Sequence[int], accesses: Sequence[Access]) -> int:
        """Make the blocks at ``missing`` (indices, in order) resident, from the front; how many were."""
        resident, policy, capacity = self.resident, self.policy, self.capacity
        used = len(resident)
        own: set[BlockKey] = set()
        accepted: list[int] = []
        for at in missing:
            if not policy.admit(keys[at], BLOCK_NBYTES, accesses[at]):
                break
            if used >= capacity:
                own = own or set(keys)
                out = policy.victim(lambda key: key not in own)  # noqa: B023
                if out is None:
                    break
                resident.discard(out)
                policy.remove(out, evicted=True)
                self.evicted += 1
                used -= 1
            used += 1
            accepted.append(at)
        for at in reversed(accepted):
            policy.insert(keys[at], BLOCK_NBYTES, accesses[at])
            resident.add(keys[at])
        self.stored += len(accepted)
        return len(accepted)
