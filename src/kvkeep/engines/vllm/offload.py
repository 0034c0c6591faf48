"""vLLM's native offloading (``OffloadingConnector``) on kvkeep's store.

On a GPU host vLLM can keep KV in main memory (the primary tier) and below that in secondary tiers. This one plugs into
it by name, without a connector of ours; so do the policies of :mod:`kvkeep.engines.vllm.eviction`::

    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
        "eviction_policy": "kvkeep-sieve", "cache_policy_module_path": "kvkeep.engines.vllm.eviction",
        "secondary_tiers": [{"type": "KVKeepTier", "module_path": "kvkeep.engines.vllm.offload",
                             "dir": "~/.cache/kvkeep", "disk": "100GiB"}]}}

:class:`KVKeepTier` keeps whole chunks as vLLM lays them out, so they serve the same model under the same parallelism
and vLLM version only; what the connector (:mod:`kvkeep.engines.vllm`) keeps is another form and not found by it, nor
the other way round. vLLM names a chunk by the hash of its tokens, an adapter's *name* and an image's id: the tier adds
the model's identity, and refuses to start where such a name could stand for other content.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from types import FrameType
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvkeep import config as cache_config
from kvkeep.cache import KVCache, Match
from kvkeep.engines.vllm import logs
from kvkeep.engines.vllm.naming import identity
from kvkeep.errors import ConfigError
from kvkeep.identity import derive
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout, LayerGroup
from kvkeep.policies.base import Access

MAX_UNREADABLE = 1 << 16


class KVKeepTier(SecondaryTierManager):
    """A secondary tier on kvkeep's disk and remote stores.

    Options beside ``type`` and ``module_path`` are those of :mod:`kvkeep.config`, or ``config``, a file with them.
    There is no memory tier by default: vLLM's primary one is that. Runs in the scheduler's process; what takes time
    runs in threads of its own.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        num_threads: int = 4,
        **options: Any,
    ) -> None:
        """Raises :class:`ConfigError` on a wrong option, or where chunks' names are not safe to keep."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        logs.join()
        with logs.refusing():
            found = _options(options)
            vllm_config = _vllm_config()
            _refuse_what_is_named_by_name(vllm_config)
            self._cache: KVCache = found.open()
        layout = chunk_layout(vllm_config, offloading_spec.config, self.block_size_bytes, self._cache.namespace)
        self._cache = self._cache.bind(layout, description=f"{offloading_spec.config.model.name} (vLLM offloading)")
        assert self._cache.layout is not None
        self._layout = self._cache.layout  # as bound: with what the cache adds to the identity
        # The view has two dimensions, and Python cannot slice such.
        self._rows = primary_kv_view.cast("B")
        self.locality = Locality.LOCAL if found.remote is None else Locality.REMOTE
        # A server's answer takes time, an index in memory does not.
        self._asking = _Asking(tier_type, self._find) if found.remote is not None else None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kvkeep-offload")
        self._jobs: dict[int, tuple[TransferJob, Future[JobResult]]] = {}
        self._unreadable: set[OffloadKey] = set()  # found, but not loaded: not asked for again until stored anew

    def _key(self, key: OffloadKey) -> BlockKey:
        return chunk_key(self._layout, key)

    def _find(self, keys: Sequence[OffloadKey]) -> list[bool]:
        store = self._cache.store
        return [bool(store.locate([self._key(key)])) for key in keys]

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if key in self._unreadable:
            return LookupResult.MISS
        found = self._find([key])[0] if self._asking is None else self._asking.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._unreadable.difference_update(job_metadata.keys)
        self._submit(job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._load)

    def _submit(self, job: TransferJob, work: Callable[[TransferJob], JobResult]) -> None:
        self._jobs[job.job_id] = (job, self._pool.submit(work, job))

    def _store(self, job: TransferJob) -> JobResult:
        begin = time.perf_counter()
        now = time.time()
        kept = 0
        for at, (key, chunk) in enumerate(zip(job.keys, job.chunk_ids, strict=True)):
            access = Access(now, at, len(job.keys))
            kept += self._cache.store.save_now(self._key(key), self._row(chunk), self._layout, access)
        seconds = time.perf_counter() - begin
        return JobResult(job.job_id, kept == len(job.keys), transfer_time=seconds, transfer_bytes=self._nbytes(kept))

    def _load(self, job: TransferJob) -> JobResult:
        begin = time.perf_counter()
        names = list(job.keys)
        keys = [self._key(key) for key in names]
        places = self._cache.store.locate(keys)
        match = Match(tuple(keys[: len(places)]), tuple(places), len(keys), self._layout.block_tokens)
        with self._cache.lease(match) as lease:
            tokens = self._cache.load(lease, _Chunks(self._row, job.chunk_ids))
        done = tokens // self._layout.block_tokens
        seconds = time.perf_counter() - begin
        return JobResult(
            job.job_id,
            done == len(names),
            successful_keys=names[:done],
            transfer_time=seconds,
            transfer_bytes=self._nbytes(done),
        )

    def _row(self, chunk: int) -> memoryview:
        start = int(chunk) * self.block_size_bytes
        return self._rows[start : start + self.block_size_bytes]

    def _nbytes(self, chunks: int) -> int:
        return chunks * int(self.block_size_bytes)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job_id in [job_id for job_id, (_, future) in self._jobs.items() if future.done()]:
            job, future = self._jobs.pop(job_id)
            result = future.result()
            if job.is_promotion and not result.success:
                self._lost(list(job.keys)[len(result.successful_keys or ()) :])
            yield result

    def _lost(self, keys: list[OffloadKey]) -> None:
        if len(self._unreadable) > MAX_UNREADABLE:
            self._unreadable.clear()
        self._unreadable.update(keys)
        if self._asking is not None:
            self._asking.mark_miss(keys)

    def has_pending_work(self) -> bool:
        return bool(self._jobs)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        if self._asking is not None:
            self._asking.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        if self._asking is not None:
            self._asking.flush()

    def drain_jobs(self) -> None:
        wait([future for _, future in self._jobs.values()])

    def shutdown(self) -> None:
        if self._asking is not None:
            self._asking.shutdown()
        self._pool.shutdown()
        self._rows.release()
        self._cache.close()


class _Chunks:
    """Takes blocks into the primary tier's chunks."""

    def __init__(self, row: Callable[[int], memoryview], chunk_ids: Sequence[int]) -> None:
        self._row = row
        self._chunk_ids = chunk_ids

    def write(self, index: int, payload: memoryview) -> None:
        self._row(self._chunk_ids[index])[:] = payload


