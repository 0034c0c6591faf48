"""The connector in the scheduler's process: which prefix is stored, what to load, what to save.

It looks into the directory without owning any of it (the ranks do, in processes of their own), and remembers what the
ranks have reported as kept and the directory does not show yet. Nothing here blocks: a remote store is asked in the
background, and the request waits its turn meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from kvkeep import registry
from kvkeep.engines.vllm.naming import Adapters, extras
from kvkeep.engines.vllm.options import Options
from kvkeep.engines.vllm.plan import DROPPED, Hello, Load, Plan, Report, Save
from kvkeep.engines.vllm.stats import KVKeepStats, Since
from kvkeep.events import Counters
from kvkeep.keys import BlockKey, Extra, KeyChain
from kvkeep.opening import codec_named
from kvkeep.stores.disk import DiskStore
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore

log = init_logger("vllm.kvkeep")

LOOK_AGAIN_SECONDS = 0.25
"""How long an answer about a waiting request is good for."""

WORTH_WAITING_TOKENS = 128
"""A request waits for another one that computes its prefix only where that saves at least so many tokens."""

_NEVER = 1 << 62

MAX_NEWS = 1 << 17
"""Keys that are remembered beside what the directory shows."""


class Index:
    """What is stored, as seen from here: by shard, the keys of a prompt's blocks."""

    def __init__(self, options: Options, counters: Counters) -> None:
        cache = options.cache
        raw = registry.lookup("codecs", "raw")()
        near: list[Tier] = []
        if cache.disk:
            slabs = DiskStore(cache.dir.expanduser(), capacity=cache.disk, read_only=True)
            near.append(Tier("disk", slabs, policy=None, codec=raw, observer=counters))
        self.near = TieredStore(near, codec=codec_named, observer=counters)
        self.far: TieredStore | None = None
        if cache.remote:
            from kvkeep.stores.url import open_store

            server = Tier("remote", open_store(cache.remote), policy=None, codec=raw, observer=counters)
            self.far = TieredStore([server], codec=codec_named, observer=counters)
            self._threads = ThreadPoolExecutor(2, "kvkeep-lookup")
        self._news: dict[BlockKey, None] = {}  # reported as kept; a dict for its order
        self._bad: dict[BlockKey, None] = {}  # did not load, whatever the directory says
        self.version = 0

    def prefix(self, keys: Sequence[Sequence[BlockKey]]) -> int:
        """How many of the first blocks are there for all shards, without asking a remote store."""
        return min(self._prefix(of_shard) for of_shard in keys)

    def beyond(self, keys: Sequence[Sequence[BlockKey]]) -> Future[int] | None:
        """The same for a remote store, in the background."""
        far = self.far
        if far is None or not far.tiers[0].breakers.medium.closed:
            return None
        return self._threads.submit(lambda: min(len(far.locate(of_shard)) for of_shard in keys))

    def told(self, keys: Sequence[BlockKey]) -> None:
        """These are kept now."""
        for key in keys:
            self._bad.pop(key, None)
            self._news[key] = None
        while len(self._news) > MAX_NEWS:
            del self._news[next(iter(self._news))]
        self.version += 1

    def failed(self, keys: Sequence[BlockKey]) -> None:
        """These did not load."""
        for key in keys:
            self._news.pop(key, None)
            self._bad[key] = None
        while len(self._bad) > MAX_NEWS:
            del self._bad[next(iter(self._bad))]
        self.version += 1

    def close(self) -> None:
        if self.far is not None:
            self._threads.shutdown(cancel_futures=True)
            self.far.close()
        self.near.close()

    def _prefix(self, keys: Sequence[BlockKey]) -> int:
        good = len(list(takewhile(lambda key: key not in self._bad, keys)))
        done = 0
        while done < good:
            there = len(self.near.locate(keys[done:good]))
            for key in keys[done : done + there]:
                self._news.pop(key, None)
            done += there
            new = len(list(takewhile(self._news.__contains__, keys[done:good])))
            if not new:
                break
            done += new
        return done


