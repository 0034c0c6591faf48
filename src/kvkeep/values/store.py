"""Values under names: the index says which bytes a name stands for, the tiers keep the bytes.

Bytes are named by their digest, so equal values lie there once, never change, and go through the same frames, codecs
and encryption as blocks do. They are written before the name is. A value no longer than the reference to it stands in
the index itself. A tenant's namespace is part of every name and digest, so tenants share nothing.

Whatever the media do, a read is a miss and a write is not kept, and a counter says why. Only what the caller did wrong
raises: ``TypeError`` for an object, ``ValueError`` for a life that is none.
"""

from __future__ import annotations

import hashlib
import logging
import numbers
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from kvkeep import frame
from kvkeep.breaker import Breakers
from kvkeep.buffers import Buffer, BufferPool, as_bytes, nbytes_of
from kvkeep.crypt import key_id_of
from kvkeep.errors import FrameError, StoreError
from kvkeep.events import Counters, Observer
from kvkeep.flight import Flight
from kvkeep.frame import HEADER_NBYTES, MAX_PAYLOAD_NBYTES
from kvkeep.identity import ModelIdentity, derive
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout, LayerGroup
from kvkeep.policies.base import Access
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore
from kvkeep.values.entry import MAX_TAGS, Entry, decode, encode, naming
from kvkeep.values.face import ValueStats
from kvkeep.values.form import FormError, pack, unpack
from kvkeep.values.index import Found, Index, Item

log = logging.getLogger("kvkeep")

IN_PLACE_NBYTES = 64
"""A reference (digest, length, frame) costs more."""

REMEMBERED = 10_000
"""Values found below the first tier whose first use is remembered."""

SEEN, SEEN_NBYTES = 1024, 1024
"""Entries that are remembered decoded, and how large."""

NOTED = 32
"""Uses of values after which their tiers' policies are told: each for itself would cost ten times as much, since what
a value's copy leaves in the processor's caches is the value."""

LONGEST_WAIT_SECONDS = 60.0

LONGEST_LIFE_SECONDS = 100 * 365 * 86400.0
"""What a ``ttl`` above it means too: media do not count any further."""

MAX_KEY_NBYTES = 64 << 10
"""Of a packed key, which stands in the index as it is."""

Tags = Sequence[tuple[bytes, bytes]]
"""Names of tags, each with its generation now."""

MISSING: Any = object()


