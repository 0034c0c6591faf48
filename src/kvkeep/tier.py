"""A tier: a store, the codec of what lies in it, and the policy that keeps it within its room.

Lock order: a store may call :meth:`Tier.gained` and :meth:`Tier.lost` from inside its own lock, so the tier never
calls its store while it holds its own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile

from kvkeep import frame
from kvkeep.admission import WriteRule
from kvkeep.breaker import Breakers
from kvkeep.buffers import nbytes_of
from kvkeep.codecs.base import Codec
from kvkeep.errors import FrameError, StoreError, StoreFullError, ValueTooLargeError
from kvkeep.events import Observer
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.stores.base import Item, Store

log = logging.getLogger("kvkeep")

MAX_HIDDEN = 1 << 16

MAX_CAUGHT_UP = 1 << 16

PolicyFactory = Callable[[int], EvictionPolicy]
"""Makes a policy for a capacity in bytes."""


_Group = tuple[int, bytes | None]
"""Blocks with a policy of their own: their priority, and with a quota their tenant."""

_COMMON: _Group = (0, None)

_Claim = tuple[bytes, int]
"""A tenant, and bytes that count as its own although they are not stored yet."""


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
        quota: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``trusted``: bytes never left this process, so frames need no seal. ``ttl``: seconds that a block of an
        owned tier may be kept. ``write_rule``: which blocks are written down to here, every one by default;
        ``admission``: which blocks come in at all, also up from below. ``quota``: bytes that the blocks of one tenant
        may take of an owned tier; a tenant who needs more evicts its own."""
        self.name = name
        self.store = store
        self.codec = codec
        self.trusted = trusted
        self.ttl = ttl
        self.quota = quota
        self._write_rule = write_rule
        self._admission = admission
        self._make_policy = policy
        self._observer = observer
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self.breakers = Breakers(self.name, self._observer)
        self._lock = threading.Lock()
        self._nbytes: dict[BlockKey, int] = {}  # the ledger: what the policies were told is resident
        self._policies: dict[_Group, EvictionPolicy] = {}  # one for each group, made when needed
        self._group: dict[BlockKey, _Group] = {}  # of those that are in another one than _COMMON
        self._spent: Counter[bytes | None] = Counter()  # bytes of each tenant, claimed ones too, with a quota only
        self._claiming = threading.Lock()  # one at a time: who evicts for a claim sees no half of another's
        self._unlabelled: list[BlockKey] = []  # whose tenant is not known yet, with a quota only
        self._born: dict[BlockKey, float] = {}  # with a ttl only; oldest first
        self._pins: Counter[BlockKey] = Counter()
        self._prompt: set[BlockKey] = set()  # what came last, by one put or by several …
        self._prompt_end: BlockKey | None = None  # … of which this is the last block
        self._hidden: set[BlockKey] = set()  # are there, but of no use to this process
        self._outages = 0  # of which these were named since:
        self._caught_up: set[BlockKey] = set()
        self._too_small = False  # and that was said
        if self.owned:
            self.store.attach(self)
            self._label()
            if self.ttl is not None:
                stamps = self.store.stamps()
                born = {key: stamps.get(key, now) for key, now in self._born.items()}
                self._born = dict(sorted(born.items(), key=lambda item: item[1]))

    # What the store tells its owner

    def gained(self, items: Sequence[tuple[BlockKey, int]]) -> None:
        access = Access(self._clock())
        with self._lock:
            for key, nbytes in items:
                self._insert(key, nbytes, access, None)
            if self.quota is not None:
                self._unlabelled += [key for key, _ in items]

    def lost(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._remove(key, evicted=False)

    # Questions

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """All no while the medium is out of order."""
        if not self.breakers.medium.closed:
            return [False] * len(keys)
        try:
            there = self.store.contains_many(keys)
        except StoreError as error:
            self.breakers.medium.failed("a lookup", error)
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
                    self._policies[self._group.get(key, _COMMON)].touch(key, access)

    @property
    def has_rule(self) -> bool:
        """Is there a write rule, so that a block may be passed over now and wanted later?"""
        return self._write_rule is not None

    def catch_up(self, found: Sequence[tuple[BlockKey, Access]]) -> list[tuple[BlockKey, Access]]:
        """Of what a request found in a faster tier, what may be missing here since an outage: dropped then, or gone
        with a server's memory. Each block is named once after an outage."""
        outages = self.breakers.outages
        if not outages or not self.breakers.written:
            return []
        with self._lock:
            if outages != self._outages or len(self._caught_up) > MAX_CAUGHT_UP:
                self._outages = outages
                self._caught_up.clear()
            again = [(key, access) for key, access in found if key not in self._caught_up]
            self._caught_up.update(key for key, _ in again)
        return again

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

    def admits(self, key: BlockKey, nbytes: int, access: Access, tenant: bytes) -> bool:
        """Is the block worth its room?"""
        with self._lock:
            if self._admission is not None and not self._admission.wants(key, access):
                return False
            return not self.owned or self._policy_of(self._group_of(access, tenant)).admit(key, nbytes, access)

    def put_many(self, items: Sequence[Item], accesses: Sequence[Access], *, pin: bool = False) -> int:
        """Store from the front, evicting what has no higher priority; how many are stored. The rest is dropped, and
        counted.

        ``pin``: with one pin on each stored key, taken before anybody could evict it. They wait here for another tier,
        which what gives way is in as well: so anything may.
        """
        done = 0
        whole, pinned = items, [key for key, _ in items]
        claims: list[_Claim] = []
        self.pin(pinned)  # a block must not evict its own neighbours
        self._spare([] if pin else pinned, accesses)
        cause = "unavailable"
        try:
            if self.quota is not None and self.breakers.medium.closed:
                self._claim(items, accesses, claims)
                items = items[: len(claims)]
                cause = "quota" if len(items) < len(whole) else cause
            while done < len(items) and self.breakers.written:
                stored = self.store.put_many(items[done:])
                with self._lock:
                    self._release(claims[done : done + stored])
                    for (key, parts), access in zip(items[done : done + stored], accesses[done:], strict=False):
                        self._insert(key, nbytes_of(parts), access, frame.tenant_of(parts[0]))
                done += stored
                if done == len(items):
                    break
                nbytes = sum(memoryview(part).nbytes for part in items[done][1])
                if not self._evict(nbytes, most=math.inf if pin else accesses[done].priority):
                    cause = "full"
                    break
        except (ValueTooLargeError, StoreFullError) as error:
            cause = "too large"
            if not self._too_small:
                self._too_small = True
                log.warning("tier %s holds no block of this size, so it keeps none: %s; give it more", self.name, error)
        except StoreError as error:
            self.breakers.failed("a write", error)
            cause = error.cause
        finally:
            if claims[done:]:
                with self._lock:
                    self._release(claims[done:])
            self.unpin(pinned[done:] if pin else pinned)
        nbytes = sum(memoryview(part).nbytes for _, parts in items[:done] for part in parts)
        self._observer.event("put", done, nbytes=nbytes, tier=self.name)
        if done < len(whole):
            self._observer.event("dropped", len(whole) - done, tier=self.name, cause=cause)
        return done

    def delete(self, key: BlockKey) -> bool:
        """Forget ``key``; was it there, and this tier's to delete?"""
        with self._lock:
            self._remove(key, evicted=False)
        try:
            return self.store.delete(key)
        except StoreError as error:
            self.breakers.failed("a deletion", error)
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

    def refuse(self, key: BlockKey, error: FrameError) -> None:
        """A frame that is not what it should be is deleted; one that vanished meanwhile was merely overwritten, and
        one that others may be able to read is left to them."""
        if error.cause == "locked" or (error.cause in ("unknown", "version") and not self.owned):
            self.hide(key, str(error))
            self._observer.event("lost", tier=self.name, cause=error.cause)
            return
        mine = self.delete(key)
        self._observer.event(
            "corrupt" if mine else "lost", tier=self.name, cause=error.cause if mine else "overwritten"
        )

    def maintain(self) -> bool:
        """From the background, about once a second: probe what failed, delete what is too old, keep house. Does the
        store want to be called again soon?"""
        self.breakers.probe(self.store.ping, self.store.ping_writes)
        if self.ttl is not None:
            oldest = self._clock() - self.ttl
            with self._lock:
                expired = list(takewhile(lambda key: self._born[key] <= oldest, self._born))
            for key in expired:
                if self.delete(key):
                    self._observer.event("evict", tier=self.name, cause="expired")
        self._label()
        try:
            return self.store.maintain()
        except StoreError as error:  # which does not keep it from its work
            self._observer.event("store_error", tier=self.name, cause=error.cause)
            log.warning("tier %s goes on: %s", self.name, error)
            return False

    def after_fork(self) -> None:
        self.store.after_fork()
        self._start()

    def _spare(self, keys: Sequence[BlockKey], accesses: Sequence[Access]) -> None:
        """A prompt that is larger than the tier must not evict its own beginning, without which the rest is useless:
        as long as what is put follows what was put before, all of that stays."""
        with self._lock:
            if not keys or self._prompt_end is None or accesses[0].parent != self._prompt_end:
                self._prompt.clear()
            self._prompt.update(keys)
            self._prompt_end = keys[-1] if keys else None

    def _claim(self, items: Sequence[Item], accesses: Sequence[Access], claims: list[_Claim]) -> None:
        """Count ``items``, from the front, against their tenants' quotas before they are stored, so that several who
        store at once stay within them together. Tenants evict their own for it; ``claims`` gets one of each item that
        finds room."""
        assert self.quota is not None
        with self._claiming:
            for (key, parts), access in zip(items, accesses, strict=True):
                tenant = frame.tenant_of(parts[0])
                with self._lock:
                    claim = tenant, 0 if key in self._nbytes else nbytes_of(parts)
                    self._spent[tenant] += claim[1]
                    over = self._spent[tenant] - self.quota if claim[1] else 0
                claims.append(claim)
                if over > 0 and self._evict(over, tenant, most=access.priority) < over:
                    with self._lock:
                        self._release([claims.pop()])
                    return

    def _release(self, claims: Sequence[_Claim]) -> None:
        for tenant, nbytes in claims:
            self._spent[tenant] -= nbytes

    def _label(self) -> None:
        """With a quota: find out whose the blocks are that came with the medium, or from another process."""
        with self._lock:
            keys, self._unlabelled = self._unlabelled, []
        if not keys:
            return
        try:
            heads = self.store.heads(keys, frame.HEADER_NBYTES)
        except StoreError as error:
            self.breakers.medium.failed("a read", error)
            return
        access, tenants = Access(self._clock()), set()
        with self._lock:
            for key, head in zip(keys, heads, strict=True):
                nbytes, (priority, before) = self._nbytes.get(key), self._group.get(key, _COMMON)
                if nbytes is None or head is None or before is not None:
                    continue
                tenant = frame.tenant_of(head)
                self._policies[priority, before].remove(key, evicted=False)
                self._policy_of((priority, tenant)).insert(key, nbytes, access)
                self._group[key] = (priority, tenant)
                self._spent[before] -= nbytes
                self._spent[tenant] += nbytes
                tenants.add(tenant)
        try:
            for tenant in tenants:
                self._evict(self._spent[tenant] - (self.quota or 0), tenant)
        except StoreError as error:
            self.breakers.failed("a deletion", error)

    def _evict(self, nbytes: int, *tenant: bytes, most: float = math.inf) -> int:
        """Evict until at least ``nbytes`` have gone, if given only of one tenant, and of priorities up to ``most``; how
        many did."""
        gone = 0
        while gone < nbytes:
            with self._lock:
                victim = self._victim(*tenant, most=most)
                if victim is None:
                    break
                size = self._nbytes[victim]
                self._remove(victim, evicted=True)
            self.store.delete(victim)
            gone += max(size, 1)
            self._observer.event("evict", nbytes=size, tier=self.name)
        return gone

    def _victim(self, *tenant: bytes, most: float) -> BlockKey | None:
        """The lowest priority first, and of one priority the tenant who has most."""
        groups = [group for group in self._policies if group[0] <= most and (not tenant or group[1] in tenant)]
        for group in sorted(groups, key=lambda group: (group[0], -self._spent[group[1]])):
            victim = self._policies[group].victim(lambda key: key not in self._pins and key not in self._prompt)
            if victim is not None:
                return victim
        return None

    def _policy_of(self, group: _Group) -> EvictionPolicy:
        policy = self._policies.get(group)
        if policy is None:
            assert self._make_policy is not None
            policy = self._policies[group] = self._make_policy(self.store.capacity or 0)
        return policy

    def _group_of(self, access: Access, tenant: bytes | None) -> _Group:
        return access.priority, None if self.quota is None else tenant

    def _insert(self, key: BlockKey, nbytes: int, access: Access, tenant: bytes | None) -> None:
        """``tenant``: None while it is not known."""
        if self.owned and key not in self._nbytes:
            group = self._group_of(access, tenant)
            self._policy_of(group).insert(key, nbytes, access)
            self._nbytes[key] = nbytes
            if group != _COMMON:
                self._group[key] = group
            if self.quota is not None:
                self._spent[group[1]] += nbytes
            if self.ttl is not None:
                self._born[key] = self._clock()

    def _remove(self, key: BlockKey, *, evicted: bool) -> None:
        self._hidden.discard(key)
        nbytes = self._nbytes.pop(key, None)
        if nbytes is not None:
            group = self._group.pop(key, _COMMON)
            self._policies[group].remove(key, evicted=evicted)
            if self.quota is not None:
                self._spent[group[1]] -= nbytes
            self._born.pop(key, None)
