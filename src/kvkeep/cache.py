"""The façade: find the longest stored prefix of a prompt, load it, save what is new.

A cache never fails a request. Whatever a medium does, ``match`` finds less, ``load`` loads less, ``save`` keeps less,
and a counter says why. Only arguments that do not fit raise (:class:`~kvkeep.errors.LayoutError`).
"""

from __future__ import annotations

import atexit
import json
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache as memoize
from pathlib import Path
from typing import Any, Protocol

from kvkeep import frame, registry
from kvkeep.buffers import BufferPool
from kvkeep.codecs.base import Codec
from kvkeep.errors import CodecError, ConfigError, LayoutError
from kvkeep.events import Counters, Observer, Observers
from kvkeep.keys import BlockKey, Extra, KeyChain, Tokens
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access
from kvkeep.sizes import parse_size
from kvkeep.stores.base import Item
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.memory import MemoryStore
from kvkeep.tier import Tier
from kvkeep.tiered import BATCH_NBYTES, TieredStore

STAGING_NBYTES = 512 << 20
"""Memory that a cache without a memory tier may take for blocks on their way to disk; touched only as needed."""

MODELS_FILE = "models.json"


class KVSink(Protocol):
    """Takes blocks into an engine."""

    def write(self, index: int, payload: memoryview) -> None:
        """Copy out block ``index`` of the prompt (``layout.block_nbytes`` bytes); the view dies afterwards."""


