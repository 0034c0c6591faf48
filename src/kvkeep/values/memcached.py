"""The index of Memcached: entries are replaced by compare-and-swap, so of two writers one wins.

::

    PREFIX:v:NAME    until (f64, seconds since 1970, infinite if for ever), group, stamp (8 bytes), body
    PREFIX:g:GROUP   the group's members, each a name and a stamp

Memcached counts lives in whole seconds, so the end of a life stands in the entry and is the wall clock's: the machines'
clocks must agree as closely as a life is to be exact. A group keeps its latest members only.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from kvkeep.errors import NodeError, StoreError
from kvkeep.keys import BlockKey
from kvkeep.stores.memcached import MemcachedStore, expiry_of
from kvkeep.stores.redis_wire import Wire, garbage
from kvkeep.values.index import NAME_NBYTES, Found, Index, Item, write_seconds

STAMP_NBYTES = 8
MEMBER_NBYTES = NAME_NBYTES + STAMP_NBYTES
MOST_MEMBERS = 10_000
TRIES = 100
BATCH = 64
EACH_SECONDS = 0.001
"""More time for each entry that is set: that is several round trips."""
LARGEST_NBYTES = 1 << 20
UNKNOWN = b"?"
"""For the members of a group that has lost its list: nothing follows from who is missing there."""

_HEAD = struct.Struct(f"<d{NAME_NBYTES}s{STAMP_NBYTES}s")
_NOBODY, _NO_STAMP = bytes(NAME_NBYTES), bytes(STAMP_NBYTES)

T = TypeVar("T")


class _Seen(NamedTuple):
    """What lies under a name, and the number that it must still have to be replaced."""

    data: bytes
    version: bytes

    @property
    def lives(self) -> bool:
        return len(self.data) >= _HEAD.size and bool(_HEAD.unpack_from(self.data)[0] > time.time())

    @property
    def place(self) -> bytes:
        """Group and stamp."""
        return self.data[8 : _HEAD.size]

    @property
    def body(self) -> bytes:
        return self.data[_HEAD.size :]


class MemcachedIndex(Index):
    """On the nodes of ``store``, which opens and closes the connections."""

    def __init__(self, store: MemcachedStore) -> None:
        self._store = store
        self._write_seconds = write_seconds(store.lookup_timeout, store.save_timeout)
        self._entry = store.prefix.encode() + b":v:"
        self._group = store.prefix.encode() + b":g:"

    def get_many(self, names: Sequence[bytes]) -> list[Found | None]:
        def work(wire: Wire, group: Sequence[int]) -> list[Found | None]:
            found: list[Found | None] = []
            for start in range(0, len(group), BATCH):
                some = [self._entry + names[index].hex().encode() for index in group[start : start + BATCH]]
                wire.send([b"".join(b"mg %b v c\r\n" % name for name in some)])
                found += [_found(_read(wire)) for _ in some]
            return found

        return self._store.ask([BlockKey(name) for name in names], self._store.lookup_timeout, work)

    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        """A name joins its group before it is set, so a group that is empty has no name that stands."""
        stamp = os.urandom(STAMP_NBYTES)
        for item in items:
            if item.group is not None:
                self._members(item.group, join=item.name + stamp)
        names = [item.name for item in items]

        def work(wire: Wire, group: Sequence[int]) -> list[bytes]:
            return [self._set(wire, items[index], stamp) for index in group]

        seconds = self._write_seconds + EACH_SECONDS * len(items)
        old: list[bytes | None] = self._store.ask([BlockKey(name) for name in names], seconds, work)
        if None in old:
            raise _silent()
        groups = {item.group for item in items}
        return [group for group in self._leave(list(zip(old, names, strict=True))) if group not in groups]

    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        def work(wire: Wire, key: bytes) -> tuple[bool, bytes] | None:
            seen = _look(wire, key)
            if seen is None:
                return False, b""
            return (seen.lives, seen.place) if _delete(wire, key, seen) else None

        gone = self._repeat(name, work, self._write_seconds)
        if gone is None:
            raise _silent()
        there, place = gone
        return there, self._leave([(place, name)])

    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        def work(wire: Wire, key: bytes) -> bool:
            seen = _look(wire, key)
            return (seen is None or not seen.lives) and _store(wire, key, _data(Item(name, body, life)), life, seen)

        return bool(self._repeat(name, work))

    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        def work(wire: Wire, key: bytes) -> bool:
            seen = _look(wire, key)
            mine = seen is not None and seen.lives and seen.body == body
            return mine and _store(wire, key, _data(Item(name, body, life)), life, seen)

        return bool(self._repeat(name, work))

    def release(self, name: bytes, body: bytes) -> bool:
        def work(wire: Wire, key: bytes) -> bool:
            seen = _look(wire, key)
            return seen is not None and seen.lives and seen.body == body and _delete(wire, key, seen)

        return bool(self._repeat(name, work))

    def members(self, group: bytes) -> list[bytes]:
        joined = self._members(group) or UNKNOWN
        starts = range(0, len(joined) - len(UNKNOWN), MEMBER_NBYTES)
        return list({joined[at : at + NAME_NBYTES]: None for at in starts})

    def names(self) -> list[bytes]:
        end = len(self._entry) + 2 * NAME_NBYTES
        found = {name for name in self._store.dump() if name.startswith(self._entry) and len(name) == end}
        names = [name[len(self._entry) :] for name in sorted(found)]
        return [bytes.fromhex(name.decode()) for name in names if not name.strip(b"0123456789abcdef")]

    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        def work(wire: Wire, key: bytes) -> bool | None:
            seen = _look(wire, key)
            if seen is None or not seen.lives or seen.body != old:
                return False
            until = _HEAD.unpack_from(seen.data)[0]
            life = None if until == math.inf else until - time.time()
            return _store(wire, key, seen.data[: _HEAD.size] + new, life, seen) or None

        return bool(self._repeat(name, work, self._write_seconds))

    def ping(self) -> None:
        self._store.ping()

    def _set(self, wire: Wire, item: Item, stamp: bytes) -> bytes:
        """Replace an entry; where the old one was."""
        key = self._entry + item.name.hex().encode()
        for _ in range(TRIES):
            seen = _look(wire, key)
            if _store(wire, key, _data(item, stamp), item.life, seen):
                return seen.place if seen is not None else b""
        raise StoreError("others replace this entry all the time")

    def _members(self, group: bytes, *, join: bytes = b"", leave: bytes = b"") -> bytes | None:
        """The members, after one has joined or left. None if they are not known."""

        def work(wire: Wire, key: bytes) -> bytes | None:
            seen = _look(wire, key)
            old = b"" if seen is None else seen.data
            members = [old[at : at + MEMBER_NBYTES] for at in range(0, len(old), MEMBER_NBYTES)]
            if not join and leave not in members:
                return old or UNKNOWN
            members = [member for member in members if member != leave][-MOST_MEMBERS:] + ([join] if join else [])
            new = b"".join(members)
            stored = _store(wire, key, new, None, seen) if new or seen is None else _delete(wire, key, seen)
            return new if stored else None

        return self._repeat(group, work, self._write_seconds, head=self._group)

    def _leave(self, places: Sequence[tuple[bytes | None, bytes]]) -> list[bytes]:
        """Take names out of the groups in which they were; the groups that are empty now."""
        empty = set()
        for place, name in places:
            if place and place[:NAME_NBYTES] != _NOBODY:
                group, stamp = place[:NAME_NBYTES], place[NAME_NBYTES:]
                if self._members(group, leave=name + stamp) == b"":
                    empty.add(group)
        return list(empty)

    def _repeat(
        self, name: bytes, work: Callable[[Wire, bytes], T | None], seconds: float = 0.0, *, head: bytes = b""
    ) -> T | None:
        """``work`` until it does not say None: somebody else was quicker. None if its node is out of order."""
        key = (head or self._entry) + name.hex().encode()

        def until_done(wire: Wire, group: Sequence[int]) -> list[T]:
            for _ in range(TRIES):
                done = work(wire, key)
                if done is not None:
                    return [done]
            raise StoreError("others replace this entry all the time")

        (answer,) = self._store.ask([BlockKey(name)], seconds or self._store.lookup_timeout, until_done)
        return answer  # type: ignore[no-any-return]


def _silent() -> NodeError:
    return NodeError("a node of Memcached did not answer", cause="unreachable")


def _data(item: Item, stamp: bytes = _NO_STAMP) -> bytes:
    until = math.inf if item.life is None else time.time() + item.life
    return _HEAD.pack(until, item.group or _NOBODY, stamp) + item.body


def _found(seen: _Seen | None) -> Found | None:
    if seen is None or not seen.lives:
        return None
    until = _HEAD.unpack_from(seen.data)[0]
    return Found(seen.body, None if until == math.inf else until - time.time())


def _look(wire: Wire, key: bytes) -> _Seen | None:
    wire.send([b"mg %b v c\r\n" % key])
    return _read(wire)


def _read(wire: Wire) -> _Seen | None:
    words = _line(wire).split()
    if words == [b"EN"]:
        return None
    if len(words) != 3 or words[0] != b"VA" or not words[1].isdigit() or int(words[1]) > LARGEST_NBYTES:
        raise garbage(b" ".join(words))
    data = wire.value(memoryview(bytearray(int(words[1]))))
    return _Seen(bytes(data), words[2][1:])


def _store(wire: Wire, key: bytes, data: bytes, life: float | None, seen: _Seen | None) -> bool:
    """Replace what was ``seen``, or add where there was nothing; has nobody else been quicker?"""
    expiry = expiry_of(0 if life is None else math.ceil(life) + 1)
    condition = b"ME" if seen is None else b"C" + seen.version
    wire.send([b"ms %b %d T%d %b\r\n" % (key, len(data), expiry, condition), data, b"\r\n"])
    return _line(wire) == b"HD"


def _delete(wire: Wire, key: bytes, seen: _Seen) -> bool:
    wire.send([b"md %b C%b\r\n" % (key, seen.version)])
    return _line(wire) == b"HD"


def _line(wire: Wire) -> bytes:
    line = wire.line().rstrip()
    if line.startswith(b"SERVER_ERROR"):
        full = b"memory" in line or b"too large" in line
        raise StoreError("Memcached refused an entry of the index", cause="full" if full else "error")
    if line.startswith((b"ERROR", b"CLIENT_ERROR")):
        raise garbage(line)
    return line
