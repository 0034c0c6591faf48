"""What goes wrong with a server, for real: no request fails, none hangs, no byte is wrong, and the tier comes back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep import breaker
from kvkeep.errors import StoreError
from kvkeep.stores.redis import RedisStore
from kvkeep.stores.redis_cluster import slot_of
from kvkeep.testing.servers import (
    Proxy,
    RedisCluster,
    RedisServer,
    folder,
    proxy,
    redis_cluster,
    tcp_server,
    wait_for,
)
from kvkeep.testing.stores import key, value

DEADLINES = "lookup_timeout=0.3&load_timeout=0.3&save_timeout=0.5&connect_timeout=0.5"
"""Longer than by default: this machine may be busy, and a test counts how often the breaker opens."""

HANG_SECONDS = 4.0
"""Far more than all deadlines of one request together."""

BLOCKS = 20
TOKENS = list(range(16 * BLOCKS + 5))
_seeds = itertools.count(1)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_SECONDS", 0.4)


class Traffic:
    """Two caches on one server: what ``writer`` saves, ``reader`` can only have from the server."""

    def __init__(self, url: str) -> None:
        url += "?" + DEADLINES
        self.writer = kvkeep.open(remote=url, memory="8MiB")
        self.reader = kvkeep.open(remote=url, memory=0)
        self.longest = 0.0

    def request(self, cache: kvkeep.KVCache, tokens: list[int]) -> int:
        """Blocks that were loaded, each byte compared; what is missing is saved, as an engine does."""
        start = time.monotonic()
        sink = Sink()
        with cache.lease(cache.match(tokens)) as lease:
            cache.load(lease, sink)
        found = sink.check(tokens)
        cache.save(tokens, Source(tokens))
        self.longest = max(self.longest, time.monotonic() - start)
        return found

    def both(self, times: int = 6) -> None:
        """Known and new prompts, by both caches."""
        for _ in range(times):
            self.request(self.reader.bind(LAYOUT), TOKENS)
            tokens = fresh()
            self.request(self.writer.bind(LAYOUT), tokens)
            self.request(self.reader.bind(LAYOUT), tokens)

    def errors(self, cause: str) -> int:
        tiers = ("remote", "remote (writes)")
        return sum(
            cache.counters.count("store_error", tier=tier, cause=cause) for cache in self.caches for tier in tiers
        )

    @property
    def caches(self) -> tuple[kvkeep.KVCache, kvkeep.KVCache]:
        return self.writer, self.reader

    def well(self) -> bool:
        tiers = [cache.store.tiers[-1] for cache in self.caches]
        return all(tier.breakers.written for tier in tiers)

    def works(self) -> bool:
        """Does what one saves now come to the other?"""
        tokens = fresh()
        self.request(self.writer.bind(LAYOUT), tokens)
        self.writer.flush(5)
        sink = Sink()
        cache = self.reader.bind(LAYOUT)
        with cache.lease(cache.match(tokens)) as lease:
            cache.load(lease, sink)
        return sink.check(tokens) == BLOCKS

    def close(self) -> None:
        for cache in self.caches:
            cache.close()


def fresh() -> list[int]:
    seed = next(_seeds)
    return [token + 1000 * seed for token in TOKENS]


@contextlib.contextmanager
def traffic(url: str) -> Iterator[Traffic]:
    running = Traffic(url)
    try:
        wait_for(running.works, "nothing arrives")
        running.request(running.writer.bind(LAYOUT), TOKENS)
        running.writer.flush(5)
        yield running
    finally:
        running.close()


Fault = tuple[Callable[[RedisServer], object], Callable[[RedisServer], object], tuple[str, ...]]


def _password(server: RedisServer) -> None:
    import redis

    with contextlib.closing(redis.Redis(unix_socket_path=str(server.socket))) as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)


def _no_password(server: RedisServer) -> None:
    import redis

    with contextlib.closing(redis.Redis(unix_socket_path=str(server.socket), password="another")) as client:
        client.config_set("requirepass", "")


def _full(server: RedisServer) -> None:
    server.call("CONFIG SET", "maxmemory-policy", "noeviction")
    server.call("CONFIG SET", "maxmemory", "1mb")


def _room(server: RedisServer) -> None:
    server.call("CONFIG SET", "maxmemory", "256mb")


FAULTS: dict[str, Fault] = {
    "killed": (lambda s: s.kill(), lambda s: s.start(), ("unreachable",)),
    "frozen": (lambda s: s.freeze(), lambda s: s.thaw(), ("timeout",)),
    "paused": (lambda s: s.call("CLIENT PAUSE", "2500"), lambda s: None, ("timeout",)),  # it ends by itself
    "full": (_full, _room, ("full",)),
    "read-only": (lambda s: s.call("REPLICAOF", "127.0.0.1", "1"), lambda s: s.call("REPLICAOF", "NO", "ONE"),
                  ("readonly", "unreachable")),
    "wrong password": (_password, _no_password, ("auth",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails(fault: str, redis_own: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    strike, heal, causes = FAULTS[fault]
    with traffic(redis_own.url) as running:
        caplog.clear()
        strike(redis_own)
        running.both()
        running.writer.flush(5)
        assert any(running.errors(cause) for cause in causes), "the fault was not met"
        wait_for(lambda: not running.well(), "no breaker opened")
        assert running.longest < HANG_SECONDS
        before = [running.errors(cause) for cause in causes]
        start = time.monotonic()
        for _ in range(20):
            running.request(running.writer.bind(LAYOUT), TOKENS)
        assert time.monotonic() - start < HANG_SECONDS, "an open breaker costs nothing"
        heal(redis_own)
        wait_for(running.well, "the breaker stays open")
        wait_for(running.works, "the tier did not come back")
        assert running.longest < HANG_SECONDS
        assert sum(running.errors(cause) for cause in causes) <= sum(before) + 8
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    opened = [line for line in lines if "left alone" in line]
    assert 1 <= len(opened) <= 8, "a line for each request, not for each change of state"
    assert len([line for line in lines if "is back" in line]) == len(opened)
    assert not any("another" in line for line in lines), "a password in the log"


@pytest.mark.parametrize("fault", ["garbage", "half", "stuck", "drip", "flip", "extra", "silent", "refuse"])
def test_a_server_that_answers_nonsense(fault: str, redis_own: RedisServer) -> None:
    with proxy(redis_own.port) as (port, between), traffic(f"redis://127.0.0.1:{port}") as running:
        between.fault = fault
        if fault == "refuse":  # connections that are there go on
            redis_own.call("CLIENT KILL", "TYPE", "normal")
        running.both(4)
        running.writer.flush(5)
        assert running.longest < HANG_SECONDS
        if fault == "flip":
            assert running.reader.counters.count("corrupt", tier="remote"), "the seal was not looked at"
        elif fault != "extra":  # which only spoils the connections
            assert not running.well()
        between.fault = None
        wait_for(running.well, "the breaker stays open")
        wait_for(running.works, "the tier did not come back")


@pytest.mark.parametrize("fault", ["garbage", "half", "stuck", "drip", "silent", "refuse"])
def test_no_call_outlives_its_deadline(fault: str, redis_own: RedisServer) -> None:
    """Of the store itself, whatever the server does; a connection's handshake included."""
    with proxy(redis_own.port) as (port, between):
        for connected in (False,) if fault == "refuse" else (True, False):
            between.fault = None if connected else fault
            options = "?lookup_timeout=0.1&load_timeout=0.1&save_timeout=0.1"
            with contextlib.closing(RedisStore.from_url(f"redis://127.0.0.1:{port}{options}")) as store:
                if connected:
                    wait_for(lambda: _answers(store), "the server does not answer")
                    between.fault = fault
                calls: list[Callable[[], object]] = [
                    lambda: store.contains_many([key(1), key(2)]), lambda: store.get(key(1)),
                    lambda: store.put(key(2), [value(2, 1 << 20)]), lambda: store.delete(key(2)),
                ]  # fmt: skip
                for call in calls:
                    start = time.monotonic()
                    with pytest.raises(StoreError) as raised:
                        call()
                    assert raised.value.cause in ("garbage", "timeout", "unreachable", "error")
                    assert time.monotonic() - start < 1.5, "0.1 s, and a busy machine"


