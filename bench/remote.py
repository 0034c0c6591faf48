"""CPU a GB (client and server together) of Redis: kvkeep's store, redis-py used plainly, a raw socket; and lookups.

The raw socket moves the same bytes between two processes, out of and into memory that is touched: what any client
and server must pay. A busy machine moves all rows alike: compare the ratios. Needs a Redis or Valkey (servers.sh).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis

from bench.report import best_of, console, show
from kvkeep.keys import BlockKey
from kvkeep.stores.redis import RedisStore
from kvkeep.testing.servers import RedisServer, folder, redis_binary, redis_cluster, redis_server, valkey_binary

SIZES = {"360 KB": 360 << 10, "1.5 MB": 3 << 19, "6 MB": 6 << 20, "32 MB": 32 << 20}
ROUND_NBYTES = 192 << 20
REPEATS = 5
WARM = 1
"""Rounds before those that count."""
LOOKUP_KEYS = 1000


def cpu_seconds(*pids: int) -> float:
    """CPU time that these processes have used, all their threads."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


class RawPeer:
    """A process at the other end of a socket that has ``count`` values in memory, and sends or receives one of them
    whenever it is told to."""

    def __init__(self, transport: str, count: int, nbytes: int, path: Path) -> None:
        family = socket.AF_UNIX if transport == "unix" else socket.AF_INET
        listener = socket.socket(family)
        listener.bind(str(path) if transport == "unix" else ("127.0.0.1", 0))
        listener.listen()
        self._count, self._nbytes = count, nbytes
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._serve(listener.accept()[0])
            finally:
                os._exit(0)
        self._socket = socket.socket(family)
        self._socket.connect(listener.getsockname())
        listener.close()
        self._buffer = memoryview(bytearray(b"x" * nbytes))

    def _serve(self, peer: socket.socket) -> None:
        values = [memoryview(bytearray(bytes(range(256)) * (self._nbytes >> 8))) for _ in range(self._count)]
        while order := peer.recv(9, socket.MSG_WAITALL):
            value = values[int(order[1:])]
            if order[:1] == b"G":
                peer.sendall(value)
            else:
                receive(peer, value)
                peer.sendall(b"+")

    def get(self, number: int) -> None:
        self._socket.sendall(b"G%08d" % number)
        receive(self._socket, self._buffer)

    def set(self, number: int, value: bytes) -> None:
        self._socket.sendall(b"S%08d" % number)
        self._socket.sendall(value)
        self._socket.recv(1)

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self.pid, 0)


