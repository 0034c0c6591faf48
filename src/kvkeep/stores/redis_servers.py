"""Where a Redis URL leads: one server, the master that Sentinels name, or a cluster; and connections to it.

Connections are opened by redis-py in short-lived threads, for two reasons: nothing can bound a name server that is
silent or a handshake that drips, and a connection that takes longer than a lookup may is still wanted by the next one.
Whoever asks waits for one until its deadline, not longer.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from kvkeep.errors import ConfigError, StoreError
from kvkeep.stores.redis_wire import Redirect, Wire, pack, refusal
from kvkeep.stores.url import pairs

if TYPE_CHECKING:
    from redis.connection import AbstractConnection

Reply = TypeVar("Reply")

CONNECT_SECONDS = 2.0
"""For a connection that is opened in the background: TCP, TLS and each step of the handshake."""

MOST_OPENING = 4
"""Connections to one server that may be on their way at once: a dead one must not collect threads."""

OTHER_NODES = 3
"""Nodes of a cluster that are tried after the first one has failed."""

CLIENT_OPTIONS = ("db", "client_name", "sentinel_username", "sentinel_password")
STORE_OPTIONS = ("prefix", "ttl", "lookup_timeout", "load_timeout", "save_timeout", "connect_timeout", "rate")
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname", "ssl_min_version")
TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
OPTIONS = (*CLIENT_OPTIONS, *STORE_OPTIONS, *TLS_OPTIONS)
"""What may stand in an address' query."""


@dataclass(frozen=True)
class Address:
    """A parsed URL. Its repr shows neither user nor password."""

    kind: str
    """``server``, ``sentinel``, ``cluster`` or ``unix``."""

    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    tls: bool = False
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    options: dict[str, str] = field(default_factory=dict, repr=False)
    """What the query says, but for ``db``."""

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        kind = "" if self.kind == "server" else f"+{self.kind}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        where = f"/{self.service}" if self.service else ""
        return f"redis{'s' if self.tls else ''}{kind}://{hosts}{where}" + (f"/{self.db}" if self.db else "")


def parse(url: str) -> Address:
    """Raises :class:`ConfigError`, which repeats nothing that may be a password."""
    scheme, _, rest = url.partition("://")
    family, _, kind = scheme.lower().partition("+")
    kind = kind or ("unix" if family == "unix" else "server")
    if family not in ("redis", "rediss", "valkey", "valkeys", "unix") or kind not in (
        "server", "sentinel", "cluster", "unix",
    ):  # fmt: skip
        raise ConfigError(f"{scheme}:// is no address of Redis or Valkey")
    rest, _, query = rest.partition("?")
    options = pairs(query, "Redis", OPTIONS)
    tls = family in ("rediss", "valkeys")
    _tls(options, tls)
    user, at, rest = rest.rpartition("@")
    username, colon, password = user.partition(":")
    if "/" in user or (at and not user):
        raise ConfigError("a user or password in an address is percent-encoded: / is %2F, @ is %40, : is %3A")
    credentials: dict[str, Any] = {
        "username": unquote(username) or None,
        "password": unquote(password) if colon else None,
    }
    if kind == "unix":
        path = unquote(rest)
        if not path.startswith("/"):
            raise ConfigError("a unix socket's address has three slashes: unix:///run/redis.sock")
        return Address(
            "unix", path=path, db=_number("db", options.pop("db", "0")), options=options, **credentials
        )  # fmt: skip
    where, _, tail = rest.partition("/")
    words = [unquote(word) for word in tail.split("/") if word]
    service = words.pop(0) if kind == "sentinel" and words else ""
    if kind == "sentinel" and not service:
        raise ConfigError(
            "an address of Sentinels ends in the service's name: redis+sentinel://a:26379,b:26379/mymaster"
        )
    db = _number("db", options.pop("db", words.pop(0) if words else "0"))
    if words or (kind == "cluster" and db):
        raise ConfigError("an address ends in the database's number (a cluster has only 0): redis://host:6379/0")
    usual = 26379 if kind == "sentinel" else 6379
    hosts = tuple(_host(part, usual) for part in where.split(","))
    if kind == "server" and len(hosts) > 1:
        raise ConfigError("several servers are redis+cluster:// or redis+sentinel://")
    return Address(
        kind, hosts=hosts, service=service, db=db, tls=tls, options=options,
        **credentials,
    )  # fmt: skip


