"""Redis and Valkey: values as whole frames, for every process and machine that can reach the server.

::

    PREFIX:{KEY}              a value of up to 7 MiB, as it is
    PREFIX:{KEY}              or a manifest: magic, the value's bytes, a part's bytes, a token
    PREFIX:{KEY}:TOKEN.N      part N of a larger value: from 8 MiB on a byte costs a server two to three times as much

KEY and TOKEN are hexadecimal; the braces keep a value's parts in one slot of a cluster. A token is drawn for
each put, so two writers never mix parts. Parts expire after ten minutes unless the manifest, which is written last, has
been accepted: a value is visible only when it is whole. Nothing outside ``PREFIX:`` is touched.

The server evicts (``maxmemory`` with ``allkeys-lru``); this store has no capacity. Every call has a deadline, and
every failure is a :class:`~kvkeep.errors.StoreError` with a cause.
"""

from __future__ import annotations

import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from kvkeep.buffers import Buffer, BufferPool, as_bytes, nbytes_of
from kvkeep.errors import ConfigError, StoreError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Item, Store
from kvkeep.stores.redis_cluster import Cluster
from kvkeep.stores.redis_servers import CONNECT_SECONDS, STORE_OPTIONS, Server, connect, failure, parse
from kvkeep.stores.redis_wire import Wire, outcome, pack, word
from kvkeep.stores.url import number

__all__ = ["RedisStore", "connect"]

WHOLE_NBYTES = (7 << 20) - 4096
"""The largest value that is stored as it is: from 8 MiB on, jemalloc gives memory back to the system at once, so that
each value lands on fresh pages."""

PART_NBYTES = 4 << 20
"""The largest part. A value's parts are of one size, so that the room of an evicted one fits the next."""

LARGEST_NBYTES = (1 << 30) + (1 << 20)
"""Of a value in parts: a frame's largest payload, and room for a header."""

MAGIC = b"kvkeep parts 1\r\n"
_MANIFEST = struct.Struct("<16sQQ16s")

PART_SECONDS = 600
"""How long parts wait for their manifest."""

DEPTH = 2
"""Values asked for ahead: deeper pipelines of large values cost Redis 7 more a byte."""

SCAN_COUNT = 1000

LOOKUP_KEYS = 5000
"""A lookup of more keys may take longer: a server needs about half a microsecond for each."""


FIRST_SECONDS = 1.0
"""How long whoever opens a store waits at most for its first connection."""


def draw_token() -> bytes:
    return os.urandom(16)