class KVSource(Protocol):
    """Gives an engine's blocks away."""

    def read(self, index: int, out: memoryview) -> None:
        """Fill ``out`` (``layout.block_nbytes`` bytes) with block ``index`` of the prompt."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix of a prompt, as of now. ``keys`` are those of its blocks."""

    keys: tuple[BlockKey, ...]
    places: tuple[Tier, ...]
    total_blocks: int
    block_tokens: int

    @property
    def num_blocks(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self.block_tokens

    def first(self, num_blocks: int) -> Match:
        """The same, cut to ``num_blocks``."""
        return replace(self, keys=self.keys[:num_blocks], places=self.places[:num_blocks])


@dataclass(frozen=True, slots=True)
class Lease:
    """A match whose blocks are pinned."""

    match: Match

    @property
    def num_tokens(self) -> int:
        return self.match.num_tokens


@dataclass(frozen=True, slots=True)
class TierStats:
    """``blocks`` and ``nbytes`` are what this process answers for; ``capacity`` in bytes."""

    name: str
    blocks: int
    nbytes: int
    capacity: int | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What lies where, and what has happened since the cache was opened."""

    tiers: tuple[TierStats, ...]
    events: tuple[dict[str, str | int], ...]


class KVCache:
    """Tiers, and (once bound) the layout of the blocks in them. Thread-safe."""

    def __init__(
        self,
        store: TieredStore,
        *,
        counters: Counters,
        observer: Observer,
        namespace: bytes = b"",
        block_tokens: int = 0,
        directory: Path | None = None,
        layout: KVLayout | None = None,
        shard: int = 0,
    ) -> None:
        self.store = store
        self.counters = counters
        self.namespace = namespace
        self.block_tokens = block_tokens
        self.directory = directory
        self.layout = layout
        self.shard = shard
        self._observer = observer
        self._pool = BufferPool()

    def bind(self, layout: KVLayout, *, shard: int = 0, description: str = "") -> KVCache:
        """The same tiers for blocks of ``layout``; ``description`` is what ``kvkeep stats`` calls the model."""
        if self.directory is not None:
            _describe(self.directory, layout, description)
        return KVCache(
            self.store,
            counters=self.counters,
            observer=self._observer,
            namespace=self.namespace,
            block_tokens=self.block_tokens,
            directory=self.directory,
            layout=layout,
            shard=shard,
        )

    def match(self, tokens: Tokens, *, extra: Iterable[Extra] = ()) -> Match:
        """The longest prefix of ``tokens`` in full blocks that is stored. No side effects but counters."""
        layout = self._bound()
        chain = KeyChain(layout, shard=self.shard)
        keys = chain.extend(tokens, extra=extra)
        places = self.store.locate(keys)
        hits = len(places)
        self._observer.event("lookup")
        self._observer.event("hit_tokens", hits * layout.block_tokens)
        self._observer.event("miss_tokens", (len(keys) - hits) * layout.block_tokens)
        return Match(tuple(keys[:hits]), tuple(places), len(keys), layout.block_tokens)

    @contextmanager
    def lease(self, match: Match) -> Iterator[Lease]:
        """Pin the blocks of ``match`` until the ``with`` block ends, and tell the policies that they are used."""
        now = time.time()
        by_tier: dict[int, tuple[Tier, list[tuple[BlockKey, Access]]]] = {}
        parent: BlockKey | None = None
        for at, (key, tier) in enumerate(zip(match.keys, match.places, strict=True)):
            access = Access(now, at, match.total_blocks, match.num_blocks, parent)
            by_tier.setdefault(id(tier), (tier, []))[1].append((key, access))
            parent = key
        with ExitStack() as stack:
            for tier, accesses in by_tier.values():
                keys = [key for key, _ in accesses]
                tier.pin(keys)
                stack.callback(tier.unpin, keys)
                tier.touch(accesses)
                tier.store.prefetch(keys)
            yield Lease(match)

    def load(self, lease: Lease, sink: KVSink) -> int:
        """Give the leased blocks to ``sink`` in order; how many tokens it got. A lost or damaged block ends it."""
        layout = self._bound()
        match = lease.match
        done = 0
        for index, payload in self.store.blocks(match.keys, match.places, layout):
            sink.write(index, payload)
            done = index + 1
        self.store.promote(match.keys[:done], match.places[:done], layout, time.time())
        return done * layout.block_tokens

    def save(self, tokens: Tokens, source: KVSource, *, start: int = 0, extra: Iterable[Extra] = ()) -> int:
        """Keep the full blocks of ``tokens`` from token ``start`` on that are not stored yet; how many were taken.

        ``start`` is a multiple of ``block_tokens``: the first token that ``source`` can give. Returns once the bytes
        are copied out; the rest is write-behind.
        """
        layout = self._bound()
        if start % layout.block_tokens:
            raise LayoutError(f"start {start} is no multiple of block_tokens {layout.block_tokens}")
        keys = KeyChain(layout, shard=self.shard).extend(tokens, extra=extra)
        first = start // layout.block_tokens
        there = self._stored(keys[first:])
        missing = [at for at, known in enumerate(there, first) if not known]
        now = time.time()
        taken = 0
        batch = max(1, BATCH_NBYTES // 2 // layout.block_nbytes)
        hits = missing[0] if missing else len(keys)
        for begin in range(0, len(missing), batch):
            indices = missing[begin : begin + batch]
            with self._pool.borrow(len(indices) * layout.block_nbytes) as room:
                items: list[Item] = []
                accesses = []
                for slot, index in enumerate(indices):
                    payload = room[slot * layout.block_nbytes : (slot + 1) * layout.block_nbytes]
                    source.read(index, payload)
                    head = frame.pack(keys[index], layout.fingerprint, "raw", len(payload), len(payload))
                    items.append((keys[index], [bytes(head), payload]))
                    accesses.append(Access(now, index, len(keys), hits, keys[index - 1] if index else None))
                stored = self.store.save(items, layout, accesses)
            taken += stored
            if stored < len(indices):
                break  # no room: what would follow could not be found without what is missing
        self._observer.event("save", taken, nbytes=taken * layout.block_nbytes)
        return taken

    def flush(self, timeout: float | None = None) -> bool:
        """Wait for the write-behind; was everything written within ``timeout`` seconds?"""
        return self.store.flush(timeout)

    def close(self) -> None:
        """Flush and close. All caches bound from this one are closed with it."""
        self.store.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stats(self) -> Stats:
        tiers = tuple(TierStats(tier.name, *tier.usage, tier.store.capacity) for tier in self.store.tiers)
        return Stats(tiers, tuple(self.counters.rows()))

    def _stored(self, keys: Sequence[BlockKey]) -> list[bool]:
        known = [False] * len(keys)
        for tier in self.store.tiers:
            known = [a or b for a, b in zip(known, tier.contains_many(keys), strict=True)]
        return known

    def _bound(self) -> KVLayout:
        if self.layout is None:
            raise LayoutError("this cache is not bound to a layout: call cache.bind(layout) first")
        return self.layout


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    memory: int | str = "1GiB",
    disk: int | str = "10GiB",
    policy: str = "lru",
    codec: str = "raw",
    namespace: bytes = b"",
    block_tokens: int = 0,
    observer: Observer | None = None,
) -> KVCache:
    """A cache in memory and, with ``path``, on disk.

    ``memory``, ``disk``: bytes, or a size such as ``"2GiB"``; 0 leaves the tier out. ``policy`` evicts from both,
    ``codec`` is that of the disk. ``namespace`` is a tenant's secret: other tenants cannot find its blocks.
    ``block_tokens`` 0 picks the layout's default. Raises :class:`ConfigError` on a wrong option,
    :class:`~kvkeep.errors.StoreError` if the directory cannot be used at all.
    """
    counters = Counters()
    told: Observer = counters if observer is None else Observers(counters, observer)
    memory_nbytes, disk_nbytes = parse_size(memory), parse_size(disk) if path is not None else 0
    if not memory_nbytes and not disk_nbytes:
        raise ConfigError("a cache without memory and without disk keeps nothing: give memory= or a path and disk=")
    make_policy = registry.lookup("policies", policy)
    store = MemoryStore(memory_nbytes or min(STAGING_NBYTES, disk_nbytes))
    raw = registry.lookup("codecs", "raw")()
    tiers = [
        Tier("memory", store, policy=make_policy(store.capacity), codec=raw, observer=told, trusted=True),
    ]
    directory = None
    if disk_nbytes and path is not None:
        directory = Path(path).expanduser()
        disk_codec = registry.lookup("codecs", codec)()
        slabs = DiskStore(directory, capacity=disk_nbytes)
        tiers.append(Tier("disk", slabs, policy=make_policy(disk_nbytes), codec=disk_codec, observer=told))
    # Half of memory at most waits to be written: the rest must stay evictable, or a save would find no room.
    tiered = TieredStore(tiers, codec=codec_named, observer=told, queue_nbytes=min((store.capacity or 0) // 2, 1 << 30))
    if memory_nbytes:
        tiered.start()
    cache = KVCache(
        tiered, counters=counters, observer=told, namespace=namespace, block_tokens=block_tokens, directory=directory
    )
    _at_exit.add(tiered)
    return cache


@memoize
def codec_named(name: str) -> Codec:
    """The codec that a frame names. Raises :class:`CodecError` if nobody knows it."""
    try:
        codec: Codec = registry.lookup("codecs", name)()
    except ConfigError as error:  # unknown, or its library is not installed: a miss, not a failed request
        raise CodecError(f"a frame was written with codec {name!r}: {error}") from error
    return codec


def _describe(directory: Path, layout: KVLayout, description: str) -> None:
    """Note what a layout's fingerprint stands for, so that ``kvkeep stats`` can name it. No secrets: no namespace."""
    path = directory / MODELS_FILE
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    entry = {
        "description": description or f"{layout.num_layers} layers",
        "dtype": layout.dtype,
        "block_tokens": layout.block_tokens,
        "block_nbytes": layout.block_nbytes,
        "token_nbytes": layout.token_nbytes,
    }
    if not isinstance(known, dict) or known.get(layout.fingerprint.hex()) == entry:
        return
    known[layout.fingerprint.hex()] = entry
    temporary = path.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):  # only a label
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(path)


_at_exit: weakref.WeakSet[TieredStore] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    for store in list(_at_exit):
        store.close(timeout=30)