def receive(peer: socket.socket, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        at += peer.recv_into(buffer[at:])


Cost = list[float]
"""CPU ms a GB, of each repeat."""


def measure(pid: int, count: int, nbytes: int, work: Callable[[int], Any]) -> float:
    """CPU ms a GB of ``work(0)`` … ``work(count - 1)``."""
    settle(pid)
    start = cpu_seconds(pid, os.getpid())
    for number in range(count):
        work(number)
    return (cpu_seconds(pid, os.getpid()) - start) * 1e3 / (count * nbytes / 1e9)


class Contest:
    """One size of values over one socket: raw, redis-py, kvkeep in turn, so that a busy machine is unfair to none."""

    def __init__(self, servers: Sequence[RedisServer], transport: str, nbytes: int, path: Path) -> None:
        """``servers``: one for redis-py, one for kvkeep, so that neither's values take the place of the other's."""
        self.nbytes = nbytes
        self.count = max(3, ROUND_NBYTES // nbytes)
        self._servers = servers
        plain, own = [server.unix_url if transport == "unix" else server.url for server in servers]
        self._plain = redis.Redis.from_url(plain, socket_timeout=60)
        self._store = RedisStore(own, load_timeout=60, save_timeout=60, lookup_timeout=60)
        self._raw = RawPeer(transport, self.count, nbytes, path / f"{transport}{nbytes}")
        self._values = [os.urandom(1 << 12) + bytes(range(256)) * ((nbytes >> 8) - 16) for _ in range(self.count)]
        self._written = 0

    def set(self) -> dict[str, Cost]:
        """Into a server that is full, as a cache is: each new value takes the place of an old one."""
        for server, fill in zip(self._servers, (self._set_plain, self._set_store), strict=True):
            evicted = server.call("INFO", "stats")["evicted_keys"]
            for number in itertools.cycle(range(self.count)):
                fill(number)
                if server.call("INFO", "stats")["evicted_keys"] > evicted + 2:
                    break
        return self._rounds({"raw socket": lambda n: self._raw.set(n, self._values[n]),
                             "redis-py": self._set_plain, "kvkeep": self._set_store})  # fmt: skip

    def get(self) -> dict[str, Cost]:
        self._empty()
        first = self._written
        for number in range(self.count):
            self._set_plain(number)
        for number in range(self.count):
            self._set_store(number)
        return self._rounds({"raw socket": self._raw.get,
                             "redis-py": lambda n: self._plain.get(f"plain{first + n}"),
                             "kvkeep": lambda n: self._read(key(first + self.count + n))})  # fmt: skip

    def close(self) -> None:
        self._raw.close()
        self._store.close()
        self._plain.close()
        self._empty()

    def _empty(self) -> None:
        for server in self._servers:
            server.call("FLUSHALL")

    def _rounds(self, ways: dict[str, Callable[[int], Any]]) -> dict[str, Cost]:
        costs: dict[str, Cost] = {how: [] for how in ways}
        pids = [self._raw.pid, *(server.pid for server in self._servers)]
        for repeat in range(REPEATS + WARM):
            for pid, (how, work) in zip(pids, ways.items(), strict=True):
                cost = measure(pid, self.count, self.nbytes, work)
                if repeat >= WARM:
                    costs[how].append(cost)
        return costs

    def _set_plain(self, number: int) -> None:
        self._plain.set(f"plain{self._written}", self._values[number])
        self._written += 1

    def _set_store(self, number: int) -> None:
        value = memoryview(self._values[number])  # a tier gives a header and a payload, apart
        self._store.put_many([(key(self._written), [value[:192], value[192:]])])
        self._written += 1

    def _read(self, wanted: BlockKey) -> None:
        with self._store.read([wanted]) as (value,):
            assert value is not None
            assert len(value) == self.nbytes


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(b"%d" % number).digest())


def bytes_table(binary: str, title: str) -> None:
    rows: list[list[str]] = []
    server = partial(redis_server, binary=binary, maxmemory="512mb")
    with server() as first, server() as second, folder() as path:
        for transport in ("unix", "tcp"):
            for label, nbytes in SIZES.items():
                with contextlib.closing(Contest((first, second), transport, nbytes, path)) as contest:
                    for what, costs in (("SET", contest.set()), ("GET", contest.get())):
                        least, median = min(costs["raw socket"]), statistics.median(costs["raw socket"])
                        for how, cost in costs.items():
                            rows.append([
                                transport, label, what, how, f"{min(cost):.0f}", f"{statistics.median(cost):.0f}",
                                f"{min(cost) / least:.2f}", f"{statistics.median(cost) / median:.2f}",
                            ])  # fmt: skip
    columns = ["socket", "value", "what", "how", "CPU ms/GB", "median", "× raw", "× raw, median"]
    show(f"remote-{title.replace(' ', '-')}", f"{title}: CPU of client and server", columns, rows)


def settle(pid: int) -> None:
    """Until the server is idle: what was deleted is freed in the background."""
    before = -1.0
    while before != (now := cpu_seconds(pid)):
        before = now
        time.sleep(0.02)


def lookups() -> None:
    keys = [key(number) for number in range(LOOKUP_KEYS)]
    rows: list[list[str]] = []

    def compare(name: str, store: RedisStore, client: Any) -> None:
        store.put_many([(key, [b"x"]) for key in keys[: LOOKUP_KEYS // 2]])
        names = store.names(keys)

        def pipeline() -> list[int]:
            with client.pipeline(transaction=False) if isinstance(client, redis.Redis) else client.pipeline() as pipe:
                for one in names:
                    pipe.exists(one)
                return pipe.execute()

        assert store.contains_many(keys) == [bool(found) for found in pipeline()]
        ours, theirs = best_of(100, lambda: store.contains_many(keys)), best_of(20, pipeline)
        for how, (least, median) in (("redis-py pipeline", theirs), ("kvkeep", ours)):
            rows.append([name, how, f"{least * 1e3:.2f}", f"{median * 1e3:.2f}", f"{theirs[1] / median:.1f}"])

    with redis_server() as server:
        for name, url in (("one server, unix", server.unix_url), ("one server, tcp", server.url)):
            with contextlib.closing(RedisStore(url, lookup_timeout=5)) as store:
                compare(name, store, redis.Redis.from_url(url))
    with redis_cluster() as cluster, contextlib.closing(RedisStore(cluster.url, lookup_timeout=5)) as store:
        compare("3 masters, tcp", store, redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port))
    title = f"Which of {LOOKUP_KEYS} keys are there (the first half)"
    show("remote-lookup", title, ["where", "how", "ms", "median", "× as fast"], rows)


def binaries() -> Iterator[tuple[str, str]]:
    """Every server there is."""
    for binary in dict.fromkeys((redis_binary(), valkey_binary())):
        version = os.popen(f"{binary} --version").read().split()
        yield binary, f"{version[0]} {next(word[2:] for word in version if word.startswith('v='))}".lower()


def main() -> None:
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    lookups()
    for binary, title in binaries():
        bytes_table(binary, title)


if __name__ == "__main__":
    main()
