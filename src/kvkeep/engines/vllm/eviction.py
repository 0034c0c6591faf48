"""kvkeep's eviction policies for the primary tier of vLLM's native offloading, by ``cache_policy_module_path``::

    {"eviction_policy": "kvkeep-sieve", "cache_policy_module_path": "kvkeep.engines.vllm.eviction", …}

``kvkeep-`` and the name of any policy that :func:`kvkeep.open` takes. See :mod:`kvkeep.engines.vllm.offload`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cache as memoize
from typing import Any, ClassVar

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from kvkeep import registry
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy

PREFIX = "kvkeep-"


class KVKeepPolicy(CachePolicy):
    """Evicts by one of kvkeep's policies.

    Every chunk counts as one, so capacity is in chunks. A policy's advice not to admit a block is not asked for: vLLM
    has no place for it.
    """

    policy_name: ClassVar[str]

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._evictable: set[OffloadKey] = set()
        self._coming: dict[OffloadKey, Access] = {}  # what is known of chunks that are about to be inserted
        self._chunk_tokens = 0
        self._policy = self._make()

    def _make(self) -> EvictionPolicy:
        made: EvictionPolicy = registry.lookup("policies", self.policy_name)(max(1, self.cache_capacity))
        return made

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # Those of a store that found no room are told again when they are offered again.
        self._coming = dict(self._accesses(list(keys), req_context))

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        access = self._coming.pop(key) if key in self._coming else Access(time.monotonic())
        self._policy.insert(BlockKey(key), 1, access)
        if chunk.ref_cnt == 0:
            self._evictable.add(key)

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        self._evictable.discard(key)
        self._policy.remove(BlockKey(key), evicted=False)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # A prompt's end first: of what was used at the same time, its beginning is to stay longest.
        for key, access in reversed(self._accesses(list(keys), req_context)):
            if key in self._chunks:
                self._policy.touch(BlockKey(key), access)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        self.touch([key for group in key_groups for key in group if key in reused_keys], req_context)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        allowed = self._evictable - protected
        if len(allowed) < n:
            return None
        evicted = []
        for _ in range(n):
            key = self._policy.victim(lambda key: key in allowed)
            if key is None:  # a policy that keeps something for good
                key = BlockKey(next(iter(allowed)))
            self._policy.remove(key, evicted=True)
            name = OffloadKey(key)
            allowed.discard(name)
            self._evictable.discard(name)
            evicted.append((name, self._chunks.pop(name)))
        return evicted

    def clear(self) -> None:
        self._chunks.clear()
        self._evictable.clear()
        self._coming.clear()
        self._policy = self._make()

    def mark_evictable(self, key: OffloadKey) -> None:
        self._evictable.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        self._evictable.discard(key)

    def _accesses(self, keys: list[OffloadKey], req_context: ReqContext) -> list[tuple[OffloadKey, Access]]:
        """Each key with its place in the request's prompt, as far as vLLM has told it."""
        now = time.monotonic()
        ends = [req_context.get_offload_key_position(key) or 0 for key in keys]
        for end in ends:
            if end and (not self._chunk_tokens or end < self._chunk_tokens):
                self._chunk_tokens = end  # no chunk ends before the first one
        places = [max(0, end // self._chunk_tokens - 1) if end else at for at, end in enumerate(ends)]
        length = max(places, default=0) + 1
        parents = [None, *(BlockKey(key) for key in keys)]
        return [
            (key, Access(now, place, length, 0, parents[at] if place else None))
            for at, (key, place) in enumerate(zip(keys, places, strict=True))
        ]


@memoize
def _policy_class(name: str) -> type[KVKeepPolicy]:
    registry.lookup("policies", name)
    return type(f"KVKeep{name.title()}Policy", (KVKeepPolicy,), {"policy_name": name})


def __getattr__(name: str) -> Any:
    """``kvkeep-sieve`` is the class that vLLM makes for ``"eviction_policy": "kvkeep-sieve"``."""
    if name.startswith(PREFIX):
        return _policy_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
