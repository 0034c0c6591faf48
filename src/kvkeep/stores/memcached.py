"""Memcached: values as whole frames, spread over the nodes by a consistent hash.

::

    PREFIX:KEY          a value of at most 1 MB (what a node takes by default), as it is
    PREFIX:KEY          or a manifest: magic, the value's bytes, the xxh3-128 of each part
    PREFIX:KEY:DIGEST   a part, on the same node

A part's name is its content and the manifest is added last, so a value is visible only when it is whole, and two
writers never mix parts. uhashring places the keys (ketama): one node more moves its share of them and no others.

A node that fails is taken out of the ring: its keys are misses, then live elsewhere; once a second it is asked whether
it is back. Only when no node is left is it a :class:`~kvkeep.errors.StoreError`. The protocol is memcached's meta
commands (1.6 and later), written here, since pymemcache can neither look up 1,000 keys without fetching their values
nor bound the time of a whole exchange (its ``raw_command`` loses what does not arrive at once).

::

    memcached://a:11211,b:11211?prefix=kvkeep&ttl=3600&lookup_timeout=0.05&load_timeout=0.1&save_timeout=2&rate=50e6
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import xxhash

from kvkeep.buffers import Buffer, BufferPool, nbytes_of
from kvkeep.errors import ConfigError, StoreError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Item, Store
from kvkeep.stores.redis_wire import Wire, garbage
from kvkeep.stores.url import options

PART_NBYTES = (1 << 20) - (4 << 10)
"""Under the usual limit of an item (``-I 1m``) with its name and header."""

LARGEST_NBYTES = (1 << 30) + (1 << 20)
MAGIC = b"kvkeep parts 1\r\n"
_MANIFEST = struct.Struct("<16sQ")
_DIGEST_NBYTES = 16

DEPTH = 4
"""Values asked for ahead."""

IDLE_WIRES = 8
"""Connections to a node that are kept."""

MONTH = 30 * 86400
"""Memcached takes a longer time to live for a date."""

NUMBERS = ("ttl", "lookup_timeout", "load_timeout", "save_timeout", "rate")

Reply = TypeVar("Reply")


class MemcachedStore(Store):
    """``MemcachedStore([("a", 11211), ("b", 11211)])``."""

    def __init__(
        self,
        nodes: Sequence[tuple[str, int]],
        *,
        prefix: str = "kvkeep",
        ttl: float | None = None,
        lookup_timeout: float = 0.05,
        load_timeout: float = 0.1,
        save_timeout: float = 2.0,
        rate: float = 50e6,
    ) -> None:
        """Deadlines as those of :class:`~kvkeep.stores.redis.RedisStore`: a load or a save has its own seconds, and
        what its bytes take at ``rate`` bytes a second."""
        try:
            import uhashring
        except ImportError as error:
            raise ConfigError("Memcached needs uhashring: pip install 'kvkeep[memcached]'") from error
        if not nodes:
            raise ConfigError("an address of Memcached names its nodes: memcached://a:11211,b:11211")
        if not prefix.isascii() or not prefix.isprintable() or " " in prefix or not 0 < len(prefix) <= 100:
            raise ConfigError(f"prefix {prefix!r}: 1 to 100 printable ASCII characters without spaces")
        self.prefix = prefix
        self._ttl = ttl
        self.lookup_timeout, self._load_timeout, self.save_timeout = lookup_timeout, load_timeout, save_timeout
        self._rate = rate
        self._nodes = {f"{host}:{port}": _Node(host, port) for host, port in nodes}
        self._new_ring: Callable[..., Any] = uhashring.HashRing
        self._head = prefix.encode() + b":"
        self._closed = False
        self._start()
        _open.add(self)

    def _start(self) -> None:
        self._pool = BufferPool()
        self._lock = threading.Lock()
        self._down: dict[str, StoreError] = {}
        self._ring = self._new_ring(list(self._nodes))

    @classmethod
    def from_url(cls, url: str, *, ttl: float | None = None) -> MemcachedStore:
        hosts, _, query = url.partition("://")[2].partition("?")
        if "@" in hosts:
            raise ConfigError("Memcached is asked without user and password: give it a network of its own")
        told = options(query, "Memcached", texts=("prefix",), numbers=NUMBERS)
        if ttl is not None:
            told.setdefault("ttl", ttl)
        return cls([_host(part) for part in hosts.strip("/").split(",") if part], **told)

    def __repr__(self) -> str:
        return f"MemcachedStore({', '.join(self._nodes)}, prefix={self.prefix!r})"

    # Questions

    def contains(self, key: BlockKey) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        def work(wire: Wire, group: Sequence[int]) -> list[bool]:
            names = [self._name(keys[index]) for index in group]
            wire.send([b"".join(b"mg %b k q\r\n" % name for name in names) + b"mn\r\n"])
            found = set()
            while (line := _line(wire)) != b"MN":
                if line[:4] != b"HD k":
                    raise garbage(line)
                found.add(line[4:])
            return [name in found for name in names]

        return [bool(there) for there in self.ask(keys, self.lookup_timeout, work)]

    def get(self, key: BlockKey) -> Buffer | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[BlockKey]) -> list[Buffer | None]:
        with self.read(keys) as values:
            return [None if value is None else bytes(value) for value in values]

    @contextmanager
    def read(self, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
        with ExitStack() as rooms:

            def work(wire: Wire, group: Sequence[int]) -> list[memoryview | None]:
                got = self._values(wire, [self._name(keys[index]) for index in group], rooms)
                for at, value in enumerate(got):
                    if value is not None and value[: len(MAGIC)] == MAGIC:
                        got[at] = self._join(wire, self._name(keys[group[at]]), value, rooms)
                return got

            yield [value and value.toreadonly() for value in self.ask(keys, self._load_timeout, work)]

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """By the nodes' own dump of their keys, so without order."""
        found: dict[BlockKey, int] = {}
        for name in list(self._up()):
            found.update(self._on(name, self.save_timeout, partial(self._list, self._nodes[name])))
        return iter(list(found.items()))

    def dump(self) -> list[bytes]:
        """The names of all that lies on the nodes that are well, whoever put it there."""
        self._check_open()
        return [name for node in self._up() for name in self._nodes[node].dump(time.monotonic() + self.save_timeout)]

    def ping(self) -> None:
        """Raises :class:`StoreError` unless a node answers; those that do are in the ring again.

        Asks the nodes that failed; all, if none has.
        """
        self._check_open()
        for name in list(self._down or self._nodes):
            self._probe(name)
        if not self._up():
            raise self._no_node()

    # Commands

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.put_many([(key, parts)])

    def put_many(self, items: Sequence[Item]) -> int:
        sizes = [nbytes_of(parts) for _, parts in items]
        if sizes and max(sizes) > LARGEST_NBYTES:
            raise ValueTooLargeError(f"{max(sizes)} bytes: the largest value is {LARGEST_NBYTES}")

        def work(wire: Wire, group: Sequence[int]) -> list[bool]:
            for index in group:
                key, parts = items[index]
                wire.extend(sizes[index] / self._rate)
                self._put(wire, self._name(key), b"".join(parts))
            return [True] * len(group)

        # A node that failed has lost its values: they are given to those that are left.
        left = list(range(len(items)))
        while left:
            done = self.ask([items[index][0] for index in left], self.save_timeout, _renumbered(work, left))
            left = [index for index, stored in zip(left, done, strict=True) if not stored]
        return len(items)

    def delete(self, key: BlockKey) -> bool:
        name = self._name(key)

        def work(wire: Wire, group: Sequence[int]) -> list[bool]:
            with ExitStack() as rooms:
                (start,) = self._values(wire, [name], rooms)
                parts = [] if start is None or start[: len(MAGIC)] != MAGIC else self._parts(name, start)[1]
            wire.send([b"".join(b"md %b\r\n" % each for each in (name, *parts))])
            replies = [_line(wire) for _ in (name, *parts)]
            return [replies[0] == b"HD"]

        return bool(self.ask([key], self.save_timeout, work)[0])

    def maintain(self) -> bool:
        for name in list(self._down):
            self._probe(name)
        return False

    def after_fork(self) -> None:
        for node in self._nodes.values():
            node.reset()
        self._start()

    def close(self) -> None:
        self._closed = True
        for node in self._nodes.values():
            node.drop()
        _open.discard(self)

    def lost(self) -> dict[str, StoreError]:
        """Nodes that are out of the ring, and why."""
        return dict(self._down)

    def settings(self) -> dict[str, dict[str, str]]:
        """What each node says of itself (``stats`` and ``stats settings``), by its name; for ``kvkeep check``."""

        def work(wire: Wire) -> dict[str, str]:
            told = {}
            for command in (b"stats\r\n", b"stats settings\r\n"):
                wire.send([command])
                while (line := _line(wire)) != b"END":
                    _, name, value = (line + b" ").split(b" ", 2)
                    told[name.decode("ascii", "replace")] = value.strip().decode("ascii", "replace")
            return told

        return {name: self._on(name, self.save_timeout, work) for name in list(self._up())}

    # What they are made of

    def _name(self, key: BlockKey) -> bytes:
        return self._head + key.hex().encode()

    def _values(self, wire: Wire, names: Sequence[bytes], rooms: ExitStack) -> list[memoryview | None]:
        """The values of ``names``, which one node has."""
        asked = [b"mg %b v\r\n" % name for name in names]
        wire.send([b"".join(asked[:DEPTH])])
        got: list[memoryview | None] = []
        for at in range(len(names)):
            line = _line(wire)
            if line[:3] == b"VA " and line[3:].isdigit() and int(line[3:]) <= PART_NBYTES:
                nbytes = int(line[3:])
                wire.extend(nbytes / self._rate)
                got.append(wire.value(rooms.enter_context(self._pool.borrow(nbytes))))
            elif line == b"EN":
                got.append(None)
            else:
                raise garbage(line)
            if at + DEPTH < len(names):
                wire.send([asked[at + DEPTH]])
        return got

    def _join(self, wire: Wire, name: bytes, manifest: memoryview, rooms: ExitStack) -> memoryview | None:
        """The value in parts that ``manifest`` lists; ``None``, and the manifest deleted, if a part is gone."""
        nbytes, names = self._parts(name, manifest)
        out = rooms.enter_context(self._pool.borrow(nbytes))
        with ExitStack() as parts:
            at = 0
            for part in self._values(wire, names, parts):
                if part is None or len(part) != min(PART_NBYTES, nbytes - at):
                    wire.send([b"md %b\r\n" % name])
                    _line(wire)
                    return None
                out[at : at + len(part)] = part
                at += len(part)
        return out

    def _parts(self, name: bytes, manifest: memoryview) -> tuple[int, list[bytes]]:
        """Bytes of a value in parts, and the parts' names."""
        if len(manifest) < _MANIFEST.size:
            raise garbage(bytes(manifest))
        _, nbytes = _MANIFEST.unpack_from(manifest)
        digests = manifest[_MANIFEST.size :]
        if nbytes > LARGEST_NBYTES or len(digests) != _DIGEST_NBYTES * -(-nbytes // PART_NBYTES):
            raise garbage(bytes(manifest[:64]))
        return nbytes, [
            name + b":" + digests[at : at + _DIGEST_NBYTES].hex().encode()
            for at in range(0, len(digests), _DIGEST_NBYTES)
        ]

    def _put(self, wire: Wire, name: bytes, value: bytes) -> None:
        if len(value) <= PART_NBYTES and not value.startswith(MAGIC):
            self._add(wire, name, value)
            return
        view = memoryview(value)
        parts = [view[at : at + PART_NBYTES] for at in range(0, len(value), PART_NBYTES)]
        digests = [xxhash.xxh3_128_digest(part) for part in parts]
        for part, digest in zip(parts, digests, strict=True):
            self._add(wire, name + b":" + digest.hex().encode(), part)
        self._add(wire, name, _MANIFEST.pack(MAGIC, len(value)) + b"".join(digests))

    def _add(self, wire: Wire, name: bytes, value: Buffer) -> None:
        expiry = expiry_of(0 if self._ttl is None else max(1, round(self._ttl)))
        wire.send([b"ms %b %d T%d ME\r\n" % (name, memoryview(value).nbytes, expiry), value, b"\r\n"])
        line = _line(wire)
        if line not in (b"HD", b"NS"):
            raise garbage(line)

    def _list(self, node: _Node, wire: Wire) -> dict[BlockKey, int]:
        names = [name for name in node.dump(time.monotonic() + self.save_timeout) if name.startswith(self._head)]
        names = [name for name in names if len(name) == len(self._head) + 64]
        found: dict[BlockKey, int] = {}
        for name in names:
            wire.send([b"mg %b s\r\n" % name])
            line = _line(wire)
            if line[:4] != b"HD s":
                continue  # it has vanished meanwhile
            nbytes = int(line[4:])
            if nbytes % _DIGEST_NBYTES == _MANIFEST.size % _DIGEST_NBYTES:  # perhaps a manifest
                with ExitStack() as rooms:
                    (start,) = self._values(wire, [name], rooms)
                    if start is not None and start[: len(MAGIC)] == MAGIC:
                        nbytes = self._parts(name, start)[0]
            found[BlockKey(bytes.fromhex(name[len(self._head) :].decode()))] = nbytes
        return found

    # Nodes

    def ask(
        self, keys: Sequence[BlockKey], seconds: float, work: Callable[[Wire, Sequence[int]], Sequence[Any]]
    ) -> list[Any]:
        """What ``work`` makes of the keys of each node; ``None`` for those of a node that fails now, or that is not
        asked in time because another one failed."""
        self._check_open()
        with self._lock:
            ring, up = self._ring, len(self._nodes) > len(self._down)
        if not up:
            raise self._no_node()
        groups: dict[str, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(ring.get_node(key.hex()), []).append(index)
        replies: list[Any] = [None] * len(keys)
        deadline = time.monotonic() + seconds
        for name, group in groups.items():
            if time.monotonic() >= deadline:
                break  # another node took all the time: it is out now, and these are misses this once
            try:
                got = self._nodes[name].exchange(deadline, lambda wire, group=group: work(wire, group))  # type: ignore[misc]
            except StoreError as error:
                if error.cause == "full":  # it still answers
                    raise
                self._lost(name, error)
                continue
            for index, reply in zip(group, got, strict=True):
                replies[index] = reply
        return replies

    def _on(self, name: str, seconds: float, work: Callable[[Wire], Reply]) -> Reply:
        self._check_open()
        try:
            return self._nodes[name].exchange(time.monotonic() + seconds, work)
        except StoreError as error:
            self._lost(name, error)
            raise

    def _lost(self, name: str, error: StoreError) -> None:
        """Take a node that failed out of the ring. One that is only full, or slow once, comes back a second later."""
        with self._lock:
            self._down[name] = error
            self._ring = self._new_ring(self._up())
            none_left = not self._up()
        if none_left:
            raise self._no_node() from None

    def _probe(self, name: str) -> None:
        def work(wire: Wire) -> None:
            wire.send([b"mn\r\n"])
            if (line := _line(wire)) != b"MN":
                raise garbage(line)

        try:
            self._nodes[name].exchange(time.monotonic() + self.save_timeout, work)
        except StoreError as error:
            with suppress(StoreError):
                self._lost(name, error)
            return
        with self._lock:
            self._down.pop(name, None)
            self._ring = self._new_ring(self._up())

    def _up(self) -> list[str]:
        return [name for name in self._nodes if name not in self._down]

    def _no_node(self) -> StoreError:
        error = next(iter(self._down.values()), StoreError("no node", cause="unreachable"))
        return StoreError(f"no node of Memcached is left: {error}", cause=error.cause)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("this store is closed", cause="closed")


class _Node:
    """One server and the idle connections to it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.reset()

    def reset(self) -> None:
        """Forget all connections, as a forked child must."""
        self._lock = threading.Lock()
        self._idle: list[Wire] = []

    def drop(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def dump(self, deadline: float) -> list[bytes]:
        """The names of all values. Its lines end otherwise than those of all other answers: a connection of its own."""
        connection = _Connection(self.host, self.port, deadline)
        names: list[bytes] = []
        # By the hash table: what moves from one LRU list to the next meanwhile is missed by a walk along these lists.
        ask = b"lru_crawler metadump hash\r\n"
        try:
            connection._sock.sendall(ask)
            for line in connection._sock.makefile("rb"):
                if line == b"END\r\n":
                    return names
                if line.startswith(b"BUSY") and time.monotonic() < deadline:  # one at a time
                    time.sleep(0.01)
                    connection._sock.sendall(ask)
                    continue
                if line.startswith(b"BADCLASS") and b"hash" in ask:  # an older server
                    ask = b"lru_crawler metadump all\r\n"
                    connection._sock.sendall(ask)
                    continue
                if not line.startswith(b"key="):
                    raise garbage(line)
                names.append(unquote_to_bytes(line[4:].split(b" ", 1)[0]))
        except TimeoutError:
            raise StoreError("no answer in time", cause="timeout") from None
        except OSError as error:
            raise StoreError(f"the connection broke: {error}", cause="unreachable") from None
        finally:
            connection.disconnect()
        raise StoreError("the server closed the connection", cause="unreachable")

    def exchange(self, deadline: float, work: Callable[[Wire], Reply]) -> Reply:
        """What ``work`` makes of a connection, which is not kept after any surprise."""
        with self._lock:
            wire = self._idle.pop() if self._idle else None
        if wire is not None and not wire.clean:
            wire.close()
            self.drop()  # the server has restarted
            wire = None
        if wire is None:
            wire = Wire(_Connection(self.host, self.port, deadline))
        wire.begin(deadline)
        try:
            reply = work(wire)
        except BaseException:
            wire.close()
            raise
        with self._lock:
            if len(self._idle) < IDLE_WIRES:
                self._idle.append(wire)
                return reply
        wire.close()
        return reply


class _Connection:
    """What a :class:`Wire` needs to know of a connection."""

    def __init__(self, host: str, port: int, deadline: float) -> None:
        try:
            self._sock = socket.create_connection((host, port), max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            raise StoreError(f"no connection to {host}:{port} in time", cause="timeout") from None
        except OSError as error:
            raise StoreError(f"cannot reach {host}:{port}: {error.strerror or error}", cause="unreachable") from None
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def disconnect(self) -> None:
        self._sock.close()


def _line(wire: Wire) -> bytes:
    """The next line, if it is no error."""
    line = wire.line()
    if line.startswith(b"SERVER_ERROR"):
        full = b"memory" in line or b"too large" in line
        raise StoreError(
            f"the server refused: {line[13:80].decode('ascii', 'replace')}", cause="full" if full else "error"
        )
    if line.startswith((b"ERROR", b"CLIENT_ERROR")):
        raise garbage(line)
    return line


def expiry_of(seconds: int) -> int:
    """As Memcached takes it, in 32 bits: 0 is for ever, and what is longer than a month is a date."""
    date = round(time.time()) + seconds
    return seconds if seconds <= MONTH else date if date < 1 << 31 else 0


def _renumbered(
    work: Callable[[Wire, Sequence[int]], Sequence[Any]], numbers: Sequence[int]
) -> Callable[[Wire, Sequence[int]], Sequence[Any]]:
    return lambda wire, group: work(wire, [numbers[index] for index in group])


def _host(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if "]" not in text or text.rfind(":") > text.rfind("]") else (text, "", "")
    if not host:
        host, port = port, ""
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{text!r}: a node is a host and a port up to 65535")
    return host.strip("[]"), int(port or 11211)


_open: weakref.WeakSet[MemcachedStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_open):
        store.after_fork()


os.register_at_fork(after_in_child=_after_fork)