def _host(text: str, usual: int) -> tuple[str, int]:
    if text.startswith("["):  # IPv6
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError("a host's port is a number up to 65535 (a password's : / @ are percent-encoded)")
    return unquote(host) or "localhost", int(port or usual)


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name} is a whole number: redis://host:6379/0")
    return int(text)


def _tls(options: dict[str, str], tls: bool) -> dict[str, Any]:
    """The options of TLS, as redis-py takes them."""
    found: dict[str, Any] = {name: options[name] for name in TLS_OPTIONS if name in options}
    for name, value in found.items():
        if not tls:
            raise ConfigError(f"{name} is for rediss:// (with two s): without TLS nothing is encrypted")
        if name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") and not os.access(value, os.R_OK):
            raise ConfigError(f"{name}: there is no file {value!r} that can be read")
        if name == "ssl_cert_reqs" and value not in ("none", "optional", "required"):
            raise ConfigError("ssl_cert_reqs is none, optional or required")
        if name == "ssl_check_hostname":
            found[name] = value.lower() in ("1", "true", "yes", "on")
        if name == "ssl_min_version":
            if value not in TLS_VERSIONS:
                raise ConfigError(f"ssl_min_version is one of {', '.join(TLS_VERSIONS)}")
            found[name] = TLS_VERSIONS[value]
    return found


def connect(url: str, timeout: float = CONNECT_SECONDS) -> Any:
    """redis-py's own client for ``url``, with this package's options: ``redis.Redis`` or ``redis.RedisCluster``.

    ``timeout``: of connecting and of each reply. Nothing is retried, but on other nodes of a cluster. The client of one
    server connects at its first command; that of a cluster now, and raises :class:`StoreError` where it cannot.
    """
    return client(parse(url), timeout)


def client(address: Address, timeout: float) -> Any:
    redis = _redis()
    from redis.backoff import NoBackoff
    from redis.connection import PythonRespSerializer
    from redis.retry import Retry

    common: dict[str, Any] = {
        "username": address.username,
        "password": address.password,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_read_size": 1 << 20,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "driver_info": None,  # two round trips less at each connection
        "client_name": address.options.get("client_name", "kvkeep"),
    }
    if address.tls:
        common |= {"ssl": True, **_tls(address.options, True)}
    if address.kind == "unix":
        made = redis.Redis(unix_socket_path=address.path, db=address.db, **common)
    elif address.kind == "server":
        host, port = address.hosts[0]
        made = redis.Redis(host=host, port=port, db=address.db, **common)
    elif address.kind == "sentinel":
        of_sentinel = {name: common[name] for name in common if name.startswith(("s", "retry", "protocol"))}
        of_sentinel |= {
            "username": address.options.get("sentinel_username"),
            "password": address.options.get("sentinel_password"),
        }
        from redis import sentinel

        made_by: Any = sentinel.Sentinel
        made = made_by(address.hosts, sentinel_kwargs=of_sentinel, db=address.db, **common).master_for(address.service)
    else:
        nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
        # What any node can answer is asked of the map's first one, dead or not, and only when retried of others.
        common["retry"] = Retry(NoBackoff(), OTHER_NODES)
        try:
            made = redis.RedisCluster(startup_nodes=nodes, require_full_coverage=False, **common)
        except (redis.RedisError, OSError) as error:
            raise failure(error) from None
        return made
    # The packer of redis-py with hiredis copies a value twice.
    packer = PythonRespSerializer(6000, made.get_encoder().encode)
    made.connection_pool.connection_kwargs["command_packer"] = packer
    return made


NONSENSE = (ValueError, TypeError, LookupError, AttributeError)
"""What redis-py raises besides its own when a handshake or a map is answered with nonsense."""