class Prompt:
    """What is known about one request: its blocks' names, and where they are."""

    def __init__(self, request: Request, hellos: Sequence[Hello], found: list[Extra], limit: int) -> None:
        self.request = request
        self._chains = [KeyChain(hello.layout, shard=hello.shard) for hello in hellos]
        self._size = hellos[0].layout.block_tokens
        self._extras = found
        self._limit = limit  # tokens that have a name
        self.stored = 0  # blocks found in the store, from the front
        self.total = 0  # full blocks of the prompt
        self.hits = 0  # of those the ones that were stored when it was given room
        self.saved = 0  # blocks that need not be saved any more
        self.looked: tuple[float, int] | None = None  # when, and at which version of the index
        self.asked: tuple[int, Future[int]] | None = None  # the remote store: from which block on
        self.far = False  # are some blocks on the remote store only?
        self.hit = (0, False)  # the last answer to vLLM: end of the hit, loaded in the background?
        self.counted = False
        self.lost = False  # a load failed: compute, do not ask again

    def name(self, tokens: int) -> int:
        """Name the full blocks of the first ``tokens`` tokens; how many there are."""
        end = min(tokens, self._limit) // self._size * self._size
        for chain in self._chains:
            start = chain.num_tokens
            if end > start:
                here = [extra for extra in self._extras if start <= extra[0] < end]
                chain.extend(self.request.all_token_ids[start:end], extra=here)
        return end // self._size

    def keys(self, first: int, end: int) -> tuple[tuple[BlockKey, ...], ...]:
        """Of blocks ``first`` … ``end - 1``, by shard."""
        return tuple(tuple(chain.keys[first:end]) for chain in self._chains)

    def before(self, first: int) -> tuple[BlockKey | None, ...]:
        """Of the block before ``first``, by shard."""
        return tuple(chain.keys[first - 1] if first else None for chain in self._chains)


