"""Several tiers as one: fastest first, inclusive.

A save goes to the first tier at once and to the others by write-behind (:mod:`~kvkeep.writing`). One that meets a full
queue waits for it as long as its caller allows; then the write is dropped and counted. A block that was found below is
copied up in the same thread. Beside it there are a few that read ahead of a load.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from kvkeep import frame
from kvkeep.buffers import nbytes_of
from kvkeep.crypt import Cipher
from kvkeep.errors import CodecError, FrameError, StoreError
from kvkeep.events import Observer
from kvkeep.framing import CodecLookup, Framing, Write
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access
from kvkeep.stores.base import Item, Store
from kvkeep.tier import Tier
from kvkeep.writing import Writer

BATCH_NBYTES = 8 << 20
"""Bytes read at once: enough for the disk, few enough to be copied on from the processor's cache."""

READERS = 4
"""Loads from below memory that can be read ahead at once; each reads one batch ahead of what it hands out."""

OPENERS = min(4, os.cpu_count() or 1)
"""Threads that decrypt and decode the blocks of loads."""

WORTH_DECODING = 0.75
"""A value that its codec makes no smaller than this is kept as it is: decoding would cost more than its bytes do."""


class _Span(NamedTuple):
    """Neighbouring blocks in one tier, read together."""

    start: int
    end: int
    tier: Tier


class _Reading:
    """The values of some blocks, on their way: a context as :meth:`Store.read` is, entered by one of ``readers``.

    ``then``: the keys that will be read next.
    """

    def __init__(
        self, store: Store, keys: Sequence[BlockKey], then: Sequence[BlockKey], readers: Executor | None
    ) -> None:
        self._store, self._then = store, then
        self._context = store.read(keys)
        self._future = None
        if readers is not None:
            with suppress(RuntimeError):  # closed meanwhile: the store itself will say so
                self._future = readers.submit(self._enter)

    def _enter(self) -> list[memoryview | None]:
        if self._then:
            self._store.prefetch(self._then)
        return self._context.__enter__()

    def __enter__(self) -> list[memoryview | None]:
        return self._enter() if self._future is None else self._future.result()

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    def discard(self) -> None:
        """Nobody wants them any more."""
        if self._future is not None:
            with suppress(StoreError), self:
                pass


