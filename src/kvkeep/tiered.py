"""Several tiers as one: fastest first, inclusive.

A save goes to the first tier at once and to the others by write-behind: a queue of keys, bounded in bytes, whose
blocks are pinned in the first tier until they are written. A save that meets a full queue waits for it as long as its
caller allows; then the write is dropped and counted. A block that was found below is copied up in the same thread.
Beside it there are a few that read ahead of a load.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from kvkeep import frame
from kvkeep.buffers import Buffer, BufferPool, nbytes_of
from kvkeep.codecs.base import Codec
from kvkeep.crypt import Cipher
from kvkeep.errors import CodecError, FrameError, KVKeepError, StoreError
from kvkeep.events import Observer
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access
from kvkeep.stores.base import Item, Store
from kvkeep.tier import Tier

BATCH_NBYTES = 8 << 20
"""Bytes read at once: enough for the disk, few enough to be copied on from the processor's cache."""

IDLE_SECONDS = 1.0

SOON_SECONDS = 0.02
"""Between two rounds of housekeeping while a store has more to do, or a load is under way that it would be in the way
of: touching fresh memory takes a core."""

READERS = 4
"""Loads from below memory that can be read ahead at once; each reads one batch ahead of what it hands out."""

OPENERS = min(4, os.cpu_count() or 1)
"""Threads that decrypt and decode the blocks of loads."""

WORTH_DECODING = 0.75
"""A value that its codec makes no smaller than this is kept as it is: decoding would cost more than its bytes do."""

CodecLookup = Callable[[str], Codec]


