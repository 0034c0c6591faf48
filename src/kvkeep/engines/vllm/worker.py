"""The connector in a rank's process: it owns the cache, loads blocks into pages and saves pages as blocks.

A save copies the pages out before the step ends, so vLLM may reuse them at once; writing to disk is the cache's own
thread. A load fills pages that vLLM has reserved for the request: before the forward pass, or in the background while
vLLM holds the request back. Where a load fails, the pages from there on are reported as invalid and nothing of that
step is saved, since it was computed from them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec, iter_layer_specs

from kvkeep.cache import KVCache, Match
from kvkeep.engines.vllm import naming
from kvkeep.engines.vllm.options import Options
from kvkeep.engines.vllm.pages import Ahead, DevicePages, Pages
from kvkeep.engines.vllm.plan import DROPPED, Hello, Load, Plan, Report
from kvkeep.engines.vllm.stats import KVKeepStats, Since
from kvkeep.errors import ConfigError
from kvkeep.layout import KVLayout

log = init_logger("vllm.kvkeep")


class Worker:
    """One rank's half."""

    def __init__(self, options: Options, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._options = options
        self._config = vllm_config
        self._names = layer_names(vllm_config, kv_cache_config)
        self._page_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._cache: KVCache | None = None
        self._report = Report()
        self._invalid: set[int] = set()
        self._arrived: set[str] = set()
        self._lock = threading.Lock()  # of what the background hands over: the three above

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Learn where the pages are, and open the cache."""
        layers = self._config.compilation_config.static_forward_context
        on_cpu = next(iter(caches.values())).device.type == "cpu"
        self._pages = (Pages if on_cpu else DevicePages)(self._names, layers, caches)
        if self._pages.page_tokens != self._page_tokens:
            raise ConfigError(f"pages of {self._pages.page_tokens} tokens in blocks of {self._page_tokens}")
        parallel = self._config.parallel_config
        self._shard = get_pp_group().rank_in_group * parallel.tensor_parallel_size + get_tp_group().rank_in_group
        with _unpinned():
            tiers = self._options.cache.open()
            if parallel.pipeline_parallel_size > 1 or self._options.async_load is not False:
                self._background = ThreadPoolExecutor(2, "kvkeep-load", initializer=_unpin)
                list(self._background.map(int, range(2)))
            tiers.store.writer.start()
            self._ahead = Ahead(self._pages, _unpin) if on_cpu else None
        layout = KVLayout(
            naming.identity(self._config, attention=self._attention(layers), namespace=tiers.namespace),
            self._pages.groups,
            self._pages.dtype,
            block_tokens=tiers.block_tokens,
            num_shards=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
        )
        longest = self._config.model_config.max_model_len
        if layout.block_tokens > longest:
            log.warning(
                "kvkeep: keeps nothing: block_tokens is %d, and no request has more than %d tokens (max-model-len)",
                layout.block_tokens, longest,
            )  # fmt: skip
        self._cache = tiers.bind(layout, shard=self._shard, description=str(self._config.model_config.model))
        self._since = Since(self._cache.counters)
        log.info(
            "kvkeep: keeps blocks of %d tokens (%d bytes) in %s", layout.block_tokens, layout.block_nbytes,
            tiers.directory or "memory or on its server",
        )  # fmt: skip

    @property
    def hello(self) -> Hello:
        assert self._cache is not None
        assert self._cache.layout is not None
        return Hello(self._cache.layout, self._shard)

    def load(self, plan: Plan) -> None:
        """Do the loads of this step; those in the background are only begun."""
        for load in plan.loads:
            self._reach(load.pages)
            if load.background:
                self._background.submit(self._load_in_background, load)
                continue
            reached = self._agreed(self._load(load))
            if reached < load.first + len(load.keys[self._shard]):
                self._failed(load, reached)
                self._report.bad_epoch = plan.epoch

    def save(self, plan: Plan) -> None:
        """Copy out what this step has computed."""
        assert self._cache is not None
        assert self._cache.layout is not None
        if not plan.saves:
            return
        size = self._cache.layout.block_tokens
        kept: list[int] = []
        bad = plan.epoch <= self._bad_epoch()
        for save in plan.saves:
            self._reach(save.pages)
            keys = save.keys[self._shard]
            if bad:
                kept.append(DROPPED)
                continue
            end = (save.first + len(keys)) * size
            blocks = self._pages.blocks(self._cache.layout, 0, (save.first * size, end), save.base, save.pages)
            kept.append(
                self._cache.save_keys(
                    keys, blocks, first=save.first, parent=save.before[self._shard], hits=save.hits,
                    total_blocks=save.total,
                )[1]
            )  # fmt: skip
        self._report.kept[plan.step] = kept

    def take_arrived(self) -> set[str]:
        with self._lock:
            arrived, self._arrived = self._arrived, set()
        return arrived

    def take_invalid(self) -> set[int]:
        with self._lock:
            invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> Report | None:
        with self._lock:
            report, self._report = self._report, Report()
        self._worst_epoch = max(self._bad_epoch(), report.bad_epoch)
        return report if report.kept or report.failed or report.bad_epoch >= 0 else None

    def take_stats(self) -> KVKeepStats | None:
        return self._since.take() if self._cache is not None else None

    def close(self) -> None:
        if self._cache is not None:
            if hasattr(self, "_background"):
                self._background.shutdown()
            if self._ahead is not None:
                self._ahead.close()
            self._cache.close()

    def _reach(self, ids: Sequence[int]) -> None:
        if self._ahead is not None:
            self._ahead.reach(ids)

    _worst_epoch = -1

    def _bad_epoch(self) -> int:
        return max(self._worst_epoch, self._report.bad_epoch)

    def _load(self, load: Load) -> int:
        """Fill its pages; the first block that is not there."""
        assert self._cache is not None
        assert self._cache.layout is not None
        layout, keys = self._cache.layout, load.keys[self._shard]
        places = self._cache.store.locate(keys)
        match = Match(
            keys[: len(places)], tuple(places), load.total, layout.block_tokens, load.first, load.before[self._shard]
        )
        blocks = self._pages.blocks(layout, load.first, load.tokens, load.base, load.pages)
        with _unpinned(), self._cache.lease(match) as lease:  # a load may start threads
            loaded = self._cache.load(lease, blocks)
        blocks.flush()
        return load.first + loaded // layout.block_tokens

    def _load_in_background(self, load: Load) -> None:
        reached = load.first
        try:
            reached = self._load(load)
        finally:  # whatever happens, vLLM waits for this request's name
            if reached < load.first + len(load.keys[self._shard]):
                self._failed(load, reached)
            with self._lock:
                self._arrived.add(load.request)

    def _failed(self, load: Load, reached: int) -> None:
        assert self._cache is not None
        assert self._cache.layout is not None
        # Of what follows nothing is known, and vLLM computes it now: saved anew, it does not fail block by block.
        for tier in self._cache.store.tiers:
            if tier.owned:
                for key in load.keys[self._shard][reached - load.first :]:
                    tier.delete(key)
        good = max(reached * self._cache.layout.block_tokens, load.tokens[0])
        with self._lock:
            self._invalid.update(load.pages[good // self._page_tokens - load.base :])
            self._report.failed[load.request] = reached
        log.warning("kvkeep: request %s: a block did not load, so vLLM computes it", load.request)

    def _agreed(self, reached: int) -> int:
        """The least of all tensor-parallel ranks: what one could not load, none has."""
        group = get_tp_group()
        if group.world_size == 1:
            return reached
        least = torch.tensor(reached)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
        return int(least)

    def _attention(self, layers: dict[str, Any]) -> str:
        return ",".join(sorted({type(layers[name].impl).__name__ for name in self._names}))


def layer_names(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[str]:
    """The layers whose pages are kept. Raises :class:`ConfigError` with the reason where that cannot be all."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise ConfigError("this model has no KV cache, so there is nothing for kvkeep to keep")
    specs = [spec for group in groups for spec in iter_layer_specs(group.kv_cache_spec)]
    kinds = sorted({type(spec).__name__ for spec in specs})
    if len(groups) != 1 or not {type(spec) for spec in specs} <= {FullAttentionSpec, MLAAttentionSpec}:
        raise ConfigError(
            f"kvkeep keeps attention's keys and values by token; this model's cache is {', '.join(kinds)} in "
            f"{len(groups)} groups, some of which (recurrent state, a moving window) cannot be cut into blocks"
        )
    if any(spec.non_causal or spec.tokens_per_state != 1 for spec in specs):
        raise ConfigError("tokens of this model see ahead, or share a place in its cache: no block stands for a prefix")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "ngram_gpu", "suffix"):
        raise ConfigError(
            f"speculative decoding by {speculative.method} keeps a draft model's cache beside the model's, which "
            "kvkeep cannot cut into blocks: use ngram or suffix, or leave kvkeep out"
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError("context parallelism spreads a token's cache over ranks, which kvkeep does not serve")
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ConfigError(
            f"kv_cache_dtype {vllm_config.cache_config.cache_dtype} is not served: its scales are no part of a block"
        )
    return list(groups[0].layer_names)


@contextmanager
def _unpinned() -> Iterator[None]:
    """Threads that begin here may run on every core: vLLM pins a worker to those that compute."""
    mine = os.sched_getaffinity(0)
    _unpin()
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def _unpin() -> None:
    """The calling thread may run wherever the process that started this one may."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()) | os.sched_getaffinity(0))