class Scheduler:
    """The scheduler's half."""

    def __init__(self, options: Options, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._options = options
        self._page_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        self._hellos: list[Hello] = []
        self._adapters = Adapters(time.time_ns())
        self._salt: list[Extra] = []
        self._prompts: dict[str, Prompt | None] = {}
        self._computing: dict[BlockKey, str] = {}  # blocks that a running request is about to compute
        self._counters = Counters()
        self._since = Since(self._counters)
        self._loads: list[Load] = []
        self._step = 0
        self._epoch = 0
        self._under_way: dict[int, list[Save]] = {}  # saves by step, until the ranks report

    def meet(self, hellos: Sequence[Hello]) -> None:
        """The ranks are ready: from now on there is something to look for."""
        self._hellos = sorted(hellos, key=lambda hello: hello.shard)
        self._size = self._hellos[0].layout.block_tokens
        self._index = Index(self._options, self._counters)

    def match(self, request: Request, local: int) -> tuple[int | None, bool]:
        """How many tokens beyond ``local`` can be loaded, and whether in the background; ``None``: ask again later."""
        prompt = self._prompt(request)
        if prompt is None or prompt.lost or request.skip_reading_prefix_cache:
            return 0, False
        if not self._look(prompt):
            return None, False
        end = min(prompt.stored * self._size, request.num_tokens - 1)
        if self._options.aligned:
            end -= end % self._page_tokens
        if self._options.share and self._computed_elsewhere(prompt, max(end, local)):
            return None, False
        if end <= local:
            return 0, False
        background = self._options.async_load
        prompt.hit = (end, self._pipeline or (prompt.far if background is None else background))
        return end - local, prompt.hit[1]

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """vLLM has made room for the request, also for ``tokens`` that are to be loaded."""
        prompt = self._prompts.get(request.request_id)
        if prompt is None:
            return
        total = prompt.name(request.num_tokens)
        if not prompt.total:
            prompt.total, prompt.hits = total, prompt.stored
        end, background = prompt.hit
        if tokens:
            first, last = (end - tokens) // self._size, -(-end // self._size)
            base = (end - tokens) // self._page_tokens
            pages = tuple(blocks.get_block_ids()[0][base : -(-end // self._page_tokens)])
            keys = prompt.keys(first, last)
            prompt.hits = last  # also of a request that was preempted, and finds more now
            self._loads.append(
                Load(request.request_id, (end - tokens, end), first, keys, prompt.before(first),
                     max(prompt.total, last), base, pages, background)
            )  # fmt: skip
        prompt.saved = max(prompt.saved, prompt.stored)
        if not (tokens and background):
            for key in prompt.keys(prompt.stored, total)[0]:
                self._computing.setdefault(key, request.request_id)

    def plan(self, output: SchedulerOutput) -> Plan:
        """What the ranks shall do in this step."""
        self._step += 1
        plan = Plan(self._step, self._epoch, self._loads)
        self._loads = []
        for request_id, count in output.num_scheduled_tokens.items():
            prompt = self._prompts.get(request_id)
            if prompt is None:
                continue
            request = prompt.request
            end = prompt.name(min(request.num_computed_tokens + count, request.num_tokens))
            first = prompt.saved
            if end <= first:
                continue
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)[0]
            base = first * self._size // self._page_tokens
            pages = tuple(block_ids[base : -(-end * self._size // self._page_tokens)])
            plan.saves.append(
                Save(request_id, first, prompt.keys(first, end), prompt.before(first), prompt.total, prompt.hits, base,
                     pages)
            )  # fmt: skip
            prompt.saved = end
        if plan.saves:
            self._under_way[self._step] = plan.saves
        return plan

    def hear(self, report: Report) -> None:
        """What the ranks have done."""
        for step, counts in report.kept.items():
            for save, kept in zip(self._under_way.pop(step, []), counts, strict=False):
                prompt = self._prompts.get(save.request)
                for keys in save.keys:
                    self._index.told(keys[: max(kept, 0)])
                for key in save.keys[0]:
                    self._computing.pop(key, None)
                if prompt is None:
                    continue
                if kept == DROPPED:
                    prompt.saved = min(prompt.saved, save.first)
                elif kept < len(save.keys[0]):
                    prompt.saved = _NEVER  # no room: what follows could not be found without what is missing
        for request_id, block in report.failed.items():
            prompt = self._prompts.get(request_id)
            if prompt is not None:
                for keys in prompt.keys(block, prompt.stored):
                    self._index.failed(keys)
                prompt.lost = True
                prompt.stored = min(prompt.stored, block)
                prompt.saved = min(prompt.saved, block)
        self._epoch = max(self._epoch, report.bad_epoch + 1)

    def finished(self, request: Request) -> None:
        """vLLM is done with it."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is not None:
            for key in prompt.keys(0, _NEVER)[0]:
                if self._computing.get(key) == request.request_id:
                    del self._computing[key]

    def reset(self) -> None:
        """Nothing that was stored is found any more, nor what is stored from now on by others: this is what one calls
        after the weights were changed in place, and their files' digest is then no name for them."""
        self._salt = [(0, b"reset" + os.urandom(16))]
        self._prompts = dict.fromkeys(self._prompts)
        self._computing.clear()

    def take_stats(self) -> KVKeepStats | None:
        return self._since.take()

    def close(self) -> None:
        if self._hellos:
            self._index.close()

    def _prompt(self, request: Request) -> Prompt | None:
        """``None`` where the request's blocks have no name."""
        name = request.request_id
        if name not in self._prompts:
            prompt = None
            adapter = self._adapters.digest(request)
            if self._hellos and adapter is not None and not request.resumable:
                found, limit = extras(request, adapter, self._size)
                prompt = Prompt(request, self._hellos, sorted(self._salt + found), limit)
            self._prompts[name] = prompt
        return self._prompts[name]

    def _look(self, prompt: Prompt) -> bool:
        """Find out how much is stored; is it known?"""
        now = time.monotonic()
        fresh = prompt.looked is not None and (
            prompt.looked[1] == self._index.version and now < prompt.looked[0] + LOOK_AGAIN_SECONDS
        )
        total = prompt.name(prompt.request.num_tokens)
        if not fresh:
            near = self._index.prefix(prompt.keys(0, total))
            if prompt.looked is None and near < total:
                far = self._index.beyond(prompt.keys(near, total))
                prompt.asked = None if far is None else (near, far)
            prompt.looked = (now, self._index.version)
            prompt.stored, prompt.far = near, False
        if prompt.asked is not None:
            start, asked = prompt.asked
            if not asked.done():
                return False
            if start + asked.result() > prompt.stored:
                prompt.stored, prompt.far = start + asked.result(), True
        if not prompt.counted:
            prompt.counted = True
            self._counters.event("lookup")
            self._counters.event("hit_tokens", prompt.stored * self._size)
            self._counters.event("miss_tokens", (total - prompt.stored) * self._size)
        return True

    def _computed_elsewhere(self, prompt: Prompt, tokens: int) -> bool:
        """Is a running request about to compute what follows after ``tokens``, and is that worth waiting for?"""
        first = tokens // self._size
        worth = -(-WORTH_WAITING_TOKENS // self._size)
        keys = prompt.keys(first, first + worth)[0]
        owners = {self._computing.get(key, "") for key in keys}
        if len(keys) < worth or "" in owners or prompt.request.request_id in owners:
            return False
        others = [self._prompts.get(owner) for owner in owners]
        return all(other is not None and other.request.status == RequestStatus.RUNNING for other in others)
