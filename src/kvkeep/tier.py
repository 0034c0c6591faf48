"""A tier: a store, the codec of what lies in it, and the policy that keeps it within its room.

Lock order: a store may call :meth:`Tier.gained` and :meth:`Tier.lost` from inside its own lock, so the tier never
calls its store while it holds its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvkeep.codecs.base import Codec
from kvkeep.errors import StoreError, StoreFullError, ValueTooLargeError
from kvkeep.events import Observer
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.stores.base import Item, Store

log = logging.getLogger("kvkeep")

PAUSE_SECONDS = 1.0
"""How long a tier whose medium failed is left alone: misses at once, then one more try."""


class Tier:
    """Owned (``policy`` given: this process evicts) or shared (``None``: the medium bounds itself)."""

    def __init__(
        self,
        name: str,
        store: Store,
        *,
        policy: EvictionPolicy | None,
        codec: Codec,
        observer: Observer,
        trusted: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``trusted``: bytes never left this process, so frames need no seal."""
        self.name = name
        self.store = store
        self.codec = codec
        self.trusted = trusted
        self._policy = policy
        self._observer = observer
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._nbytes: dict[BlockKey, int] = {}  # the ledger: what the policy was told is resident
        self._pins: Counter[BlockKey] = Counter()
        self._paused_until = 0.0
        if self._policy is not None:
            self.store.attach(self)

    # What the store tells its owner

    def gained(self, items: Sequence[tuple[BlockKey, int]]) -> None:
        access = Access(self._clock())
        with self._lock:
            for key, nbytes in items:
                self._insert(key, nbytes, access)

    def lost(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._remove(key, evicted=False)

    # Questions

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """All no while the medium is out of order."""
        if not self.available:
            return [False] * len(keys)
        try:
            return self.store.contains_many(keys)
        except StoreError as error:
            self.failed("contains", error)
            return [False] * len(keys)

    @property
    def available(self) -> bool:
        return time.monotonic() >= self._paused_until

    @property
    def usage(self) -> tuple[int, int]:
        """Blocks and bytes that this process answers for."""
        with self._lock:
            return len(self._nbytes), sum(self._nbytes.values())

    # Commands

    def pin(self, keys: Sequence[BlockKey]) -> None:
        """Keep these from being evicted until :meth:`unpin`. Pins count."""
        with self._lock:
            self._pins.update(keys)

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._pins[key] -= 1
                if self._pins[key] <= 0:
                    del self._pins[key]

    def touch(self, accesses: Sequence[tuple[BlockKey, Access]]) -> None:
        with self._lock:
            for key, access in accesses:
                if self._policy is not None and key in self._nbytes:
                    self._policy.touch(key, access)

    def put_many(self, items: Sequence[Item], accesses: Sequence[Access], *, pin: bool = False) -> int:
        """Store from the front, evicting as needed; how many are stored. The rest is dropped, and counted.

        ``pin``: with one pin on each stored key, taken before anybody could evict it.
        """
        done = 0
        pinned = [key for key, _ in items]
        self.pin(pinned)  # a block must not evict its own neighbours
        cause = "unavailable"
        try:
            while done < len(items) and self.available:
                stored = self.store.put_many(items[done:])
                with self._lock:
                    for (key, parts), access in zip(items[done : done + stored], accesses[done:], strict=False):
                        self._insert(key, sum(memoryview(part).nbytes for part in parts), access)
                done += stored
                if done < len(items) and not self._evict(sum(memoryview(part).nbytes for part in items[done][1])):
                    cause = "full"
                    break
        except (ValueTooLargeError, StoreFullError):
            cause = "too large"
        except StoreError as error:
            self.failed("put", error)
            cause = "store error"
        finally:
            self.unpin(pinned[done:] if pin else pinned)
        nbytes = sum(memoryview(part).nbytes for _, parts in items[:done] for part in parts)
        self._observer.event("put", done, nbytes=nbytes, tier=self.name)
        if done < len(items):
            self._observer.event("dropped", len(items) - done, tier=self.name, cause=cause)
        return done

    def delete(self, key: BlockKey) -> bool:
        """Forget ``key``; was it there, and this tier's to delete?"""
        with self._lock:
            self._remove(key, evicted=False)
        try:
            return self.store.delete(key)
        except StoreError as error:
            self.failed("delete", error)
            return False

    def failed(self, operation: str, error: StoreError) -> None:
        """The medium is out of order: leave it alone for a while, and say so once."""
        if self.available:
            log.warning(
                "tier %s: %s failed, so it is left alone for %g s: %s", self.name, operation, PAUSE_SECONDS, error
            )
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        self._observer.event("store_error", tier=self.name, cause=operation)

    def after_fork(self) -> None:
        self.store.after_fork()
        if self._policy is not None:
            self._policy = type(self._policy)(self._policy.capacity)
        self._start()

    def _evict(self, nbytes: int) -> bool:
        """Evict until at least ``nbytes`` have gone; was anything evicted?"""
        gone = 0
        while gone < nbytes:
            with self._lock:
                victim = None if self._policy is None else self._policy.victim(lambda key: key not in self._pins)
                if victim is None:
                    break
                size = self._nbytes[victim]
                self._remove(victim, evicted=True)
            self.store.delete(victim)
            gone += max(size, 1)
            self._observer.event("evict", nbytes=size, tier=self.name)
        return gone > 0

    def _insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        if self._policy is not None and key not in self._nbytes:
            self._policy.insert(key, nbytes, access)
            self._nbytes[key] = nbytes

    def _remove(self, key: BlockKey, *, evicted: bool) -> None:
        if self._policy is not None and self._nbytes.pop(key, None) is not None:
            self._policy.remove(key, evicted=evicted)