def failure(error: Exception) -> StoreError:
    """What redis-py raised, in our words. Its messages name hosts, never credentials."""
    from redis import exceptions
    from redis.sentinel import MasterNotFoundError

    if isinstance(error, MasterNotFoundError):  # whose message shows the clients' options
        return StoreError("no Sentinel answers, or none knows this service", cause="unreachable")
    if isinstance(error, exceptions.NoPermissionError):
        return refusal(b"-NOPERM ")
    if isinstance(error, exceptions.AuthenticationError):
        asked = "required" in str(error).lower()  # it was given none
        return refusal(b"-NOAUTH " if asked else b"-WRONGPASS ")
    if isinstance(error, (exceptions.TimeoutError, TimeoutError)):
        return StoreError("no connection in time", cause="timeout")
    if isinstance(error, exceptions.ReadOnlyError):
        return refusal(b"-READONLY ")
    if isinstance(error, exceptions.OutOfMemoryError):
        return refusal(b"-OOM ")
    if isinstance(error, (exceptions.InvalidResponse, *NONSENSE)):
        return StoreError("an answer that is none", cause="garbage")
    if isinstance(error, exceptions.ResponseError):
        return refusal(b"-" + str(error).encode("ascii", "replace"))
    return StoreError(f"cannot reach the server: {error}", cause="unreachable")


def _redis() -> Any:
    try:
        import redis
    except ImportError as error:
        raise ConfigError("Redis and Valkey need redis-py: pip install 'kvkeep[redis]'") from error
    return redis


class Node:
    """One server and the connections to it."""

    def __init__(self, name: str, make: Callable[[], AbstractConnection]) -> None:
        """``make`` gives a connection that has not been connected."""
        self.name = name
        self._make = make
        self._context: ssl.SSLContext | None = None
        self._idle: list[Wire] = []
        self.reset()

    def reset(self) -> None:
        """Forget all connections, as a forked child must: closing its ends does not end its parent's."""
        for wire in self._idle:
            wire.close()
        self._changed = threading.Condition()
        self._idle = []
        self._opening = 0
        self._failures = 0
        self._error = StoreError("never connected", cause="unreachable")
        self._closed = False

    def exchange(self, deadline: float, work: Callable[[Wire], Reply]) -> Reply:
        """What ``work`` makes of a connection. After any surprise no connection is kept.

        A connection that had been idle and turns out to be dead is no surprise: the server restarted. Once more, then.
        """
        while True:
            wire, fresh = self._take(deadline)
            wire.begin(deadline)
            try:
                reply = work(wire)
            except StoreError as error:
                wire.close()
                self.drop()
                if error.cause == "unreachable" and not fresh and time.monotonic() < deadline:
                    continue
                raise
            except BaseException:
                wire.close()
                raise
            self._give(wire)
            return reply

    def warm(self) -> None:
        """Open a connection in the background, so that the first question need not wait for it."""
        with self._changed:
            if not self._idle and not self._opening:
                self._start_opening()

    def await_first(self, deadline: float) -> None:
        """Wait for what :meth:`warm` began."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._idle or self._failures or self._closed or not self._opening,
                max(0.0, deadline - time.monotonic()),
            )

    def drop(self) -> None:
        """Close what is idle."""
        with self._changed:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
        self.drop()

    def _take(self, deadline: float) -> tuple[Wire, bool]:
        """A connection; was it opened just now?"""
        fresh = False
        with self._changed:
            failures = self._failures
            while True:
                if self._closed:
                    raise StoreError("this store is closed", cause="closed")
                while self._idle:
                    wire = self._idle.pop()
                    if fresh or wire.clean:
                        return wire, fresh
                    wire.close()
                if self._failures > failures:
                    raise self._error
                if not fresh or not self._opening:
                    fresh = True
                    if self._opening < MOST_OPENING:
                        self._start_opening()
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise StoreError("no connection in time", cause="timeout")

    def _start_opening(self) -> None:
        self._opening += 1
        threading.Thread(target=self._open, name="kvkeep-connect", daemon=True).start()

    def _open(self) -> None:
        import redis

        changed = self._changed  # a fork makes a new one: this thread does not exist there
        wire = None
        error = None
        try:
            connection: Any = self._make()
            encrypted = isinstance(connection, redis.SSLConnection)
            if encrypted:
                connection._wrap_socket_with_ssl = partial(self._encrypt, connection)
            connection.connect()
            wire = Wire(connection)
        except (redis.RedisError, OSError, *NONSENSE) as problem:
            error = failure(problem)
            self._context = None  # its files may be renewed before the next try
        finally:
            with changed:
                self._opening -= 1
                if wire is None:
                    self._error = error or StoreError("no connection could be opened")
                    self._failures += 1
                elif not self._closed:
                    self._idle.append(wire)
                    wire = None
                changed.notify_all()
        if wire is not None:
            wire.close()

    def _encrypt(self, connection: Any, plain: socket.socket) -> ssl.SSLSocket:
        """What redis-py does for each connection, but with one context for all of them: reading the system's
        authorities takes 25 ms, of a lookup's 50."""
        context = self._context
        if context is None:
            context = ssl.create_default_context()
            context.check_hostname = connection.check_hostname
            context.verify_mode = connection.cert_reqs
            if connection.certfile or connection.keyfile:
                context.load_cert_chain(connection.certfile, connection.keyfile)
            if connection.ca_certs is not None:
                context.load_verify_locations(connection.ca_certs)
            if connection.ssl_min_version is not None:
                context.minimum_version = connection.ssl_min_version
            self._context = context
        return context.wrap_socket(plain, server_hostname=connection.host)

    def _give(self, wire: Wire) -> None:
        with self._changed:
            if not self._closed:
                self._idle.append(wire)
                self._changed.notify_all()
                return
        wire.close()