def _answers(store: RedisStore) -> bool:
    try:
        store.put(key(1), [value(1, 100_000)])
        return store.contains(key(1))
    except StoreError:
        return False


def test_half_a_value_in_parts_is_none(redis_own: RedisServer) -> None:
    """A part that the server evicted: the value is missing, the rest is forgotten, and it can be stored again."""
    with contextlib.closing(RedisStore(redis_own.unix_url, load_timeout=5)) as store:
        big = value(1, 20 << 20)
        store.put(key(1), [big[:1000], memoryview(big)[1000:]])
        names = redis_own.call("KEYS", "*")
        assert len(names) == 6, "a manifest and five parts"
        assert all(redis_own.call("PTTL", name) == -1 for name in names)
        assert store.get(key(1)) == big
        assert dict(store.items()) == {key(1): len(big)}
        redis_own.call("DEL", next(name for name in names if name.endswith(b".3")))
        assert store.contains(key(1))
        assert store.get(key(1)) is None
        assert not store.contains(key(1))
        assert redis_own.call("DBSIZE") == 0
        store.put(key(1), [big])
        assert store.get(key(1)) == big
        assert store.delete(key(1))
        assert redis_own.call("DBSIZE") == 0


def test_a_writer_killed_between_parts_leaves_nothing_visible(redis_own: RedisServer) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            store = RedisStore(redis_own.unix_url)
            store._tell = lambda *_: os._exit(9)  # type: ignore[assignment]  # before the manifest
            store.put(key(1), [value(1, 20 << 20)])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    names = redis_own.call("KEYS", "*")
    assert len(names) == 5
    assert all(0 < redis_own.call("PTTL", name) <= 600_000 for name in names), "they would stay for ever"
    with contextlib.closing(RedisStore(redis_own.unix_url, load_timeout=5)) as store:
        assert not store.contains(key(1))
        assert store.get(key(1)) is None
        assert list(store.items()) == []