class _Write:
    """One block on its way to tier ``target`` from tier ``source``, where it is pinned."""

    __slots__ = ("access", "key", "layout", "most", "nbytes", "source", "target", "tenant")

    def __init__(
        self, key: BlockKey, layout: KVLayout, nbytes: int, source: Tier, target: Tier, access: Access
    ) -> None:
        self.key, self.layout, self.nbytes = key, layout, nbytes
        self.source, self.target, self.access = source, target, access
        self.tenant = layout.identity.tenant
        self.most: float = math.inf  # bytes above which it is stored as it is, not encoded


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
        self.upkeep: list[Callable[[], None]] = []  # called about once a second, with the tiers' own housekeeping
        self._codec = codec
        self._observer = observer
        self.queue_nbytes = queue_nbytes
        self._closed = False
        self._start()
        _open.add(self)

    def _start(self) -> None:
        for tier in self.tiers:
            tier.breaker.on_open = tier.writing.on_open = self.start  # somebody has to probe it
        self._maintain_at = self._maintain_by = self._round_at = 0.0
        self._busy: list[Tier] = []  # those that have more housekeeping to do
        self._loads = 0  # under way
        self._pool = BufferPool()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kvkeep-read")  # makes threads when needed
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="kvkeep-open")
        self._queue: deque[_Write] = deque()
        self._later: deque[tuple[float, _Write]] = deque()  # not before that time, unless somebody waits for the queue
        self._hurry = 0
        self._queued = 0  # bytes of both, and of what is being written
        self._writing = False
        self._batches = 0  # that left the queue
        self._stuck = False  # somebody waited for room in vain, and none has left since
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

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
        ahead: _Reading | None = None
        with self._wake:
            self._loads += 1
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
            with self._wake:
                self._loads = max(0, self._loads - 1)  # a fork forgot them
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
            header, payload = self._parse(key, frame_of_it[:got], tier, layout)
            if header.encrypted or header.codec != "raw":
                payload = self._opened(header, frame_of_it[:got], payload, layout, _fresh(nbytes))
            elif len(payload) != nbytes:
                raise FrameError("size", "a raw payload that is not a block's size")
            self._observer.event("load", nbytes=nbytes, tier=tier.name)
            return payload
        except FrameError as error:
            self._refuse(key, tier, error)
        except StoreError as error:
            tier.breaker.failed("a read", error)
        except ValueError:
            self._refuse(key, tier, FrameError("long", "more bytes than a frame of this layout can have"))
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
                    self._refuse(keys[at], tier, error)
        except StoreError as error:
            tier.breaker.failed("a read", error)
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
            rooms = [stack.enter_context(self._pool.borrow(layout.block_nbytes)) for _ in range(openers + 1)]
            work = [
                partial(self._open_frame, key, value, span.tier, layout, rooms[at % len(rooms)])
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

    def _open_frame(
        self, key: BlockKey, value: memoryview, tier: Tier, layout: KVLayout, room: memoryview
    ) -> memoryview:
        header, payload = self._parse(key, value, tier, layout)
        return self._opened(header, value, payload, layout, room)

    def _opened(
        self, header: frame.Header, value: memoryview, payload: memoryview, layout: KVLayout, room: memoryview
    ) -> memoryview:
        raw = header.codec == "raw"
        if header.encrypted and self.cipher is not None:
            if raw:
                self.cipher.decrypt(value, layout.identity.namespace, room)
                return room
            with self._pool.borrow(len(payload) - frame.TAG_NBYTES) as plain:
                self.cipher.decrypt(value, layout.identity.namespace, plain)
                self._decode(header.codec, plain, layout, room)
            return room
        if raw:
            if len(payload) != layout.block_nbytes:
                raise FrameError("size", "a raw payload that is not a block's size")
            return payload
        self._decode(header.codec, payload, layout, room)
        return room

    def _parse(self, key: BlockKey, value: memoryview, tier: Tier, layout: KVLayout) -> tuple[frame.Header, memoryview]:
        """Header and payload of a frame that is ``key``'s; sealed, or else still to be decrypted."""
        encrypted = self.cipher is not None and not tier.trusted
        header, payload = frame.parse(value) if encrypted or tier.trusted else frame.verify(value)
        frame.check(header, key, layout.fingerprint, layout.block_nbytes)
        if encrypted and not header.encrypted:
            raise FrameError("plain", f"block {key.hex()[:16]} is not encrypted")
        return header, payload

    def _decode(self, codec: str, payload: memoryview, layout: KVLayout, room: memoryview) -> None:
        decoder = self._codec_of(codec)
        try:
            decoder.decode(payload, layout, room)
        except CodecError as error:
            raise FrameError("codec", str(error)) from error

    def _codec_of(self, name: str) -> Codec:
        try:
            return self._codec(name)
        except (CodecError, KeyError) as error:
            raise FrameError("unknown", str(error)) from error

    def _refuse(self, key: BlockKey, tier: Tier, error: FrameError) -> None:
        """A frame that is not what it should be is deleted; one that vanished meanwhile was merely overwritten, and
        one that others may be able to read is left to them."""
        if error.cause == "locked" or (error.cause in ("unknown", "version") and not tier.owned):
            tier.hide(key, str(error))
            self._observer.event("lost", tier=tier.name, cause=error.cause)
            return
        mine = tier.delete(key)
        self._observer.event(
            "corrupt" if mine else "lost", tier=tier.name, cause=error.cause if mine else "overwritten"
        )

    def _elsewhere(self, key: BlockKey, tier: Tier) -> Tier | None:
        others = (other for other in self.tiers if other is not tier)
        return next((other for other in others if other.contains_many([key])[0]), None)

    def touch(
        self, keys: Sequence[BlockKey], places: Sequence[Tier], layout: KVLayout, accesses: Sequence[Access]
    ) -> None:
        """A request uses these blocks. What a tier's write rule passed over when it was new may be wanted now."""
        by_tier: dict[int, list[tuple[BlockKey, Access]]] = {id(tier): [] for tier in self.tiers}
        for key, place, access in zip(keys, places, accesses, strict=True):
            by_tier[id(place)].append((key, access))
        first = self.tiers[0]
        for tier in self.tiers:
            tier.touch(by_tier[id(tier)])
            tier.seen(keys, accesses)
            if tier.has_rule:
                for key, access in by_tier[id(first)]:
                    if tier.wants_written(key, access) and not (tier.owned and tier.contains_many([key])[0]):
                        first.pin([key])
                        self._enqueue(_Write(key, layout, layout.block_nbytes, first, tier, access))

    def save(
        self, items: Sequence[Item], layout: KVLayout, accesses: Sequence[Access], *, deadline: float = 0.0
    ) -> int:
        """Put unsealed raw frames into the first tier and queue them for the others; how many were stored.

        The first tier takes everything if there are others: it is their writes' waiting room. ``deadline``, on the
        monotonic clock, ends the wait for room in the queue.
        """
        first, lower = self.tiers[0], self.tiers[1:]
        self._await_room(len(items) * layout.block_nbytes * len(lower), deadline)
        for tier in self.tiers:
            tier.seen([key for key, _ in items], accesses)
        if not lower:
            asked, tenant = zip(items, accesses, strict=True), layout.identity.tenant
            wanted = list(takewhile(lambda one: first.admits(one[0][0], nbytes_of(one[0][1]), one[1], tenant), asked))
            items = [item for item, _ in wanted]
        if first.codec.name != "raw":
            items = [
                (key, self._encode(key, parts[1], layout, first.codec, access))
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
                        self._enqueue(_Write(key, layout, layout.block_nbytes, first, tier, access))
            first.unpin(keys)
        return stored

    def save_now(self, key: BlockKey, payload: memoryview, layout: KVLayout, access: Access) -> bool:
        """Put one payload into every tier before returning, whatever their rules; does any have it?"""
        head = frame.pack(key, layout.fingerprint, "raw", len(payload), len(payload), tenant=layout.identity.tenant)
        kept = False
        with self._pool.borrow(frame.HEADER_NBYTES + len(payload)) as room, ExitStack() as rooms:
            room[: frame.HEADER_NBYTES] = head
            room[frame.HEADER_NBYTES :] = payload
            for tier in self.tiers:
                if tier.contains_many([key])[0]:
                    kept = True
                else:
                    write = _Write(key, layout, len(payload), self.tiers[0], tier, access)
                    write.most = len(payload) * WORTH_DECODING
                    with suppress(FrameError, CodecError):  # a codec that cannot
                        kept |= tier.put_many([(key, self._reframe(write, room, rooms))], [access]) > 0
        return kept

    def _encode(self, key: BlockKey, payload: Buffer, layout: KVLayout, codec: Codec, access: Access) -> list[Buffer]:
        """An unsealed frame in ``codec``."""
        stored = _encoded(codec, payload, layout, access)
        size, tenant = memoryview(stored).nbytes, layout.identity.tenant
        head = frame.pack(key, layout.fingerprint, codec.name, size, layout.block_nbytes, tenant=tenant)
        return [bytes(head), stored]

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
                self._enqueue(_Write(key, layout, layout.block_nbytes, tier, first, access), after)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the queue is written; was it, in time?"""
        with self._hurrying():
            return self._wake.wait_for(lambda: not (self._queue or self._later or self._writing), timeout)

    @contextmanager
    def _hurrying(self) -> Iterator[None]:
        """Under the lock: somebody waits, so nothing is put off."""
        with self._wake:
            self._hurry += 1
            self._wake.notify_all()
            try:
                yield
            finally:
                self._hurry -= 1

    def close(self, timeout: float | None = 60.0) -> None:
        """Write the queue, stop the thread, close the stores."""
        if self._closed:
            return
        with self._wake:
            unread = [write for _, write in self._later]  # nobody will read them from the first tier
            self._later.clear()
            self._queued -= sum(write.nbytes for write in unread)
        for write in unread:
            write.source.unpin([write.key])
        if self._thread is not None:
            self.flush(timeout)
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
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
        self._start()

    def start(self) -> None:
        """Start the thread, which also touches memory ahead of its use."""
        with self._wake:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="kvkeep", daemon=True)
                self._thread.start()

    def ended(self) -> None:
        """The thread ended, perhaps by an error that nobody foresaw: another one takes over what is queued."""
        with self._wake:
            self._thread = None
            again = bool(self._queue or self._later) and not self._closed
        if again:
            self.start()

    def _await_room(self, nbytes: int, deadline: float) -> None:
        """Wait until the queue has room for ``nbytes``. A medium that hangs costs one wait, not one for each save."""

        def room() -> bool:
            return self._closed or not self._queued or self._queued + nbytes <= self.queue_nbytes

        with self._hurrying():
            seconds, before = deadline - time.monotonic(), self._batches
            if room() or self._stuck or seconds <= 0:
                return
            self._stuck = not self._wake.wait_for(room, seconds) and self._batches == before

    def _enqueue(self, write: _Write, after: float = 0.0) -> None:
        self.start()
        with self._wake:
            # A block that is larger than all of the queue may still wait there alone.
            if self._closed or (self._queued and self._queued + write.nbytes > self.queue_nbytes):
                full = True
            else:
                full = False
                if after:
                    self._later.append((time.monotonic() + after, write))
                else:
                    self._queue.append(write)
                self._queued += write.nbytes
                self._wake.notify_all()
        if full:
            write.source.unpin([write.key])
            self._observer.event("dropped", nbytes=write.nbytes, tier=write.target.name, cause="queue full")

    def _take_due(self) -> bool:
        """Put what need not wait any longer into the queue; is there anything in it?"""
        now = time.monotonic()
        while self._later and (self._hurry or self._later[0][0] <= now):
            self._queue.append(self._later.popleft()[1])
        return bool(self._queue)

    def step(self) -> bool:
        """Write the next few blocks, or wait until it is time for the housekeeping; False once closed."""
        with self._wake:
            if not self._take_due() and not self._closed:
                due = min(self._later[0][0], self._maintain_at) if self._later else self._maintain_at
                self._wake.wait(max(0.0, due - time.monotonic()))
                self._take_due()
            batch: list[_Write] = []
            while self._queue and sum(write.nbytes for write in batch) < BATCH_NBYTES:
                if batch and (self._queue[0].source, self._queue[0].target) != (batch[0].source, batch[0].target):
                    break
                batch.append(self._queue.popleft())
            self._writing = bool(batch)
        if batch:
            tried = False
            try:
                self._write(batch)
                tried = True
            finally:
                if not tried:
                    self._observer.event("dropped", len(batch), tier=batch[0].target.name, cause="error")
                batch[0].source.unpin([write.key for write in batch])
                with self._wake:
                    self._queued -= sum(write.nbytes for write in batch)
                    self._writing = self._stuck = False
                    self._batches += 1
                    self._wake.notify_all()
        self._keep_house()
        return not self._closed

    def _keep_house(self) -> None:
        now = time.monotonic()
        if now < self._maintain_at:
            return
        if self._loads and now < self._maintain_by:
            self._maintain_at = now + SOON_SECONDS
            return
        whole = now >= self._round_at
        self._busy = [tier for tier in (self.tiers if whole else self._busy) if tier.maintain()]
        if whole:
            for work in self.upkeep:
                work()
            self._round_at = time.monotonic() + IDLE_SECONDS
        self._maintain_at = time.monotonic() + SOON_SECONDS if self._busy else self._round_at
        self._maintain_by = self._maintain_at + 2 * IDLE_SECONDS

    def _write(self, batch: list[_Write]) -> None:
        source, target = batch[0].source, batch[0].target
        known = target.contains_many([write.key for write in batch])
        new = [write for write, there in zip(batch, known, strict=True) if not there]
        batch = [write for write in new if target.admits(write.key, write.nbytes, write.access, write.tenant)]
        if len(batch) < len(new):
            self._observer.event("dropped", len(new) - len(batch), tier=target.name, cause="not worth it")
        if not batch:
            return
        try:
            with source.store.read([write.key for write in batch]) as values, ExitStack() as rooms:
                items: list[Item] = []
                accesses: list[Access] = []
                for write, value in zip(batch, values, strict=True):
                    if value is None:
                        continue
                    try:
                        items.append((write.key, self._reframe(write, value, rooms)))
                    except FrameError as error:
                        self._refuse(write.key, source, error)
                        continue
                    except CodecError:
                        self._observer.event("dropped", nbytes=write.nbytes, tier=target.name, cause="codec")
                        continue
                    accesses.append(write.access)
                stored = target.put_many(items, accesses)
        except StoreError as error:
            source.breaker.failed("a read", error)
            return
        if target is self.tiers[0]:
            self._observer.event("promote", stored, tier=target.name)

    def _reframe(self, write: _Write, value: memoryview, rooms: ExitStack) -> list[Buffer]:
        """The frame in the target's codec. What was decoded from a lossy codec is never encoded again. What is
        returned may lie in buffers that ``rooms`` holds. Raises :class:`FrameError` for the frame that is there,
        :class:`CodecError` where the target's codec cannot encode it."""
        layout, target = write.layout, write.target
        header, payload = self._parse(write.key, value, write.source, layout)
        if header.encrypted and self.cipher is not None:
            plain = rooms.enter_context(self._pool.borrow(len(payload) - frame.TAG_NBYTES))
            self.cipher.decrypt(value, layout.identity.namespace, plain)
            payload = plain
        stored: Buffer = payload
        codec = header.codec
        if codec != target.codec.name and (codec == "raw" or self._codec_of(codec).lossless):
            if codec != "raw":
                room = rooms.enter_context(self._pool.borrow(layout.block_nbytes))
                self._decode(codec, payload, layout, room)
                stored = room
            encoded = _encoded(target.codec, stored, layout, write.access)
            small = memoryview(encoded).nbytes <= write.most
            stored, codec = (encoded, target.codec.name) if small else (stored, "raw")
        size = memoryview(stored).nbytes
        if self.cipher is not None and not target.trusted:
            sealed = rooms.enter_context(self._pool.borrow(size + frame.TAG_NBYTES))
            return [self.cipher.encrypt(write.key, layout, codec, stored, sealed), sealed]
        head = frame.pack(write.key, layout.fingerprint, codec, size, layout.block_nbytes, tenant=header.tenant)
        if not target.trusted:
            frame.seal(head, stored)
        return [bytes(head), stored]


def _fresh(nbytes: int) -> memoryview:
    """Memory that nobody has zeroed."""
    return np.empty(nbytes, np.uint8).data


def _encoded(codec: Codec, payload: Buffer, layout: KVLayout, access: Access) -> Buffer:
    return (codec.encode if access.position else codec.encode_first)(payload, layout)


_open: weakref.WeakSet[TieredStore] = weakref.WeakSet()


def _run(reference: weakref.ref[TieredStore]) -> None:
    """The thread. It holds the store only while it works, so that a forgotten cache is collected."""
    while True:
        store = reference()
        if store is None:
            return
        going = False
        try:
            going = store.step()
        except KVKeepError:  # pragma: no cover  # every medium's fault is caught where it happens
            time.sleep(IDLE_SECONDS)
            going = True
        finally:
            if not going:
                store.ended()
        if not going:
            return
        del store


def _after_fork() -> None:
    for store in list(_open):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)
