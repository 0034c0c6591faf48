"""The façade: find the longest stored prefix of a prompt, load it, save what is new.

A cache never fails a request. Whatever a medium does, ``match`` finds less, ``load`` loads less, ``save`` keeps less,
and a counter says why. Only arguments that do not fit raise (:class:`~kvkeep.errors.LayoutError`).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvkeep import frame, labels, quality
from kvkeep.buffers import BufferPool
from kvkeep.errors import ConfigError, LayoutError
from kvkeep.events import Counters, Observer
from kvkeep.keys import BlockKey, Extra, KeyChain, Tokens
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access
from kvkeep.stores.base import Item
from kvkeep.tier import Tier
from kvkeep.tiered import BATCH_NBYTES, TieredStore
from kvkeep.values import open_values, report
from kvkeep.values.face import ValueFace, ValueStats

if TYPE_CHECKING:
    from kvkeep.trace.recording import Recorder
    from kvkeep.values.store import Values


SAVE_SECONDS = 3.0
"""That a save waits at most for writes before it, where the caller says nothing else."""

PROMOTE_AFTER_SECONDS = 1.0
"""After a load, until what it found below memory is copied there: the rest of the prompt is computed first."""


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
    """The longest cached prefix of a prompt, as of now. ``keys`` are those of its blocks, from number ``start`` on:
    an engine that has the first ones itself asks for the others, and says which block is ``before`` them."""

    keys: tuple[BlockKey, ...]
    places: tuple[Tier, ...]
    total_blocks: int
    block_tokens: int
    start: int = 0
    before: BlockKey | None = None

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
    values: ValueStats | None = None
    """None if nobody has asked for a value."""

    def to_frame(self) -> report.Frame:
        """One row for each event, tier and cause, with ``count`` and ``nbytes``; then what lies where: ``resident`` and
        ``capacity`` of each tier, and names, values and savings of the key-value face. Needs the extra ``pandas``."""
        lies: list[tuple[str, str, int, int]] = []
        for tier in self.tiers:
            lies += [("resident", tier.name, tier.blocks, tier.nbytes), ("capacity", tier.name, 0, tier.capacity or 0)]
        if self.values is not None:
            lies += [(f"values {what}", "", count, nbytes) for what, count, nbytes in self.values.rows()]
        rows = [
            {"event": what, "tier": tier, "cause": "", "count": count, "nbytes": nbytes}
            for what, tier, count, nbytes in lies
        ]
        return report.frame([*self.events, *rows])


class KVCache(ValueFace):
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
        trace: Recorder | None = None,
        max_kl: float | None = None,
    ) -> None:
        """``remote``: the server's address, for what is kept there beside blocks. ``trace``: what a request asks for
        is recorded there, in hashes."""
        self.store = store
        self.counters = counters
        self.namespace = namespace
        self.block_tokens = block_tokens
        self.directory = directory
        self.max_kl = max_kl
        self.layout: KVLayout | None = None
        self.shard = 0
        self.priority = 0
        self._observer = observer
        self._trace = trace
        self._pool = BufferPool()
        self._root: KVCache | None = None  # whose binding this is
        self._values: Values | None = None
        self._making = threading.Lock()

    def bind(self, layout: KVLayout, *, shard: int = 0, description: str = "", priority: int = 0) -> KVCache:
        """The same tiers for blocks of ``layout``; ``description`` is what ``kvkeep stats`` calls the model.

        Of what is saved through caches of different ``priority``, the lower goes first, whatever the policy. A cache
        of a ``namespace`` gives it to a layout that has none, and every cache says which lossy codecs its tiers have:
        whoever builds a layout need not think of either. Blocks that may be lossy thus have names of their own, under
        which only caches with the same lossy codecs find them. Raises :class:`ConfigError` for a layout of another
        namespace, and for a lossy codec that is measured to cost this model more than ``max_kl``.
        """
        given = layout.identity
        if self.namespace and given.namespace not in (b"", self.namespace):
            raise ConfigError("this layout's identity has another namespace than the cache that it is bound to")
        lossy = tuple(sorted({tier.codec.name for tier in self.store.tiers if not tier.codec.lossless}))
        identity = replace(given, namespace=self.namespace or given.namespace, lossy=lossy)
        if identity != given:
            layout = replace(layout, identity=identity)
        if self.max_kl is not None:
            quality.check(self.directory or quality.DEFAULT_DIR, identity, lossy, self.max_kl)
        if self.directory is not None:
            labels.note(self.directory, layout, description, self.store.cipher)
        bound = copy.copy(self)
        bound.layout, bound.shard, bound.priority = layout, shard, priority
        bound._root = self._root or self
        return bound

    def match(self, tokens: Tokens, *, extra: Iterable[Extra] = ()) -> Match:
        """The longest prefix of ``tokens`` in full blocks that is stored. No side effects but counters."""
        layout = self._bound()
        keys = self._keys(tokens, extra)
        places = self.store.locate(keys)
        hits = len(places)
        if self._trace is not None:
            self._trace.lookup(
                keys,
                num_tokens=len(tokens),
                hit_blocks=hits,
                block_tokens=layout.block_tokens,
                block_nbytes=layout.block_nbytes,
                now=time.time(),
            )
        self._observer.event("lookup")
        self._observer.event("hit_tokens", hits * layout.block_tokens)
        self._observer.event("miss_tokens", (len(keys) - hits) * layout.block_tokens)
        return Match(tuple(keys[:hits]), tuple(places), len(keys), layout.block_tokens)

    @contextmanager
    def lease(self, match: Match) -> Iterator[Lease]:
        """Pin the blocks of ``match`` until the ``with`` block ends, and tell the policies that they are used."""
        accesses = self._accesses(match)
        by_tier: dict[int, tuple[Tier, list[BlockKey]]] = {}
        for key, tier in zip(match.keys, match.places, strict=True):
            by_tier.setdefault(id(tier), (tier, []))[1].append(key)
        with ExitStack() as stack:
            for tier, keys in by_tier.values():
                tier.pin(keys)
                stack.callback(tier.unpin, keys)
                tier.store.prefetch(keys[: max(1, BATCH_NBYTES // self._bound().block_nbytes)])
            self.store.touch(match.keys, match.places, self._bound(), accesses)
            yield Lease(match)

    def load(self, lease: Lease, sink: KVSink) -> int:
        """Give the leased blocks to ``sink`` in order; how many tokens it got. A lost or damaged block ends it."""
        layout = self._bound()
        _needs(sink, "write", "ArraySink")
        match = lease.match
        done = 0
        for index, payload in self.store.blocks(match.keys, match.places, layout):
            sink.write(index, payload)
            done = index + 1
        if any(tier is not self.store.tiers[0] for tier in match.places[:done]):
            self.store.promote(
                match.keys[:done], match.places[:done], layout, self._accesses(match), after=PROMOTE_AFTER_SECONDS
            )
        return done * layout.block_tokens

    def _accesses(self, match: Match) -> list[Access]:
        """To the blocks of a match, now."""
        now, parents, hits = time.time(), (match.before, *match.keys), match.start + match.num_blocks
        return [
            Access(now, match.start + at, match.total_blocks, hits, parents[at], self.priority)
            for at in range(match.num_blocks)
        ]

    def save(
        self,
        tokens: Tokens,
        source: KVSource,
        *,
        start: int = 0,
        extra: Iterable[Extra] = (),
        patience: float = SAVE_SECONDS,
    ) -> int:
        """Keep the full blocks of ``tokens`` from token ``start`` on that are not stored yet; how many were taken.

        ``start`` is a multiple of ``block_tokens``: the first token that ``source`` can give. Returns once the bytes
        are copied out; the rest is write-behind. A prompt that does not fit into half of the memory tier is written
        while it is saved, which is waited for; after ``patience`` seconds what finds no room there is not written.
        """
        layout = self._bound()
        _needs(source, "read", "ArraySource")
        if start % layout.block_tokens:
            raise LayoutError(f"start {start} is no multiple of block_tokens {layout.block_tokens}")
        if not 0 <= start <= len(tokens):
            raise LayoutError(f"start {start} lies outside a prompt of {len(tokens)} tokens")
        keys = self._keys(tokens, extra)
        if self._trace is not None:
            self._trace.save(keys, block_tokens=layout.block_tokens, block_nbytes=layout.block_nbytes, now=time.time())
        first = start // layout.block_tokens
        parent = keys[first - 1] if first else None
        return self.save_keys(keys[first:], source, first=first, parent=parent, patience=patience)[0]

    def save_keys(
        self,
        keys: Sequence[BlockKey],
        source: KVSource,
        *,
        first: int = 0,
        parent: BlockKey | None = None,
        hits: int | None = None,
        total_blocks: int = 0,
        patience: float = 0.0,
    ) -> tuple[int, int]:
        """:meth:`save` for who has the keys: those of blocks ``first``, ``first + 1``, … of a prompt.

        ``parent``: the key of the block before. Who saves a prompt piece by piece says what the pieces are of: how many
        of its blocks were found when it came (``hits``), and how many it had then (``total_blocks``).

        Returns how many were taken, and how many of ``keys``, from the front, are kept now.
        """
        layout = self._bound()
        missing = [at for at, known in enumerate(self._stored(keys)) if not known]
        now = time.time()
        deadline = time.monotonic() + patience
        taken = 0
        room = self.store.writer.queue_nbytes if len(self.store.tiers) > 1 else BATCH_NBYTES
        batch = max(1, min(BATCH_NBYTES // 2, room) // layout.block_nbytes)
        if hits is None:
            hits = first + (missing[0] if missing else len(keys))
        total_blocks = max(total_blocks, first + len(keys))
        tenant = layout.identity.tenant
        for begin in range(0, len(missing), batch):
            indices = missing[begin : begin + batch]
            with self._pool.borrow(len(indices) * layout.block_nbytes) as payloads:
                items: list[Item] = []
                accesses = []
                for slot, at in enumerate(indices):
                    payload = payloads[slot * layout.block_nbytes : (slot + 1) * layout.block_nbytes]
                    source.read(first + at, payload)
                    head = frame.pack(keys[at], layout.fingerprint, "raw", len(payload), len(payload), tenant=tenant)
                    items.append((keys[at], [bytes(head), payload]))
                    before = keys[at - 1] if at else parent
                    accesses.append(Access(now, first + at, total_blocks, hits, before, self.priority))
                stored = self.store.save(items, layout, accesses, deadline=deadline)
            taken += stored
            if stored < len(indices):
                break  # no room: what would follow could not be found without what is missing
        self._observer.event("save", taken, nbytes=taken * layout.block_nbytes)
        return taken, missing[taken] if taken < len(missing) else len(keys)

    def pin(self, tokens: Tokens, *, extra: Iterable[Extra] = ()) -> None:
        """Evict no block of this prompt, stored already or later, until :meth:`unpin`. Pins count; they hold for this
        process's life and for what it owns: a server evicts by its own rules."""
        for tier in self.store.tiers:
            tier.pin(self._keys(tokens, extra))

    def unpin(self, tokens: Tokens, *, extra: Iterable[Extra] = ()) -> None:
        """Take one :meth:`pin` back."""
        for tier in self.store.tiers:
            tier.unpin(self._keys(tokens, extra))

    @contextmanager
    def claim(self, tokens: Tokens, *, wait: float = 0.0, extra: Iterable[Extra] = ()) -> Iterator[bool]:
        """Is what is missing of this prompt ours to compute and save? Of several that miss the same prefix at the same
        time one gets True, until the ``with`` block ends. The others wait for it, ``wait`` seconds at most; when the
        block begins with False, match again: load what is there and compute the rest.

        True among all who use the same directory or server. A holder that dies gives its claim up by that.
        """
        keys = self._keys(tokens, extra)
        with self.values.flight.prefix(keys, lambda: len(self.store.locate(keys)), wait) as mine:
            yield mine

    @property
    def values(self) -> Values:
        """What :meth:`set_value` and its like work on; made when it is asked for."""
        if self._root is not None:
            return self._root.values
        if self._values is not None:
            return self._values
        with self._making:
            if self._values is None:
                self._values = open_values(
                    self.store, namespace=self.namespace, observer=self._observer, directory=self.directory
                )
            return self._values

    def flush(self, timeout: float | None = None) -> bool:
        """Wait for the write-behind; was everything written within ``timeout`` seconds?"""
        return self.store.writer.flush(timeout)

    def close(self) -> None:
        """Flush and close. All caches bound from this one are closed with it. From then on all is a miss, and nothing
        is kept."""
        self.store.close()
        if self._trace is not None:
            self._trace.close()
        root = self._root or self
        if root._values is not None:
            root._values.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stats(self) -> Stats:
        tiers = tuple(TierStats(tier.name, *tier.usage, tier.store.capacity) for tier in self.store.tiers)
        made = (self._root or self)._values
        return Stats(tiers, tuple(self.counters.rows()), None if made is None else made.stats(self.counters))

    def _stored(self, keys: Sequence[BlockKey]) -> list[bool]:
        known = [False] * len(keys)
        for tier in self.store.tiers:
            if not tier.owned:
                continue  # a request does not wait for a server's answer to save
            known = [a or b for a, b in zip(known, tier.contains_many(keys), strict=True)]
        return known

    def _keys(self, tokens: Tokens, extra: Iterable[Extra]) -> list[BlockKey]:
        return KeyChain(self._bound(), shard=self.shard).extend(tokens, extra=extra)

    def _bound(self) -> KVLayout:
        if self.layout is None:
            raise LayoutError("this cache is not bound to a layout: call cache.bind(layout) first")
        return self.layout


def _needs(given: object, method: str, wrapper: str) -> None:
    """Arrays themselves are what a newcomer gives first."""
    if not hasattr(given, method):
        raise LayoutError(
            f"a {type(given).__name__} has no {method}(): give arrays as kvkeep.engines.base.{wrapper}(layout, arrays)"
        )