class _Call:
    """What one thread computes while others of the process wait."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.done = threading.Event()
        self.followers = 0
        self.made: bytes | None = None  # None also if it failed, or cannot be handed on


T = TypeVar("T")


class Values:
    """``index`` is where names are, ``tiers`` where bytes are, ``flight`` who computes."""

    def __init__(
        self,
        tiers: TieredStore,
        index: Index,
        flight: Flight,
        breakers: Breakers,
        *,
        namespace: bytes,
        observer: Observer,
    ) -> None:
        """``breakers``: of the index, which claims on its medium respect as well."""
        self.index = index
        self.flight = flight
        self._tiers = tiers
        self._namespace = namespace
        self._observer = observer
        self._naming = naming(namespace)
        self._breakers = breakers
        breakers.watch(tiers.writer.start)
        self._pool = BufferPool()
        self._said_locked = False
        self._said_unkept: set[str] = set()  # types
        self._lock = threading.Lock()
        self._calls: dict[bytes, _Call] = {}
        self._asked_once: dict[bytes, bool] = {}  # oldest first
        self._seen: dict[bytes, tuple[bytes, Entry]] = {}  # by name: entries, and the bytes that they were
        self._used: list[tuple[Tier, BlockKey, Access]] = []  # what policies have not been told of yet
        tiers.writer.upkeep.append(self._maintain)

    # Names

    def set_many(
        self,
        values: Iterable[tuple[Any, Any]],
        *,
        ttl: float | None = None,
        tags: Iterable[str] | None = (),
        stale: float = 0.0,
    ) -> int:
        """Set each key and value; how many are kept. Raises ``TypeError`` before anything is set."""
        check_life(ttl, stale)
        packed = [(pack_key(key), pack(value)) for key, value in values]
        return self.set_packed(packed, ttl=ttl, stale=stale, tags=self.generations(tags))

    def set_packed(
        self, packed: Sequence[tuple[bytes, list[Buffer]]], *, ttl: float | None, stale: float, tags: Tags | None
    ) -> int:
        """The same, packed; with ``tags`` as they were when the computing began (None: they are not known)."""
        if tags is None or self._tiers.closed or not self._breakers.written:
            return 0
        stale = 0.0 if ttl is None else _bounded(stale)
        life = None if ttl is None else _bounded(ttl) + stale
        items = []
        for key, parts in packed:
            nbytes = nbytes_of(parts)
            digest = self._digest(parts)
            value = b"".join(parts) if nbytes <= IN_PLACE_NBYTES else None
            if value is None and not self._keep(BlockKey(digest), parts, nbytes):
                continue
            name = self.name(key)
            entry = Entry(digest, nbytes, key, tuple(tags), stale, value)
            kept_nbytes = nbytes if value is None else 0
            items.append(Item(name, self._encoded(name, entry), life, digest, kept_nbytes))
        orphans = self._asked(lambda: self.index.set_many(items), "a write") if items else []
        if orphans is None:
            items = self._standing(items)  # of several nodes some may be well
        self._forget(orphans or [])
        self._observer.event("value_set", len(items), nbytes=sum(item.nbytes for item in items))
        return len(items)

    def get_many(self, keys: Sequence[Any], default: Any = None) -> list[Any]:
        """The values, ``default`` where there is none."""
        found = self.look_up([self.name(pack_key(key)) for key in keys])
        return [default if value is MISSING else value for value, fresh in found]

    def look_up(self, names: Sequence[bytes], *, stale: bool = False) -> list[tuple[Any, bool]]:
        """Each value, or :data:`MISSING`, and whether it is fresh. ``stale`` ones only if asked for."""
        entries = self._entries(names)
        return [self._value(entry, fresh, stale) for entry, fresh in entries]

    def delete(self, key: Any) -> bool:
        """Forget ``key``, and its bytes if no other key has them; was it there?"""
        name = self.name(pack_key(key))
        gone = self._asked(lambda: self.index.delete(name), "a deletion")
        if gone is None:
            return False
        there, orphans = gone
        self._forget(orphans)
        return bool(there)

    def keys_of(self, value: Any) -> list[Any]:
        """Keys under which a value equal to this one, bit for bit, can be got now."""
        digest = self._digest(pack(value))
        names = self._asked(lambda: self.index.members(digest), "a lookup") or []
        keys = []
        for entry, fresh in self._entries(names):
            if entry is not None and fresh and entry.digest == digest:
                try:
                    keys.append(unpack(entry.key))
                except FormError:
                    self._missed("corrupt")
        return keys

    # Tags

    def generations(self, tags: Iterable[str] | None) -> Tags | None:
        """``tags`` as they are now, for :meth:`set_packed`. None if the index does not answer.

        A generation is a random token that is made when it is first asked for. A token that an index has lost is
        never made again, so what was stored under it stays lost.
        """
        names = [self._tag(tag) for tag in checked_tags(tags)]
        if not names:
            return ()
        return self._asked(lambda: self._generations(names), "a lookup")

    def _generations(self, names: Sequence[bytes]) -> Tags | None:
        for name, found in zip(names, self.index.get_many(names), strict=True):
            if found is None:
                self.index.add(name, secrets.token_bytes(16), None)
        made = self.index.get_many(names)
        return [(name, found.body) for name, found in zip(names, made, strict=True) if found and len(found.body) == 16]

    def invalidate(self, tag: str) -> bool:
        """Make everything stale that carries ``tag``; was the index told?"""
        name = self._tag(*checked_tags([tag]))
        return self._asked(lambda: self.index.delete(name), "a write") is not None

    # Computing

    def get_or_compute(
        self,
        key: bytes,
        compute: Callable[[], Any],
        *,
        ttl: float | None = None,
        stale: float = 0.0,
        tags: Sequence[str] = (),
        wait: float = LONGEST_WAIT_SECONDS,
    ) -> Any:
        """The value of a packed ``key``, computed by one of all who ask for it now. ``ttl``, ``stale`` and ``tags``
        have been checked."""
        if self._tiers.closed:
            return compute()
        name = self.name(key)
        ((value, fresh),) = self.look_up([name], stale=stale > 0)
        if value is not MISSING and fresh:
            return value
        with self._lock:
            call = self._calls.get(name)
            leads = call is None
            if call is None:
                call = self._calls[name] = _Call()
            elif value is MISSING:
                call.followers += 1

        def make() -> tuple[Any, list[Buffer] | None]:
            """The value, computed, and packed if it can be kept."""
            generations = self.generations(tags)
            made = compute()
            parts = self._pack_result(made)
            if parts is not None:
                self.set_packed([(key, parts)], ttl=ttl, stale=stale, tags=generations)
            return made, parts

        if leads:
            return self._lead(call, name, make, value, _bounded(wait))
        if value is not MISSING:
            return value
        if call.thread == threading.get_ident():  # asked by what it computes
            return compute()
        self._observer.event("value_wait")
        call.done.wait(_bounded(wait))
        # Where the one that led has nothing to give, all compute at the same time, not one after the other.
        return make()[0] if call.made is None else unpack(call.made)

    def _lead(
        self, call: _Call, name: bytes, make: Callable[[], tuple[Any, list[Buffer] | None]], old: Any, wait: float
    ) -> Any:
        """For the threads of this process: compute it, or wait for another process that does."""
        parts: list[Buffer] | None = None
        found: list[Any] = []

        def ready() -> bool:
            ((value, _),) = self.look_up([name])
            if value is not MISSING:
                found.append(value)
            return bool(found)

        try:
            claim = self.flight.take(name)
            if claim is None and old is not MISSING:
                return old
            waited = claim is None
            if claim is None:
                self._observer.event("value_wait")
                claim = self.flight.wait(name, wait, ready)
            try:
                if found or (claim is not None and ready()):  # it came between the look and the claim
                    parts = pack(found[0])
                    return found[0]
                if waited and claim is not None:  # who had it made nothing: nobody need wait for us in turn
                    self.flight.drop(claim)
                    claim = None
                made, parts = make()
                return made
            finally:
                if claim is not None:
                    (self.flight.drop if parts is None else self.flight.release)(claim)
        finally:
            with self._lock:
                del self._calls[name]
            if call.followers and parts is not None:
                call.made = b"".join(parts)  # a copy: what is returned is the caller's to change
            call.done.set()

    def _pack_result(self, made: Any) -> list[Buffer] | None:
        """None, and it is said once, if it is of a type that cannot be kept: whoever had it computed gets it anyhow."""
        try:
            return pack(made)
        except TypeError as error:
            self._observer.event("dropped", cause="type")
            kind = type(made).__qualname__
            if kind not in self._said_unkept:
                self._said_unkept.add(kind)
                log.warning("a result that cannot be kept is computed whenever it is asked for: %s", error)
            return None

    # Inside

    def packed(self, key: Any) -> bytes:
        return pack_key(key)

    def name(self, key: bytes) -> bytes:
        mac = self._naming.copy()
        mac.update(key)
        return mac.digest()

    def _tag(self, tag: str) -> bytes:
        return derive(self._namespace, b"kvkeep value tag 1", (tag.encode("utf-8", "surrogatepass"),))

    def stats(self, counters: Counters) -> ValueStats:
        usage = self._asked(self.index.usage, "a lookup")
        return ValueStats(
            counters.count("value_hit"),
            counters.count("value_miss"),
            counters.count("value_set"),
            counters.count("value_shared"),
            counters.nbytes("value_shared"),
            *(usage or ()),
        )

    def close(self) -> None:
        self.index.close()

    def after_fork(self) -> None:
        self.index.after_fork()

    def _entries(self, names: Sequence[bytes]) -> list[tuple[Entry | None, bool]]:
        """Each entry that still stands, and whether it is fresh."""
        found = self._asked(lambda: self.index.get_many(names), "a lookup")
        if found is None:
            return [(None, False)] * len(names)
        entries = [
            None if one is None else self._decoded(name, one.body) for name, one in zip(names, found, strict=True)
        ]
        now = self._tags_of([entry for entry in entries if entry is not None])
        result: list[tuple[Entry | None, bool]] = []
        for entry, one in zip(entries, found, strict=True):
            if entry is None or one is None:
                self._missed("absent" if one is None else "locked" if self._locked(one.body) else "corrupt")
                result.append((None, False))
            elif any(now.get(tag) != generation for tag, generation in entry.tags):
                self._missed("invalidated")
                result.append((None, False))
            else:
                result.append((entry, one.left is None or one.left > entry.stale))
        return result

    def _encoded(self, name: bytes, entry: Entry) -> bytes:
        """With encryption all that could be read is encrypted: the caller's key, and a value that is in place."""
        body, cipher = encode(name, entry), self._tiers.cipher
        return body if cipher is None else cipher.encrypt_bytes(body, context=name, namespace=self._namespace)

    def _decoded(self, name: bytes, body: bytes) -> Entry | None:
        seen = self._seen.get(name)
        if seen is not None and seen[0] == body:
            return seen[1]
        entry = self._decode(name, body)
        if entry is not None and len(body) <= SEEN_NBYTES:
            if len(self._seen) >= SEEN:
                self._seen.clear()
            self._seen[name] = body, entry
        return entry

    def _decode(self, name: bytes, body: bytes) -> Entry | None:
        cipher = self._tiers.cipher
        if self._locked(body):
            self._observer.event("lost", tier="index", cause="locked")
            if not self._said_locked:
                self._said_locked = True
                key_id = (key_id_of(body) or b"").hex()
                log.warning(
                    "values that cannot be used are left alone: encrypted with key %s, which is not given", key_id
                )
            return None
        try:
            return decode(
                name, body if cipher is None else cipher.decrypt_bytes(body, context=name, namespace=self._namespace)
            )
        except FrameError as error:
            self._observer.event("corrupt", tier="index", cause=error.cause)
            return None

    def _locked(self, body: bytes) -> bool:
        key_id, cipher = key_id_of(body), self._tiers.cipher
        return key_id is not None and (cipher is None or key_id not in cipher.key_ids)

    def _tags_of(self, entries: Sequence[Entry]) -> dict[bytes, bytes]:
        tags = list({tag for entry in entries for tag, _ in entry.tags})
        if not tags:
            return {}
        found: Sequence[Found | None] = self._asked(lambda: self.index.get_many(tags), "a lookup") or []
        return {tag: one.body for tag, one in zip(tags, found, strict=False) if one is not None}

    def _value(self, entry: Entry | None, fresh: bool, stale: bool) -> tuple[Any, bool]:
        if entry is None:
            return MISSING, False
        if not fresh and not stale:
            self._missed("stale")
            return MISSING, False
        try:
            value = self._fetch(BlockKey(entry.digest), entry.nbytes) if entry.value is None else unpack(entry.value)
        except FormError:
            self._missed("corrupt")
            return MISSING, False
        if value is MISSING:
            self._missed("lost")
            return MISSING, False
        self._observer.event("value_hit", nbytes=entry.nbytes)
        return value, fresh

    def _keep(self, key: BlockKey, parts: Sequence[Buffer], nbytes: int) -> bool:
        if nbytes > MAX_PAYLOAD_NBYTES:
            self._observer.event("dropped", nbytes=nbytes, cause="too large")
            return False
        there = [tier.contains_many([key])[0] for tier in self._tiers.tiers]
        if there[-1]:
            self._observer.event("value_shared", nbytes=nbytes)
        if all(there):
            return True
        self._tell()  # before something has to give way
        with self._pool.borrow(nbytes) as room:
            at = 0
            for part in parts:
                view = as_bytes(part)
                room[at : at + len(view)] = view
                at += len(view)
            return self._tiers.save_now(key, room, layout_of(nbytes, self._namespace), Access(time.time()))

    def _fetch(self, key: BlockKey, nbytes: int) -> Any:
        """The value whose bytes these are, or MISSING. Raises :class:`FormError`."""
        if not 0 < nbytes <= MAX_PAYLOAD_NBYTES:
            raise FormError(f"a value of {nbytes} bytes")
        layout = layout_of(nbytes, self._namespace)
        first = self._tiers.tiers[0]
        for tier in self._tiers.tiers:
            # A server is not asked whether it has it: it will say when it is asked for the bytes.
            if tier.contains_many([key])[0] if tier.owned else tier.breakers.medium.closed:
                value = self._read(key, tier, layout)
                if value is not None:
                    access = Access(time.time())
                    self._note(tier, key, access)
                    if tier is not first and self._asked_again(key):
                        self._tiers.promote([key], [tier], layout, [access])
                    return value[0]
        return MISSING

    def _read(self, key: BlockKey, tier: Tier, layout: ValueLayout) -> tuple[Any] | None:
        """What ``tier`` has, None if it is gone. Raises :class:`FormError`."""
        if tier.trusted:
            # In memory nearly all is raw, and its header then has only one form.
            head, nbytes = key.join(layout.raw_head), HEADER_NBYTES + layout.block_nbytes
            with suppress(StoreError), tier.store.read([key]) as (value,):
                if value is not None and len(value) == nbytes and bytes(value[:HEADER_NBYTES]) == head:
                    made = unpack(value[HEADER_NBYTES:])
                    self._observer.event("load", nbytes=layout.block_nbytes, tier=tier.name)
                    return (made,)
        payload = self._tiers.read_one(key, tier, layout)
        return None if payload is None else (unpack(payload, given=True),)

    def _note(self, tier: Tier, key: BlockKey, access: Access) -> None:
        self._used.append((tier, key, access))
        if len(self._used) >= NOTED:
            self._tell()

    def _tell(self) -> None:
        """Tell the policies what was used."""
        used, self._used = self._used, []
        for tier in self._tiers.tiers if used else ():
            tier.touch([(key, access) for where, key, access in used if where is tier])

    def _asked_again(self, key: bytes) -> bool:
        """A value goes up when it is asked for a second time: copying it costs as much as getting it did."""
        with self._lock:
            again = self._asked_once.pop(key, False)
            if not again:
                self._asked_once[key] = True
                if len(self._asked_once) > REMEMBERED:
                    del self._asked_once[next(iter(self._asked_once))]
        return again

    def _forget(self, orphans: Sequence[bytes]) -> None:
        for digest in orphans:
            for tier in self._tiers.tiers:
                tier.delete(BlockKey(digest))

    def _digest(self, parts: Sequence[Buffer]) -> bytes:
        content = hashlib.sha256()
        for part in parts:
            content.update(part)
        return derive(self._namespace, b"kvkeep value 1", (content.digest(),))

    def _missed(self, cause: str) -> None:
        self._observer.event("value_miss", cause=cause)

    def _standing(self, items: Sequence[Item]) -> list[Item]:
        """Those of ``items`` that are set."""
        found = self._asked(lambda: self.index.get_many([item.name for item in items]), "a lookup") or []
        return [item for item, one in zip(items, found, strict=False) if one is not None and one.body == item.body]

    def _asked(self, question: Callable[[], T], operation: str) -> T | None:
        """The index's answer, or None while it is out of order, or once this is closed."""
        if self._tiers.closed or not self._breakers.medium.closed:
            return None
        try:
            return question()
        except StoreError as error:
            self._breakers.failed(operation, error)
            return None

    def _maintain(self) -> None:
        self._tell()
        self._breakers.probe(self.index.ping, self.index.ping_writes)
        self._forget(self._asked(self.index.maintain, "housekeeping") or [])