def test_two_writers_never_mix_parts(redis_own: RedisServer) -> None:
    """Eight threads put other bytes under one key, again and again: what is read is one of them, whole."""
    values = [bytes([number]) * (9 << 20) for number in range(4)]
    failures: list[str] = []
    with contextlib.closing(RedisStore(redis_own.unix_url, load_timeout=9, save_timeout=9, lookup_timeout=9)) as store:

        def work(number: int) -> None:
            for _ in range(6):
                store.put(key(1), [values[number]])
                found = store.get(key(1))
                if found is not None and found not in values:
                    failures.append("mixed")
                store.delete(key(1))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_other_data_is_left_alone(redis_own: RedisServer) -> None:
    redis_own.call("SET", "kvkeeper", "mine")
    redis_own.call("SET", "kvkeep:{short}", "mine")
    with contextlib.closing(RedisStore(redis_own.url, lookup_timeout=5)) as store:
        for number in range(3):
            store.put(key(number), [value(number)])
        with contextlib.closing(RedisStore(redis_own.url, prefix="other", lookup_timeout=5)) as other:
            other.put(key(1), [b"theirs"])
            for block, _ in store.items():
                store.delete(block)
            assert other.get(key(1)) == b"theirs"
        assert list(store.items()) == []
    assert redis_own.call("DBSIZE") == 3


def test_values_live_as_long_as_they_are_told(redis_own: RedisServer) -> None:
    with contextlib.closing(RedisStore(redis_own.url, ttl=0.4, lookup_timeout=5, load_timeout=5)) as store:
        store.put(key(1), [value(1)])
        store.put(key(2), [value(2, 9 << 20)])
        lives = [redis_own.call("PTTL", name) for name in redis_own.call("KEYS", "*")]
        assert all(0 < life <= 400 for life in lives)
        wait_for(lambda: not store.contains(key(1)) and not store.contains(key(2)), "they live on", 5)
        wait_for(lambda: not redis_own.call("KEYS", "*"), "something lives on", 5)


