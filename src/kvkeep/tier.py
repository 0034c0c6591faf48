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
from itertools import takewhile

from kvkeep.admission import WriteRule
from kvkeep.breaker import Breaker
from kvkeep.codecs.base import Codec
from kvkeep.errors import StoreError, StoreFullError, ValueTooLargeError
from kvkeep.events import Observer
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.stores.base import Item, Store

log = logging.getLogger("kvkeep")

MAX_HIDDEN = 1 << 16

PolicyFactory = Callable[[int], EvictionPolicy]
"""Makes a policy for a capacity in bytes."""


class Tier:
    """Owned (``policy`` given: this process evicts) or shared (``None``: the medium bounds itself)."""

    def __init__(
        self,
        name: str,
        store: Store,
        *,
        policy: PolicyFactory | None,
        codec: Codec,
        observer: Observer,
        trusted: bool = False,
        ttl: float | None = None,
        write_rule: WriteRule | None = None,
        admission: WriteRule | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``trusted``: bytes never left this process, so frames need no seal. ``ttl``: seconds that a block of an
        owned tier may be kept. ``write_rule``: which blocks are written down to here, every one by default;
        ``admission``: which blocks come in at all, also up from below."""
        self.name = name
        self.store = store
        self.codec = codec
        self.trusted = trusted
        self.ttl = ttl
        self._write_rule = write_rule
        self._admission = admission
        self._make_policy = policy
        self._observer = observer
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self.breaker = Breaker(self.name, self._observer)
        self._lock = threading.Lock()
        self._nbytes: dict[BlockKey, int] = {}  # the ledger: what the policies were told is resident
        self._policies: dict[int, EvictionPolicy] = {}  # one for each priority, made when needed
        self._priority: dict[BlockKey, int] = {}  # of those that have another one than 0
        self._born: dict[BlockKey, float] = {}  # with a ttl only; oldest first
        self._pins: Counter[BlockKey] = Counter()
        self._hidden: set[BlockKey] = set()  # are there, but of no use to this process
        if self.owned:
            self.store.attach(self)
            if self.ttl is not None:
                stamps = self.store.stamps()
                born = {key: stamps.get(key, now) for key, now in self._born.items()}
                self._born = dict(sorted(born.items(), key=lambda item: item[1]))

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
        if not self.breaker.closed:
            return [False] * len(keys)
        try:
            there = self.store.contains_many(keys)
        except StoreError as error:
            self.breaker.failed("a lookup", error)
            return [False] * len(keys)
        if self._hidden:
            there = [known and key not in self._hidden for key, known in zip(keys, there, strict=True)]
        if self.ttl is not None:
            now = self._clock()
            there = [
                known and self._born.get(key, now) + self.ttl > now for key, known in zip(keys, there, strict=True)
            ]
        return there

    @property
    def owned(self) -> bool:
        """Does this process evict here?"""
        return self._make_policy is not None

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
                if key in self._nbytes:
                    self._policies[self._priority.get(key, 0)].touch(key, access)

    @property
    def has_rule(self) -> bool:
        """Is there a write rule, so that a block may be passed over now and wanted later?"""
        return self._write_rule is not None

    def seen(self, keys: Sequence[BlockKey], accesses: Sequence[Access]) -> None:
        """A request has these blocks, found or new, from the front to the back: rules learn from it."""
        rules = [rule for rule in (self._write_rule, self._admission) if rule is not None]
        if rules:
            with self._lock:
                for rule in rules:
                    for key, access in zip(keys, accesses, strict=True):
                        rule.seen(key, access)

    def wants_written(self, key: BlockKey, access: Access) -> bool:
        """Does the write rule want the block, which lies in a faster tier, here too?"""
        with self._lock:
            return self._write_rule is None or self._write_rule.wants(key, access)

    def admits(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        """Is the block worth its room?"""
        with self._lock:
            if self._admission is not None and not self._admission.wants(key, access):
                return False
            return not self.owned or self._policy_of(access.priority).admit(key, nbytes, access)

    def put_many(self, items: Sequence[Item], accesses: Sequence[Access], *, pin: bool = False) -> int:
        """Store from the front, evicting as needed; how many are stored. The rest is dropped, and counted.

        ``pin``: with one pin on each stored key, taken before anybody could evict it.
        """
        done = 0
        pinned = [key for key, _ in items]
        self.pin(pinned)  # a block must not evict its own neighbours
        cause = "unavailable"
        try:
            while done < len(items) and self.breaker.closed:
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
            self.breaker.failed("a write", error)
            cause = error.cause
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
            self.breaker.failed("a deletion", error)
            return False

    def hide(self, key: BlockKey, why: str) -> None:
        """Find ``key`` no more, but leave it to others: nobody here can use what is stored."""
        with self._lock:
            first = not self._hidden
            if len(self._hidden) >= MAX_HIDDEN:
                self._hidden.clear()
            self._hidden.add(key)
        if first:
            log.warning("tier %s: blocks that cannot be used are left alone: %s", self.name, why)

    def maintain(self) -> None:
        """From the background, about once a second: probe what failed, delete what is too old, keep house."""
        self.breaker.probe(self.store.ping)
        if self.ttl is not None:
            oldest = self._clock() - self.ttl
            with self._lock:
                expired = list(takewhile(lambda key: self._born[key] <= oldest, self._born))
            for key in expired:
                if self.delete(key):
                    self._observer.event("evict", tier=self.name, cause="expired")
        self.store.maintain()

    def after_fork(self) -> None:
        self.store.after_fork()
        self._start()

    def _evict(self, nbytes: int) -> bool:
        """Evict until at least ``nbytes`` have gone; was anything evicted?"""
        gone = 0
        while gone < nbytes:
            with self._lock:
                victim = self._victim()
                if victim is None:
                    break
                size = self._nbytes[victim]
                self._remove(victim, evicted=True)
            self.store.delete(victim)
            gone += max(size, 1)
            self._observer.event("evict", nbytes=size, tier=self.name)
        return gone > 0

    def _victim(self) -> BlockKey | None:
        for priority in sorted(self._policies):
            victim = self._policies[priority].victim(lambda key: key not in self._pins)
            if victim is not None:
                return victim
        return None

    def _policy_of(self, priority: int) -> EvictionPolicy:
        policy = self._policies.get(priority)
        if policy is None:
            assert self._make_policy is not None
            policy = self._policies[priority] = self._make_policy(self.store.capacity or 0)
        return policy

    def _insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        if self.owned and key not in self._nbytes:
            self._policy_of(access.priority).insert(key, nbytes, access)
            self._nbytes[key] = nbytes
            if access.priority:
                self._priority[key] = access.priority
            if self.ttl is not None:
                self._born[key] = self._clock()

    def _remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._hidden.discard(key)
        if self._nbytes.pop(key, None) is not None:
            self._policies[self._priority.pop(key, 0)].remove(key, evicted=evicted)
            self._born.pop(key, None)