def pack_key(key: Any) -> bytes:
    """A key may be a text, bytes, a number, or a tuple of these. Raises ``TypeError``; ``ValueError`` on a long one."""
    _check_key(key)
    packed = b"".join(pack(key))
    if len(packed) > MAX_KEY_NBYTES:
        raise ValueError(f"a key of {len(packed):,} bytes: at most {MAX_KEY_NBYTES:,}, so take a digest of it instead")
    return packed


def check_life(ttl: float | None, stale: float, wait: float = 0.0) -> None:
    """Raises ``TypeError`` and ``ValueError``."""
    for name, seconds in (("ttl", 0.0 if ttl is None else ttl), ("stale", stale), ("wait", wait)):
        if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
            raise TypeError(f"{name} is a number of seconds, not {seconds!r}")
    if (ttl is not None and not 0 < ttl < float("inf")) or not 0 <= stale < float("inf"):
        raise ValueError(f"ttl is a number of seconds above 0, or None; stale at least 0: not {ttl} and {stale}")
    if not 0 <= wait < float("inf"):
        raise ValueError(f"wait is a number of seconds, at least 0: not {wait}")


def _bounded(seconds: float) -> float:
    """As media and clocks take them: NumPy's numbers may be less exact, and Python's integers longer."""
    return float(min(seconds if isinstance(seconds, int) else float(seconds), LONGEST_LIFE_SECONDS))