def test_a_forked_child_has_connections_of_its_own(redis_own: RedisServer) -> None:
    with contextlib.closing(RedisStore(redis_own.url, lookup_timeout=5, load_timeout=5)) as store:
        for number in range(50):
            store.put(key(number), [value(number)])
        pid = os.fork()
        ok = all(store.get(key(number)) == value(number) for number in range(50))
        if pid == 0:
            os._exit(0 if ok else 1)
        assert ok
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_cluster_whose_master_is_killed() -> None:
    with redis_cluster(3, 3) as cluster, traffic(cluster.url) as running:
        victim = cluster.nodes[0]
        victim.kill()
        for _ in range(5):
            running.both(2)
            time.sleep(0.2)
        assert running.longest < HANG_SECONDS
        wait_for(lambda: cluster.well() and running.well() and running.works(), "the cluster did not heal", 30)
        victim.start()  # as a replica of its successor
        wait_for(cluster.well, "the old master did not come back", 30)
        wait_for(lambda: running.well() and running.works(), "the tier did not come back")
        assert running.longest < HANG_SECONDS


def test_a_dead_node_takes_only_its_own_values(caplog: pytest.LogCaptureFixture) -> None:
    """No replica has them: they are missing until the node is back, the others' are not."""
    keys = [key(number) for number in range(60)]
    with redis_cluster(3, 0, "--cluster-require-full-coverage", "no") as cluster:
        store = RedisStore.from_url(cluster.url + "?lookup_timeout=2&load_timeout=2&save_timeout=2")
        with contextlib.closing(store):
            wait_for(lambda: _answers(store), "the cluster does not answer")
            store.delete(key(1))
            store.put_many([(block, [value(at)]) for at, block in enumerate(keys)])
            assert all(store.contains_many(keys))
            cluster.nodes[0].kill()
            lost = [at for at, name in enumerate(store.names(keys)) if slot_of(name) < 16384 // 3]
            assert 5 < len(lost) < 40
            longest = 0.0
            for _ in range(30):
                start = time.monotonic()
                assert store.contains_many(keys) == [at not in lost for at in range(60)]
                with store.read(keys[:10]) as values:
                    assert [got and bytes(got) for got in values] == [
                        None if at in lost else value(at) for at in range(10)
                    ]
                store.put_many([(key(100 + at), [value(at)]) for at in range(10)])
                longest = max(longest, time.monotonic() - start)
            assert longest < HANG_SECONDS
            cluster.nodes[0].start()

            def healed() -> bool:
                store.put_many([(block, [value(at)]) for at, block in enumerate(keys)])
                return all(store.contains_many(keys))

            wait_for(healed, "the node did not come back")
    lines = [record.getMessage() for record in caplog.records if "of the cluster" in record.getMessage()]
    assert len([line for line in lines if "left alone" in line]) == 1
    assert len([line for line in lines if "is back" in line]) == 1


def test_a_cluster_that_is_resharded_under_load(cluster_shared: RedisCluster) -> None:
    """Slots move with their keys while they are read and written: nothing is lost, and nothing is wrong."""
    source, target = cluster_shared.nodes[0], cluster_shared.nodes[1]
    patient = {"lookup_timeout": 5.0, "load_timeout": 5.0, "save_timeout": 5.0}
    with contextlib.closing(RedisStore(cluster_shared.url, prefix="reshard", **patient)) as store:
        numbers = range(3000)
        names = store.names([key(number) for number in numbers])
        slots = sorted({slot_of(name) for name in names if slot_of(name) < 16384 // 3})[:12]
        chosen = [number for number in numbers if slot_of(names[number]) in slots] + list(range(40))
        store.put_many([(key(number), [value(number)]) for number in chosen])
        failures: list[str] = []
        stop = threading.Event()
        late = itertools.count(10_000)

        def read() -> None:
            while not stop.is_set():
                try:
                    found = store.get_many([key(number) for number in chosen])
                    if any(got is None or got != value(number) for got, number in zip(found, chosen, strict=True)):
                        failures.append("missing or wrong")
                    if not all(store.contains_many([key(number) for number in chosen])):
                        failures.append("not found")
                    store.put_many([(key(next(late)), [b"late"])])
                except StoreError as error:
                    failures.append(repr(error))

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for slot in slots:
                for _ in cluster_shared.move_slot(slot, source, target):
                    time.sleep(0.005)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures, set(failures)
        for number in chosen:
            assert store.get(key(number)) == value(number)
        for slot in slots:
            for _ in cluster_shared.move_slot(slot, target, source):
                pass


@contextlib.contextmanager
def network_namespace() -> Iterator[tuple[str, str, str]]:
    """A namespace's name, the address in there, and the device out here whose end cuts the cable."""
    name = f"kvk{os.getpid()}"
    here, there = f"{name}a"[-15:], f"{name}b"[-15:]
    steps = [
        ["ip", "netns", "add", name], ["ip", "link", "add", here, "type", "veth", "peer", "name", there],
        ["ip", "link", "set", there, "netns", name], ["ip", "addr", "add", "10.213.77.1/30", "dev", here],
        ["ip", "link", "set", here, "up"], ["ip", "-n", name, "addr", "add", "10.213.77.2/30", "dev", there],
        ["ip", "-n", name, "link", "set", there, "up"], ["ip", "-n", name, "link", "set", "lo", "up"],
    ]  # fmt: skip
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespace here: {' '.join(step)}: {done.stderr.strip()}")
        yield name, "10.213.77.2", here
    finally:
        subprocess.run(["ip", "link", "del", here], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip")
def test_a_network_that_is_cut() -> None:
    with network_namespace() as (name, host, device), folder() as path:
        server = RedisServer(path, "--protected-mode", "no", host=host, prefix=["ip", "netns", "exec", name])
        server.start()
        try:
            with traffic(server.url) as running:
                subprocess.run(["ip", "link", "set", device, "down"], check=True)
                running.both()
                assert running.errors("timeout") + running.errors("unreachable")
                assert not running.well()
                assert running.longest < HANG_SECONDS
                subprocess.run(["ip", "link", "set", device, "up"], check=True)
                wait_for(running.well, "the breaker stays open", 30)
                wait_for(running.works, "the tier did not come back", 30)
        finally:
            server.kill()


def test_a_server_that_is_restarted_between_requests(redis_own: RedisServer) -> None:
    """Idle connections are dead then: that is no failure, and no breaker opens."""
    options = "?lookup_timeout=9&load_timeout=9&save_timeout=9"
    with contextlib.closing(RedisStore.from_url(redis_own.url + options)) as store:
        store.put(key(1), [value(1)])
        redis_own.kill()
        redis_own.start()
        assert store.get(key(1)) is None
        store.put(key(1), [value(1)])
        assert store.get(key(1)) == value(1)


def test_connecting_may_take_longer_than_a_question(redis_own: RedisServer) -> None:
    """As TLS does, or a server that is far away. Else a process that lives shortly would never get anything."""
    between = Proxy(redis_own.port)

    def slow(client: socket.socket) -> None:
        time.sleep(0.5)
        between.serve(client)

    with tcp_server(slow) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", lookup_timeout=0.3, load_timeout=0.3)
        store.put(key(1), [value(1, 100)])
        store.close()
        store = RedisStore(f"redis://127.0.0.1:{port}", lookup_timeout=0.3, load_timeout=0.3)
        assert store.contains_many([key(1), key(2)]) == [True, False]
        store.close()


def test_opening_waits_a_second_for_a_server_that_is_frozen(redis_own: RedisServer) -> None:
    redis_own.freeze()
    start = time.monotonic()
    with kvkeep.open(redis_own.url, memory="8MiB") as cache:
        assert time.monotonic() - start < 2.0
        start = time.monotonic()
        assert cache.get_value("a") is None
        assert time.monotonic() - start < 0.5
    redis_own.thaw()