Work = Callable[[Wire, Sequence[int]], Sequence[Any]]
"""Asks for the names with these indices and returns a reply for each, which may be a :class:`Redirect`."""


class Server:
    """One server, or the master that Sentinels name: every name lives there."""

    def __init__(self, address: Address, connect_timeout: float, prefix: bytes) -> None:
        """``prefix``: of all names, also of the one that probes ask for and write."""
        self.address = address
        self._probe = prefix + b":ping"
        self.client = client(address, connect_timeout)
        pool = self.client.connection_pool
        self._node = Node(str(address), lambda: pool.connection_class(**pool.connection_kwargs))
        self._node.warm()

    def await_first(self, seconds: float) -> None:
        """Wait until the first connection is there, or could not be opened."""
        self._node.await_first(time.monotonic() + seconds)

    def ask(self, names: Sequence[bytes], seconds: float, work: Work) -> Sequence[Any]:
        """The replies to ``names``, within ``seconds`` (and what values add by their size).

        None stands for whatever cannot be asked for because its node is out of order while others are well.
        """
        replies = self._node.exchange(time.monotonic() + seconds, lambda wire: work(wire, range(len(names))))
        if Redirect in map(type, replies):
            raise StoreError("this is a node of a cluster: say redis+cluster:// instead of redis://")
        return replies

    def ping(self, seconds: float) -> None:
        """Raises :class:`StoreError` unless the server answers."""
        self._node.exchange(time.monotonic() + seconds, lambda wire: ask(wire, self._probe))

    def ping_writes(self, seconds: float) -> None:
        """Raises :class:`StoreError` unless it can be written to."""
        self._node.exchange(time.monotonic() + seconds, lambda wire: write(wire, self._probe))

    def reset(self) -> None:
        self._node.reset()

    def close(self) -> None:
        self._node.close()
        self.client.close()


def ask(wire: Wire, name: bytes) -> None:
    """Ask for ``name``: a server that loads its data, or whose cluster is down, answers a PING but not this."""
    wire.send([pack(b"EXISTS", name)])
    wire.outcomes(1)


def write(wire: Wire, name: bytes) -> None:
    """Write ``name``, for a second: a server that is full or read-only refuses."""
    wire.send([pack(b"SET", name, b"", b"PX", b"1000")])
    wire.outcomes(1)