def checked_tags(tags: Iterable[str] | None) -> list[str]:
    """Each once; None is none. Raises ``TypeError`` and ``ValueError``."""
    if tags is None:
        return []
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise TypeError(f"tags is a list of texts, not {tags!r}")
    given = list(tags)
    if not all(isinstance(tag, str) for tag in given):
        raise TypeError(f"a tag is a text: not {given!r}")
    found = list(dict.fromkeys(given))
    if len(found) > MAX_TAGS:
        raise ValueError(f"{len(found)} tags: a value has at most {MAX_TAGS}")
    return found


def _check_key(key: Any) -> None:
    if type(key) is tuple:
        for part in key:
            _check_key(part)
    elif type(key) not in (str, bytes, int, float, bool, type(None)):
        given = f"{type(key).__module__}.{type(key).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"a key is a text, bytes, a number of Python's, or a tuple of these, not {given}")


class ValueLayout(KVLayout):
    """One opaque block of any size. All of a tenant's have one fingerprint: a frame's key and length say the rest."""

    @cached_property
    def fingerprint(self) -> bytes:
        return derive(b"", b"kvkeep values layout 1", (self.identity.digest,))

    @cached_property
    def raw_head(self) -> tuple[bytes, bytes]:
        """The header in memory of a value that no codec has touched: what stands before its key, and behind it."""
        return frame.around_key(self.fingerprint, self.block_nbytes, self.identity.tenant)


@lru_cache(maxsize=4096)
def layout_of(nbytes: int, namespace: bytes) -> ValueLayout:
    """The layout of a value's bytes."""
    identity = ModelIdentity(weights="kvkeep values 1", kv_dtype="uint8", namespace=namespace)
    return ValueLayout(identity, (LayerGroup(1, 1, nbytes, 0),), "uint8", block_tokens=1)
