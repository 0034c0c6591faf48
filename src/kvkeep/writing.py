"""Write-behind: a queue of blocks on their way between tiers, bounded in bytes, and the thread that writes them.

A block is pinned where it comes from until it is written. The thread also does the housekeeping of the tiers: probes,
expiry, touching memory ahead of its use.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvkeep.errors import CodecError, FrameError, KVKeepError, StoreError
from kvkeep.events import Observer
from kvkeep.framing import Framing, Write
from kvkeep.policies.base import Access
from kvkeep.stores.base import Item
from kvkeep.tier import Tier

BATCH_NBYTES = 8 << 20
"""Bytes written at once."""

IDLE_SECONDS = 1.0

SOON_SECONDS = 0.02
"""Between two rounds of housekeeping while a store has more to do, or a load is under way that it would be in the way
of: touching fresh memory takes a core."""


class Writer:
    """``queue_nbytes`` bounds what waits."""

    def __init__(self, tiers: Sequence[Tier], framing: Framing, observer: Observer, queue_nbytes: int) -> None:
        self.queue_nbytes = queue_nbytes
        self.upkeep: list[Callable[[], None]] = []  # called about once a second, with the tiers' own housekeeping
        self._tiers = tiers
        self._framing = framing
        self._observer = observer
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """An empty queue and no thread: at first, and in a forked child."""
        for tier in self._tiers:
            tier.breakers.watch(self.start)
        self._maintain_at = self._maintain_by = self._round_at = 0.0
        self._busy: list[Tier] = []  # those that have more housekeeping to do
        self._loads = 0  # under way
        self._queue: deque[Write] = deque()
        self._later: deque[tuple[float, Write]] = deque()  # not before that time, unless somebody waits for the queue
        self._hurry = 0
        self._queued = 0  # bytes of both, and of what is being written
        self._writing = False
        self._batches = 0  # that left the queue
        self._stuck = False  # somebody waited for room in vain, and none has left since
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    # The thread

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

    def close(self, timeout: float | None) -> None:
        """Write the queue, stop the thread."""
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

    # The queue

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

    def await_room(self, nbytes: int, deadline: float) -> None:
        """Wait until the queue has room for ``nbytes``, at most until ``deadline`` on the monotonic clock. A medium
        that hangs costs one wait, not one for each save."""

        def room() -> bool:
            return self._closed or not self._queued or self._queued + nbytes <= self.queue_nbytes

        with self._hurrying():
            seconds, before = deadline - time.monotonic(), self._batches
            if room() or self._stuck or seconds <= 0:
                return
            self._stuck = not self._wake.wait_for(room, seconds) and self._batches == before

    def enqueue(self, write: Write, after: float = 0.0) -> None:
        """Take over ``write``, whose block is pinned, to be done ``after`` seconds from now at the earliest. Where
        there is no room it is dropped."""
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

    # What the thread does

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While somebody loads, housekeeping waits."""
        with self._wake:
            self._loads += 1
        try:
            yield
        finally:
            with self._wake:
                self._loads = max(0, self._loads - 1)  # a fork forgot them

    def step(self) -> bool:
        """Write the next few blocks, or wait until it is time for the housekeeping; False once closed."""
        with self._wake:
            if not self._take_due() and not self._closed:
                due = min(self._later[0][0], self._maintain_at) if self._later else self._maintain_at
                self._wake.wait(max(0.0, due - time.monotonic()))
                self._take_due()
            batch: list[Write] = []
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
        self._busy = [tier for tier in (self._tiers if whole else self._busy) if tier.maintain()]
        if whole:
            for work in self.upkeep:
                work()
            self._round_at = time.monotonic() + IDLE_SECONDS
        self._maintain_at = time.monotonic() + SOON_SECONDS if self._busy else self._round_at
        self._maintain_by = self._maintain_at + 2 * IDLE_SECONDS

    def _write(self, batch: list[Write]) -> None:
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
                        items.append((write.key, self._framing.again(write, value, rooms)))
                    except FrameError as error:
                        source.refuse(write.key, error)
                        continue
                    except CodecError:
                        self._observer.event("dropped", nbytes=write.nbytes, tier=target.name, cause="codec")
                        continue
                    accesses.append(write.access)
                stored = target.put_many(items, accesses)
        except StoreError as error:
            source.breakers.medium.failed("a read", error)
            return
        if target is self._tiers[0]:
            self._observer.event("promote", stored, tier=target.name)


def _run(reference: weakref.ref[Writer]) -> None:
    """The thread. It holds the writer only while it works, so that a forgotten cache is collected."""
    while True:
        writer = reference()
        if writer is None:
            return
        going = False
        try:
            going = writer.step()
        except KVKeepError:  # pragma: no cover  # every medium's fault is caught where it happens
            time.sleep(IDLE_SECONDS)
            going = True
        finally:
            if not going:
                writer.ended()
        if not going:
            return
        del writer