class _Asking(AsyncLookupManager):
    """Look-ups that take time, in a thread."""

    def __init__(self, tier_type: str, find: Callable[[Sequence[OffloadKey]], list[bool]]) -> None:
        self._find = find
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._find(keys)


def chunk_key(layout: KVLayout, key: OffloadKey) -> BlockKey:
    """kvkeep's name of vLLM's chunk ``key`` (the hash of its prompt up to its end, and its cache group)."""
    return BlockKey(derive(layout.fingerprint, b"kvkeep offload 1", (key,)))


def chunk_layout(vllm_config: VllmConfig, spec: OffloadingConfig, nbytes: int, namespace: bytes) -> KVLayout:
    """A chunk as one opaque tensor of ``nbytes``; whatever decides what its bytes mean is part of the identity."""
    model = identity(vllm_config, attention=str(vllm_config.attention_config.backend), namespace=namespace)
    parallel = asdict(spec.parallel)
    for name in ("rank", "data_parallel_index", "data_parallel_size", "data_parallel_rank_local"):
        del parallel[name]  # which replica it is changes nothing
    form = {
        "device": current_platform.get_device_name(),
        "groups": [asdict(group) for group in spec.groups],
        "nbytes": [nbytes, spec.worker_kv_bytes_per_block],
        "cache": asdict(spec.cache),
        "parallel": parallel,
        "layout": [spec.kv_cache_layout, spec.replicated_layout, spec.canonical_layout],
    }
    numerics = json.dumps([model.numerics, form], sort_keys=True, default=str)
    tokens = spec.groups[0].tokens_per_block * spec.cache.blocks_per_chunk
    if nbytes % tokens:
        tokens = 1
    return KVLayout(replace(model, numerics=numerics), (LayerGroup(1, 1, nbytes // tokens, 0),), "uint8", tokens)


def _options(options: dict[str, Any]) -> cache_config.Config:
    if "config" in options:
        path = options.pop("config")
        if options:
            raise ConfigError(f"give {', '.join(sorted(options))} in the file that config names, or leave config out")
        return cache_config.from_file(path)
    return cache_config.from_dict({"memory": 0, **options})


def _vllm_config() -> VllmConfig:
    """Of the engine that is being built. vLLM tells a tier the model's name only, so it is taken from the connector,
    which stands further up the stack while it makes its tiers."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("vllm_config")
        if isinstance(found, VllmConfig):
            return found
        frame = frame.f_back
    raise ConfigError("KVKeepTier is made by vLLM's OffloadingConnector only: it has to see the engine's configuration")


def _refuse_what_is_named_by_name(vllm_config: VllmConfig) -> None:
    instead = "use kvkeep's connector (kvkeep vllm-args) in place of vLLM's offloading"
    if vllm_config.lora_config is not None:
        raise ConfigError(f"vLLM's offloading names a LoRA adapter by name and path, not by its bytes: {instead}")
    if vllm_config.model_config.is_multimodal_model:
        raise ConfigError(f"vLLM's offloading names an image by an id that a client may choose: {instead}")
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        raise ConfigError(f"--prefix-caching-hash-algo {algorithm} can be made to collide: use sha256 or sha256_cbor")