def _spans(places: Sequence[Tier], most: int) -> Iterator[_Span]:
    """Cut a prefix into spans of at most ``most`` blocks; the first ones are short, so that copying starts early."""
    start, size = 0, max(1, most // 8)
    while start < len(places):
        end = start + 1
        while end < len(places) and end - start < size and places[end] is places[start]:
            end += 1
        yield _Span(start, end, places[start])
        start, size = end, min(2 * size, most)


class TieredStore:
    """``tiers`` fastest first; ``queue_nbytes`` bounds the write-behind. With a ``cipher``, every tier that is not
    trusted holds encrypted frames, and no others are believed there."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        codec: CodecLookup,
        observer: Observer,
        queue_nbytes: int = 512 << 20,
        cipher: Cipher | None = None,
    ) -> None:
        self.tiers = list(tiers)
        self.cipher = cipher
        self._observer = observer
        self._framing = Framing(codec, cipher)
        self.writer = Writer(self.tiers, self._framing, observer, queue_nbytes)
        self._closed = False
        self._start()
        _open.add(self)

    def _start(self) -> None:
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kvkeep-read")  # makes threads when needed
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="kvkeep-open")

    def locate(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """The tier of each block of the longest prefix of ``keys`` that is there. One question a tier."""
        places: list[Tier | None] = [None] * len(keys)
        missing = list(range(len(keys)))
        for tier in self.tiers:
            if not missing:
                break
            for at, there in zip(missing, tier.contains_many([keys[at] for at in missing]), strict=True):
                if there:
                    places[at] = tier
            missing = [at for at in missing if places[at] is None]
        prefix: list[Tier] = []
        for place in places:
            if place is None:
                break
            prefix.append(place)
        return prefix

    def blocks(
        self, keys: Sequence[BlockKey], places: Sequence[Tier], layout: KVLayout
    ) -> Iterator[tuple[int, memoryview]]:
        """Index and decoded payload of each block in order, up to the first lost one. Views die at the next step."""
        spans = deque(_spans(places, max(1, BATCH_NBYTES // layout.block_nbytes)))
        with self.writer.loading():
            yield from self._read(spans, keys, layout)

    def _read(
        self, spans: deque[_Span], keys: Sequence[BlockKey], layout: KVLayout
    ) -> Iterator[tuple[int, memoryview]]:
        ahead: _Reading | None = None
        try:
            while spans:
                span = spans.popleft()
                reading = ahead or self._reading(keys, span)
                # While these blocks are decoded and copied, the next ones are read.
                ahead = self._reading(keys, *list(spans)[:2]) if spans else None
                done = yield from self._batch(span, keys, reading, layout)
                if done == span.end:
                    continue
                found = done
                other = self._elsewhere(keys[done], span.tier)
                if other is not None:
                    again = _Span(done, done + 1, other)
                    found = yield from self._batch(again, keys, self._reading(keys, again), layout)
                if found == done:
                    self._observer.event("lost", len(keys) - done, cause="gone")
                    return
                if ahead is not None:
                    ahead.discard()
                    ahead = None
                if found < span.end:
                    spans.appendleft(_Span(found, span.end, span.tier))
        finally:
            if ahead is not None:
                ahead.discard()

    def read_one(self, key: BlockKey, tier: Tier, layout: KVLayout) -> memoryview | None:
        """One block's payload, in memory that is the caller's; None if it is not there any more.
        :meth:`blocks` without what it does for many, which costs as much as copying a megabyte."""
        nbytes = layout.block_nbytes
        frame_of_it = _fresh(frame.HEADER_NBYTES + nbytes + nbytes // 64 + 1024)  # no codec makes it any larger
        try:
            got = tier.store.get_into(key, frame_of_it)
            if got is None:
                return None
            header, payload = self._framing.parse(key, frame_of_it[:got], tier, layout)
            as_it_is = header.codec == "raw" and not header.encrypted
            room = payload if as_it_is else _fresh(nbytes)
            payload = self._framing.open(header, frame_of_it[:got], payload, layout, room)
            self._observer.event("load", nbytes=nbytes, tier=tier.name)
            return payload
        except FrameError as error:
            tier.refuse(key, error)
        except StoreError as error:
            tier.breakers.medium.failed("a read", error)
        except ValueError:
            tier.refuse(key, FrameError("long", "more bytes than a frame of this layout can have"))
        return None

    def _reading(self, keys: Sequence[BlockKey], span: _Span, then: _Span | None = None) -> _Reading:
        hint = keys[then.start : then.end] if then is not None and then.tier is span.tier else ()
        readers = None if span.tier.trusted else self._readers
        return _Reading(span.tier.store, keys[span.start : span.end], hint, readers)

    def _batch(
        self, span: _Span, keys: Sequence[BlockKey], reading: _Reading, layout: KVLayout
    ) -> Generator[tuple[int, memoryview], None, int]:
        """Yields blocks; returns the index after the last good one."""
        at, tier = span.start, span.tier
        try:
            with reading as values, closing(self._payloads(span, keys, values, layout)) as payloads:
                try:
                    for payload in payloads:
                        yield at, payload
                        at += 1
                except FrameError as error:
                    tier.refuse(keys[at], error)
        except StoreError as error:
            tier.breakers.medium.failed("a read", error)
        finally:
            nbytes = (at - span.start) * layout.block_nbytes
            self._observer.event("load", at - span.start, nbytes=nbytes, tier=tier.name)
        return at

    def _payloads(
        self, span: _Span, keys: Sequence[BlockKey], values: Sequence[memoryview | None], layout: KVLayout
    ) -> Generator[memoryview, None, None]:
        """What the frames of a span hold, up to the first that is missing. Raises :class:`FrameError`.

        Decrypting and decoding take longer than reading, so a few blocks are opened ahead by as many threads.
        """
        frames: list[tuple[BlockKey, memoryview]] = []
        for at, value in enumerate(values, span.start):
            if value is None:
                break
            frames.append((keys[at], value))
        costly = not span.tier.trusted and (self.cipher is not None or span.tier.codec.name != "raw")
        openers = min(OPENERS, len(frames)) if costly else 0
        with ExitStack() as stack:
            # One room more than are being filled: the block that was handed out last is still being copied.
            rooms = [stack.enter_context(self._framing.pool.borrow(layout.block_nbytes)) for _ in range(openers + 1)]
            work = [
                partial(self._open, key, value, span.tier, layout, rooms[at % len(rooms)])
                for at, (key, value) in enumerate(frames)
            ]
            if openers < 2:
                for open_frame in work:
                    yield open_frame()
                return
            opening: deque[Future[memoryview]] = deque()
            try:
                for at in range(len(work)):
                    with suppress(RuntimeError):  # closed meanwhile
                        while len(opening) < openers and at + len(opening) < len(work):
                            opening.append(self._openers.submit(work[at + len(opening)]))
                    yield opening.popleft().result() if opening else work[at]()
            finally:
                wait(opening)  # they use the rooms, and what was read

    def _open(self, key: BlockKey, value: memoryview, tier: Tier, layout: KVLayout, room: memoryview) -> memoryview:
        header, payload = self._framing.parse(key, value, tier, layout)
        return self._framing.open(header, value, payload, layout, room)

    def _elsewhere(self, key: BlockKey, tier: Tier) -> Tier | None:
        others = (other for other in self.tiers if other is not tier)
        return next((other for other in others if other.contains_many([key])[0]), None)

    def touch(
        self, keys: Sequence[BlockKey], places: Sequence[Tier], layout: KVLayout, accesses: Sequence[Access]
    ) -> None:
        """A request uses these blocks. What a tier's write rule passed over when it was new may be wanted now, and so
        may what passed the tier by while it was out of order."""
        by_tier: dict[int, list[tuple[BlockKey, Access]]] = {id(tier): [] for tier in self.tiers}
        for key, place, access in zip(keys, places, accesses, strict=True):
            by_tier[id(place)].append((key, access))
        first = self.tiers[0]
        for tier in self.tiers:
            tier.touch(by_tier[id(tier)])
            tier.seen(keys, accesses)
            above = by_tier[id(first)]
            for key, access in above if tier.has_rule else tier.catch_up(above):
                if tier.wants_written(key, access) and not (tier.owned and tier.contains_many([key])[0]):
                    first.pin([key])
                    self.writer.enqueue(Write(key, layout, layout.block_nbytes, first, tier, access))

    def save(
        self, items: Sequence[Item], layout: KVLayout, accesses: Sequence[Access], *, deadline: float = 0.0
    ) -> int:
        """Put unsealed raw frames into the first tier and queue them for the others; how many were stored.

        The first tier takes everything if there are others: it is their writes' waiting room. ``deadline``, on the
        monotonic clock, ends the wait for room in the queue.
        """
        first, lower = self.tiers[0], self.tiers[1:]
        self.writer.await_room(len(items) * layout.block_nbytes * len(lower), deadline)
        for tier in self.tiers:
            tier.seen([key for key, _ in items], accesses)
        if not lower:
            asked, tenant = zip(items, accesses, strict=True), layout.identity.tenant
            wanted = list(takewhile(lambda one: first.admits(one[0][0], nbytes_of(one[0][1]), one[1], tenant), asked))
            items = [item for item, _ in wanted]
        if first.codec.name != "raw":
            items = [
                (key, self._framing.make(key, parts[1], layout, first.codec, access))
                for (key, parts), access in zip(items, accesses, strict=False)
            ]
        stored = first.put_many(items, accesses, pin=bool(lower))
        if lower:
            keys = [key for key, _ in items[:stored]]
            for tier in lower:
                # A server is asked in the background: the request does not wait for it.
                there = tier.contains_many(keys) if tier.owned else [False] * len(keys)
                for key, access, known in zip(keys, accesses, there, strict=False):
                    if known:
                        continue
                    if tier.wants_written(key, access):
                        first.pin([key])
                        self.writer.enqueue(Write(key, layout, layout.block_nbytes, first, tier, access))
            first.unpin(keys)
        return stored

    def save_now(self, key: BlockKey, payload: memoryview, layout: KVLayout, access: Access) -> bool:
        """Put one payload into every tier before returning, whatever their rules; does any have it?"""
        head = frame.pack(key, layout.fingerprint, "raw", len(payload), len(payload), tenant=layout.identity.tenant)
        kept = False
        with self._framing.pool.borrow(frame.HEADER_NBYTES + len(payload)) as room, ExitStack() as rooms:
            room[: frame.HEADER_NBYTES] = head
            room[frame.HEADER_NBYTES :] = payload
            for tier in self.tiers:
                if tier.contains_many([key])[0]:
                    kept = True
                else:
                    write = Write(key, layout, len(payload), self.tiers[0], tier, access)
                    write.most = len(payload) * WORTH_DECODING
                    with suppress(FrameError, CodecError):  # a codec that cannot
                        kept |= tier.put_many([(key, self._framing.again(write, room, rooms))], [access]) > 0
        return kept

    def promote(
        self,
        keys: Sequence[BlockKey],
        places: Sequence[Tier],
        layout: KVLayout,
        accesses: Sequence[Access],
        *,
        after: float = 0.0,
    ) -> None:
        """Copy what lies below into the first tier, in the background, ``after`` seconds from now."""
        first = self.tiers[0]
        for key, tier, access in zip(keys, places, accesses, strict=False):
            if tier is not first:
                tier.pin([key])
                self.writer.enqueue(Write(key, layout, layout.block_nbytes, tier, first, access), after)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, timeout: float | None = 60.0) -> None:
        """Write the queue, stop the thread, close the stores."""
        if self._closed:
            return
        self._closed = True
        self.writer.close(timeout)
        self._readers.shutdown()
        self._openers.shutdown()
        for tier in self.tiers:
            tier.store.close()
        _open.discard(self)

    def after_fork(self) -> None:
        """In a forked child: no thread, no queue, stores opened anew."""
        for tier in self.tiers:
            with suppress(StoreError):  # that medium finds out again when it is used; the others must not suffer
                tier.after_fork()
        self.writer.reset()
        self._start()


def _fresh(nbytes: int) -> memoryview:
    """Memory that nobody has zeroed."""
    return np.empty(nbytes, np.uint8).data


_open: weakref.WeakSet[TieredStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_open):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)