class RedisStore(Store):
    """``RedisStore("redis://host:6379/0", ttl=3600)``; an option may also stand in the address: ``?ttl=3600``."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "kvkeep",
        ttl: float | None = None,
        lookup_timeout: float = 0.05,
        load_timeout: float = 0.1,
        save_timeout: float = 2.0,
        connect_timeout: float = CONNECT_SECONDS,
        rate: float = 50e6,
        token: Callable[[], bytes] = draw_token,
    ) -> None:
        """``ttl``: seconds a value lives, for ever if None. A lookup has ``lookup_timeout`` seconds, a load or a save
        its own, and what its bytes take at ``rate`` bytes a second. ``connect_timeout`` is for what happens in the
        background. ``token``: 16 bytes that nobody else draws."""
        if not re.fullmatch(r"[A-Za-z0-9._:/-]+", prefix):
            raise ConfigError(f"prefix {prefix!r}: letters, digits and . _ : / - only")
        for name, seconds in (("lookup_timeout", lookup_timeout), ("load_timeout", load_timeout),
                              ("save_timeout", save_timeout), ("connect_timeout", connect_timeout),
                              ("rate", rate), ("ttl", 1.0 if ttl is None else ttl)):  # fmt: skip
            number(name, seconds)
        self.prefix = prefix
        self._ttl = None if ttl is None else max(1, round(ttl * 1000))
        self.lookup_timeout, self._load_timeout, self.save_timeout = lookup_timeout, load_timeout, save_timeout
        self._connect_timeout, self._rate, self._token = connect_timeout, rate, token
        address = parse(url)
        self._where = str(address)
        self.servers = (Cluster if address.kind == "cluster" else Server)(address, connect_timeout, prefix.encode())
        # TLS, or a server that is far away, takes longer to connect to than the first question may.
        self.servers.await_first(min(connect_timeout, FIRST_SECONDS))
        self._head = prefix.encode() + b":{"
        self._pool = BufferPool()
        self._closed = False
        _open.add(self)

    @classmethod
    def from_url(cls, url: str, *, ttl: float | None = None) -> RedisStore:
        options: dict[str, Any] = {} if ttl is None else {"ttl": ttl}
        for name, text in parse(url).options.items():
            if name == "prefix":
                options[name] = text
            elif name in STORE_OPTIONS:
                options[name] = number(name, text)
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"RedisStore({self._where}, prefix={self.prefix!r})"

    # Questions

    def contains(self, key: BlockKey) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """One round trip a server: EXISTS of each key by hand, 20 times as fast as through a client's pipeline."""
        self._check_open()
        if not keys:
            return []
        names = self.names(keys)
        head = b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n" % len(names[0])

        def work(wire: Wire, group: Sequence[int]) -> Sequence[Any]:
            asked = names if len(group) == len(names) else [names[index] for index in group]
            wire.send([head + (b"\r\n" + head).join(asked) + b"\r\n"])
            return wire.outcomes(len(group))

        seconds = self.lookup_timeout * (1 + len(keys) // LOOKUP_KEYS)
        return [reply == b":1" for reply in self.servers.ask(names, seconds, work)]

    def get(self, key: BlockKey) -> Buffer | None:
        with self.read([key]) as (value,):
            return None if value is None else bytes(value)

    def get_many(self, keys: Sequence[BlockKey]) -> list[Buffer | None]:
        with self.read(keys) as values:
            return [None if value is None else bytes(value) for value in values]

    def get_into(self, key: BlockKey, out: memoryview) -> int | None:
        """Received where it shall lie."""
        self._check_open()
        with ExitStack() as stack:

            def room(_: int, nbytes: int) -> memoryview:
                here = nbytes <= len(out) and nbytes != _MANIFEST.size  # which may be too small for what it announces
                return out if here else stack.enter_context(self._pool.borrow(nbytes))

            (value,) = self._get(self.names([key]), room)
            manifest = None if value is None else Manifest.parse(value)
            nbytes = len(value or b"") if manifest is None else manifest.nbytes
            if nbytes > len(out):
                raise ValueError(f"a value of {nbytes} bytes does not fit into {len(out)}")
            if manifest is not None:
                value = self._join(key, manifest, out[:nbytes], stack)
            elif nbytes == _MANIFEST.size and value is not None:
                out[:nbytes] = value
            return None if value is None else nbytes

    @contextmanager
    def read(self, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
        self._check_open()
        with ExitStack() as stack:
            values = self._get(self.names(keys), lambda _, nbytes: stack.enter_context(self._pool.borrow(nbytes)))
            for at, value in enumerate(values):
                manifest = None if value is None else Manifest.parse(value)
                if manifest is not None:
                    out = stack.enter_context(self._pool.borrow(manifest.nbytes))
                    values[at] = self._join(keys[at], manifest, out, stack)
            yield [None if value is None else value.toreadonly() for value in values]

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """By SCAN, so without order, and slow on a server that holds much else."""
        found: dict[BlockKey, int] = {}
        # A value's name ends in a brace, a part's does not.
        listed = [name for name in self.scan(self._head + b"*}") if len(name) == len(self._head) + 65]
        for start in range(0, len(listed), SCAN_COUNT):
            batch = listed[start : start + SCAN_COUNT]
            sizes = self._tell([pack(b"STRLEN", name) for name in batch], batch, self.save_timeout)
            for name, line in zip(batch, sizes, strict=True):
                key = BlockKey(bytes.fromhex(name[len(self._head) : -1].decode()))
                nbytes = int((line or b":0")[1:])
                if nbytes == _MANIFEST.size:  # perhaps a manifest
                    manifest = self._manifest(key)
                    nbytes = nbytes if manifest is None else manifest.nbytes
                if nbytes:  # else it has vanished meanwhile
                    found[key] = nbytes
        return iter(list(found.items()))

    def scan(self, pattern: bytes) -> list[bytes]:
        """The names of all that lies there and fits, whoever put it there."""
        self._check_open()
        import redis

        try:
            return sorted(set(self.servers.client.scan_iter(match=pattern, count=SCAN_COUNT)))
        except (redis.RedisError, OSError) as error:
            raise failure(error) from None

    def ping(self) -> None:
        """Connects anew where needed, without haste. Of a cluster, one node that is well suffices."""
        self._check_open()
        self.servers.ping(self._connect_timeout)

    def ping_writes(self) -> None:
        self._check_open()
        self.servers.ping_writes(self._connect_timeout)

    # Commands

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.put_many([(key, parts)])

    def put_many(self, items: Sequence[Item]) -> int:
        self._check_open()
        sizes = [nbytes_of(list(parts)) for _, parts in items]
        if sizes and max(sizes) > LARGEST_NBYTES:
            raise ValueTooLargeError(f"{max(sizes)} bytes: the largest value is {LARGEST_NBYTES}")
        whole: list[tuple[bytes, Sequence[Buffer]]] = []
        for (key, parts), size in zip(items, sizes, strict=True):
            views = [as_bytes(part) for part in parts]
            if size > WHOLE_NBYTES or _begins(views, MAGIC):  # what looks like a manifest is never stored as it is
                self._put_in_parts(key, views)
            else:
                whole.append((self._name(key), views))
        if whole:
            self._set(whole, self._ttl)
        return len(items)

    def delete(self, key: BlockKey) -> bool:
        self._check_open()
        return self._forget(key, self._manifest(key))

    def after_fork(self) -> None:
        self.servers.reset()
        self._pool = BufferPool()

    def close(self) -> None:
        self._closed = True
        self.servers.close()
        _open.discard(self)

    # What they are made of

    def _name(self, key: BlockKey) -> bytes:
        return self._head + key.hex().encode() + b"}"

    def names(self, keys: Sequence[BlockKey]) -> list[bytes]:
        head = self._head.decode()
        return [f"{head}{key.hex()}}}".encode() for key in keys]

    def _get(self, names: Sequence[bytes], room: Callable[[int, int], memoryview]) -> list[memoryview | None]:
        """The values of ``names``, received into ``room(index, nbytes)``."""

        def work(wire: Wire, group: Sequence[int]) -> Sequence[Any]:
            asked = [pack(b"GET", names[index]) for index in group]
            wire.send(asked[:DEPTH])
            replies: list[Any] = []
            for at, index in enumerate(group):
                reply = wire.bulk(partial(room, index), WHOLE_NBYTES, self._rate)
                replies.append(outcome(reply) if isinstance(reply, bytes) else reply)
                if at + DEPTH < len(asked):
                    wire.send([asked[at + DEPTH]])
            return replies

        return list(self.servers.ask(names, self._load_timeout, work))

    def _manifest(self, key: BlockKey) -> Manifest | None:
        """Of ``key``, if it is stored in parts."""
        name = self._name(key)

        def first(wire: Wire, group: Sequence[int]) -> Sequence[Any]:
            wire.send([pack(b"GETRANGE", name, b"0", b"%d" % (_MANIFEST.size - 1))])
            reply = wire.bulk(lambda nbytes: memoryview(bytearray(nbytes)), _MANIFEST.size, self._rate)
            return [outcome(reply) if isinstance(reply, bytes) else reply]

        (start,) = self.servers.ask([name], self._load_timeout, first)
        return None if start is None else Manifest.parse(start)

    def _join(self, key: BlockKey, manifest: Manifest, out: memoryview, stack: ExitStack) -> memoryview | None:
        """The value in parts, in ``out``. One that has lost a part is forgotten."""
        places = list(_cut([out], manifest.part_nbytes))

        def room(index: int, found: int) -> memoryview:
            (place,) = places[index]
            return place if len(place) == found else stack.enter_context(self._pool.borrow(found))

        got = self._get(manifest.names(self._name(key)), room)
        if [len(part or b"") for part in got] != [len(place) for (place,) in places]:
            self._forget(key, manifest)
            return None
        return out

    def _set(self, values: Sequence[tuple[bytes, Sequence[Buffer]]], milliseconds: int | None) -> list[bytes | None]:
        """SET … NX of each name, not joining its buffers: ``+OK``, ``$-1`` if it was there, None if it went nowhere."""
        expiry = b"" if milliseconds is None else b"$2\r\nPX\r\n" + word(b"%d" % milliseconds)
        words = 4 if milliseconds is None else 6
        tail = b"\r\n$2\r\nNX\r\n" + expiry

        def work(wire: Wire, group: Sequence[int]) -> Sequence[Any]:
            buffers: list[Buffer] = []
            for index in group:
                name, parts = values[index]
                buffers += [
                    b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n" % (words, word(name), nbytes_of(list(parts))),
                    *parts,
                    tail,
                ]
            wire.send(buffers)
            return wire.outcomes(len(group))

        total = sum(nbytes_of(list(parts)) for _, parts in values)
        seconds = self.save_timeout + total / self._rate
        return list(self.servers.ask([name for name, _ in values], seconds, work))

    def _put_in_parts(self, key: BlockKey, views: Sequence[memoryview]) -> None:
        name = self._name(key)
        nbytes = sum(map(len, views))
        count = -(-nbytes // PART_NBYTES)
        manifest = Manifest(nbytes, -(-nbytes // count), self._token())
        parts = manifest.names(name)
        pieces = _cut(views, manifest.part_nbytes)
        self._set(list(zip(parts, pieces, strict=True)), PART_SECONDS * 1000)
        expiry = [] if self._ttl is None else [b"PX", b"%d" % self._ttl]
        publish = pack(b"SET", name, manifest.packed(), b"NX", *expiry)
        keep = [pack(b"PERSIST", part) if self._ttl is None else pack(b"PEXPIRE", part, expiry[1]) for part in parts]
        replies = self._tell([publish, *keep], [name, *parts], self.save_timeout)
        if replies[0] == b"$-1":  # another writer was first
            self._tell([pack(b"UNLINK", part) for part in parts], parts, self.save_timeout)

    def _forget(self, key: BlockKey, manifest: Manifest | None) -> bool:
        """Delete ``key``, with its parts where there is a ``manifest``; was it there?"""
        names = [self._name(key)]
        if manifest is not None:
            names += manifest.names(names[0])
        replies = self._tell([pack(b"UNLINK", name) for name in names], names, self.save_timeout)
        return bool(replies[0] == b":1")

    def _tell(self, commands: Sequence[bytes], names: Sequence[bytes], seconds: float) -> Sequence[Any]:
        """The replies, of one line each, to commands on ``names``."""

        def work(wire: Wire, group: Sequence[int]) -> Sequence[Any]:
            wire.send([b"".join(commands[index] for index in group)])
            return wire.outcomes(len(group))

        return self.servers.ask(names, seconds, work)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("this store is closed", cause="closed")


class Manifest(NamedTuple):
    """What stands in the place of a value in parts."""

    nbytes: int
    part_nbytes: int
    token: bytes

    @classmethod
    def parse(cls, data: Buffer) -> Manifest | None:
        """None if it is a value that happens to be as long, or a manifest that cannot be ours."""
        if len(data) == _MANIFEST.size:
            magic, nbytes, part_nbytes, token = _MANIFEST.unpack(data)
            fits = part_nbytes == nbytes or part_nbytes > PART_NBYTES // 2
            if magic == MAGIC and 0 < nbytes <= LARGEST_NBYTES and fits and part_nbytes <= WHOLE_NBYTES:
                return cls(nbytes, part_nbytes, token)
        return None

    def packed(self) -> bytes:
        return _MANIFEST.pack(MAGIC, *self)

    def names(self, name: bytes) -> list[bytes]:
        """Of the parts of what is called ``name``."""
        count = -(-self.nbytes // self.part_nbytes)
        return [b"%b:%b.%d" % (name, self.token.hex().encode(), number) for number in range(count)]


def _cut(views: Sequence[memoryview], nbytes: int) -> Iterator[list[memoryview]]:
    """``views``, one after the other, in pieces of ``nbytes``; the last may be shorter."""
    piece: list[memoryview] = []
    room = nbytes
    for view in views:
        rest = view
        while len(rest):
            piece.append(rest[:room])
            rest = rest[room:]
            room -= len(piece[-1])
            if not room:
                yield piece
                piece, room = [], nbytes
    if piece:
        yield piece


def _begins(views: Sequence[memoryview], start: bytes) -> bool:
    first = b""
    for view in views:
        first += view[: len(start) - len(first)]
        if len(first) == len(start):
            break
    return first == start


_open: weakref.WeakSet[RedisStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_open):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)
