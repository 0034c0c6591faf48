"""The index of a Redis or Valkey server, or of a cluster of them, over the connections of the store beside it.

::

    PREFIX:v:NAME     group (32 bytes, zero if none), stamp (8 bytes), body; expires by itself
    PREFIX:g:GROUP    the set of the group's members, each a name and a stamp; expires with the last of them

NAME and GROUP are hexadecimal. A stamp is of one setting of a name, so who replaces it takes that one out of its group
and none that came later. Each change is one script on one key, which the server runs as a whole, so it does
not matter on which node of a cluster a key lies. Scripts go by their text: the server has compiled them after the first
time. Time is the server's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kvkeep.errors import NodeError
from kvkeep.stores.redis import RedisStore
from kvkeep.stores.redis_servers import Work
from kvkeep.stores.redis_wire import Redirect, Wire, garbage, outcome, pack
from kvkeep.values.index import NAME_NBYTES, Found, Index, Item, write_seconds

STAMP_NBYTES = 8
_PLACE_NBYTES = NAME_NBYTES + STAMP_NBYTES  # of an entry before its body
_NOWHERE = bytes(_PLACE_NBYTES)
BATCH = 500
LARGEST_NBYTES = 64 << 20
RATE = 50e6

# Every script answers with a text.
_SET = b"""local old = redis.call('GETRANGE', KEYS[1], 0, 39)
if ARGV[2] == '' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return old"""
_DELETE = b"""local old = redis.call('GETRANGE', KEYS[1], 0, 39)
return redis.call('DEL', KEYS[1]) .. old"""
_ADD = b"""local set
if ARGV[2] == '' then set = redis.call('SET', KEYS[1], ARGV[1], 'NX')
else set = redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) end
return set and '1' or '0'"""
_RENEW = b"""if redis.call('GET', KEYS[1]) ~= ARGV[1] then return '0' end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return '1'"""
_RELEASE = b"""if redis.call('GET', KEYS[1]) ~= ARGV[1] then return '0' end
redis.call('DEL', KEYS[1])
return '1'"""
_REPLACE = b"""local v = redis.call('GET', KEYS[1])
if not v or string.sub(v, 41) ~= ARGV[1] then return '0' end
redis.call('SET', KEYS[1], string.sub(v, 1, 40) .. ARGV[2], 'KEEPTTL')
return '1'"""
_JOIN = b"""local left = redis.call('PTTL', KEYS[1])
redis.call('SADD', KEYS[1], ARGV[1])
if ARGV[2] == '' then redis.call('PERSIST', KEYS[1])
elseif left == -2 or (left >= 0 and left < tonumber(ARGV[2])) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return '1'"""
_LEAVE = b"""if redis.call('SREM', KEYS[1], ARGV[1]) == 0 then return '-1' end
return tostring(redis.call('SCARD', KEYS[1]))"""
_MEMBERS = b"return table.concat(redis.call('SMEMBERS', KEYS[1]))"

Call = tuple[bytes, bytes, tuple[bytes, ...]]
"""A script, its key and its arguments."""


class RedisIndex(Index):
    """On the servers of ``store``, which opens and closes the connections."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._write_seconds = write_seconds(store.lookup_timeout, store.save_timeout)
        self._entry = store.prefix.encode() + b":v:"
        self._set = store.prefix.encode() + b":g:"

    def get_many(self, names: Sequence[bytes]) -> list[Found | None]:
        """PTTL and GET, which a server answers in half the time of a script. Of an entry that is replaced between the
        two, the new body comes with what was left of the old one: it is fresh, and may count as too old this once."""
        found: list[Found | None] = []
        for start in range(0, len(names), BATCH):
            keys = [self._name(name) for name in names[start : start + BATCH]]

            def work(wire: Wire, group: Sequence[int], keys: Sequence[bytes] = keys) -> Sequence[Any]:
                wire.send([b"".join(pack(b"PTTL", keys[at]) + wire.asking + pack(b"GET", keys[at]) for at in group)])
                return [_entry(wire) for _ in group]

            found += self._replies(keys, self._store.lookup_timeout, work)
        return found

    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        """A name joins its group before it is set, so a group that is empty has no name that stands; but for one whose
        group lies on a node that is out of order, which is set nevertheless."""
        stamp = os.urandom(STAMP_NBYTES)
        joining = [
            (_JOIN, self._group(item.group), (item.name + stamp, _milliseconds(item.life)))
            for item in items
            if item.group is not None
        ]
        setting = [
            (_SET, self._name(item.name), (_place(item, stamp) + item.body, _milliseconds(item.life))) for item in items
        ]
        self._ask(joining, self._write_seconds)
        old = self._ask(setting, self._write_seconds)
        groups = {item.group for item in items}
        left = [(place or b"", item.name) for item, place in zip(items, old, strict=True)]
        empty = [group for group in self._leave(left) if group not in groups]
        if None in old:
            raise _silent()
        return empty

    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        reply = self._ask_one((_DELETE, self._name(name), ()), self._write_seconds)
        return reply[:1] == b"1", self._leave([(reply[1:], name)])

    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        return self._ask_one((_ADD, self._name(name), (_NOWHERE + body, _milliseconds(life)))) == b"1"

    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        return self._ask_one((_RENEW, self._name(name), (_NOWHERE + body, _milliseconds(life)))) == b"1"

    def release(self, name: bytes, body: bytes) -> bool:
        return self._ask_one((_RELEASE, self._name(name), (_NOWHERE + body,))) == b"1"

    def members(self, group: bytes) -> list[bytes]:
        joined = self._ask_one((_MEMBERS, self._group(group), ()))
        return list({joined[at : at + NAME_NBYTES]: None for at in range(0, len(joined), _PLACE_NBYTES)})

    def names(self) -> list[bytes]:
        start, end = len(self._entry), len(self._entry) + 2 * NAME_NBYTES
        found = [key[start:] for key in self._store.scan(self._entry + b"*") if len(key) == end]
        return [bytes.fromhex(name.decode()) for name in found if not name.strip(b"0123456789abcdef")]

    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        return self._ask_one((_REPLACE, self._name(name), (old, new)), self._write_seconds) == b"1"

    def ping(self) -> None:
        self._store.ping()

    def ping_writes(self) -> None:
        self._store.ping_writes()

    def _leave(self, places: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Take names out of the groups in which they were; the groups that are empty now."""
        left = [(place, name) for place, name in places if len(place) == _PLACE_NBYTES and place != _NOWHERE]
        calls = [(_LEAVE, self._group(place[:NAME_NBYTES]), (name + place[NAME_NBYTES:],)) for place, name in left]
        replies = self._ask(calls, self._write_seconds)
        return list({place[:NAME_NBYTES] for (place, _), reply in zip(left, replies, strict=True) if reply == b"0"})

    def _name(self, name: bytes) -> bytes:
        return self._entry + name.hex().encode()

    def _group(self, group: bytes) -> bytes:
        return self._set + group.hex().encode()

    def _ask_one(self, call: Call, seconds: float | None = None) -> bytes:
        (reply,) = self._ask([call], seconds)
        if reply is None:
            raise _silent()
        return reply

    def _ask(self, calls: Sequence[Call], seconds: float | None = None) -> list[bytes | None]:
        """Each script's answer, in as few round trips as there are batches and nodes. None where a node of a cluster
        does not answer while others are well."""
        seconds = self._store.lookup_timeout if seconds is None else seconds
        replies: list[bytes | None] = []
        for start in range(0, len(calls), BATCH):
            batch = calls[start : start + BATCH]

            def work(wire: Wire, group: Sequence[int], batch: Sequence[Call] = batch) -> Sequence[Any]:
                asked = [batch[index] for index in group]
                wire.send([b"".join(pack(b"EVAL", script, b"1", key, *words) for script, key, words in asked)])
                return [_answer(wire) for _ in asked]

            found = self._replies([key for _, key, _ in batch], seconds, work)
            replies += [None if reply is None else bytes(reply) for reply in found]
        return replies

    def _replies(self, keys: Sequence[bytes], seconds: float, work: Work) -> Sequence[Any]:
        try:
            return self._store.servers.ask(keys, seconds, work)
        except NodeError:  # all lie there
            return [None] * len(keys)


def _silent() -> NodeError:
    return NodeError("a node of the cluster does not answer", cause="unreachable")


def _entry(wire: Wire) -> Found | Redirect | None:
    """The answers to PTTL and GET of one key."""
    left = outcome(wire.line())
    if wire.asking:
        wire.line()
    value = _answer(wire)
    if isinstance(left, Redirect) or isinstance(value, Redirect):
        return left if isinstance(left, Redirect) else value
    if left[:1] != b":" or not left[1:].removeprefix(b"-").isdigit():
        raise garbage(left)
    milliseconds = int(left[1:])  # -1: for ever, -2: there is none
    if value is None or milliseconds == -2 or len(value) < _PLACE_NBYTES:
        return None
    return Found(bytes(value[_PLACE_NBYTES:]), None if milliseconds < 0 else milliseconds / 1000)


def _answer(wire: Wire) -> Any:
    reply = wire.bulk(lambda nbytes: memoryview(bytearray(nbytes)), LARGEST_NBYTES, RATE)
    return outcome(reply) if isinstance(reply, bytes) else reply


def _place(item: Item, stamp: bytes) -> bytes:
    return _NOWHERE if item.group is None else item.group + stamp


def _milliseconds(life: float | None) -> bytes:
    return b"" if life is None else b"%d" % max(1, round(life * 1000))
