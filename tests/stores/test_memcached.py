"""Memcached passes the store suite; what a node's end, a full node and one node more cost."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep import KVLayout, breaker
from kvkeep.errors import ConfigError, StoreError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Store
from kvkeep.stores.memcached import PART_NBYTES, MemcachedStore
from kvkeep.stores.url import open_store
from kvkeep.testing.servers import MemcachedServer, memcached_server, tcp_server, wait_for
from kvkeep.testing.stores import StoreSuite

_prefixes = (f"suite{number}" for number in itertools.count())
PATIENT = {"lookup_timeout": 5.0, "load_timeout": 5.0}
"""Where the deadline is not what is tested: this machine may be busy."""


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(b"%d" % number).digest())


def store_of(*servers: MemcachedServer, **options: float) -> MemcachedStore:
    nodes = [("127.0.0.1", server.port) for server in servers]
    return MemcachedStore(nodes, prefix=next(_prefixes), **{**PATIENT, **options})


class TestMemcached(StoreSuite):
    examples = 15
    keeps = False  # a node's own list of what it has, which items() is, leaves some out

    @pytest.fixture(autouse=True)
    def _server(self, memcached_shared: MemcachedServer) -> None:
        self.server = memcached_shared

    def make(self, path: Path, capacity: int | None) -> Store:
        return store_of(self.server)


@pytest.fixture
def four() -> Iterator[list[MemcachedServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(memcached_server()) for _ in range(4)]


def test_values_in_parts_are_whole_or_absent(memcached_shared: MemcachedServer) -> None:
    store = store_of(memcached_shared)
    value = random.Random(1).randbytes(3 * PART_NBYTES + 17)
    store.put(key(1), [value[:100], value[100:]])
    store.put(key(2), [value[:PART_NBYTES]])
    assert store.get_many([key(1), key(3), key(2)]) == [value, None, value[:PART_NBYTES]]
    assert dict(store.items()).items() <= {key(1): len(value), key(2): PART_NBYTES}.items()
    name = store._name(key(1)).decode()
    digest = next(
        part.split(b" ")[0].decode().split("key=")[1].replace("%3A", ":").rpartition(":")[2]
        for part in memcached_shared.call(b"lru_crawler metadump all").splitlines()
        if name.encode().replace(b":", b"%3A") + b"%3A" in part
    )
    assert memcached_shared.call(f"delete {name}:{digest}".encode()) == b"DELETED\r\n"
    assert store.get(key(1)) is None
    assert not store.contains(key(1)), "what has lost a part is forgotten"
    store.close()


def test_a_node_more_moves_its_share_of_the_keys_and_no_others() -> None:
    nodes = [(f"10.0.0.{number}", 11211) for number in range(5)]
    before, after = MemcachedStore(nodes[:4]), MemcachedStore(nodes)
    keys = [key(number).hex() for number in range(10_000)]
    moved = [(before._ring.get_node(k), after._ring.get_node(k)) for k in keys]
    moved = [(one, other) for one, other in moved if one != other]
    assert 0.1 * len(keys) < len(moved) <= 0.25 * len(keys)
    assert {other for _, other in moved} == {"10.0.0.4:11211"}


def test_a_dead_nodes_keys_are_misses_then_live_elsewhere(four: list[MemcachedServer]) -> None:
    store = store_of(*four)
    keys = [key(number) for number in range(400)]
    store.put_many([(each, [each * 50]) for each in keys])
    assert all(store.contains_many(keys))
    four[0].kill()
    found = store.contains_many(keys)
    assert 200 < sum(found) < 400
    assert [value is not None for value in store.get_many(keys)] == found
    store.put_many([(each, [each * 50]) for each in keys])
    assert store.get_many(keys) == [each * 50 for each in keys]
    four[0].start()
    wait_for(lambda: store.maintain() or not store._down, "the node stays out")
    found = store.contains_many(keys)
    assert 200 < sum(found) < 400, "it came back empty"
    for server in four:
        server.kill()
    with pytest.raises(StoreError) as raised:
        store.contains_many(keys)
    assert raised.value.cause == "unreachable"
    store.close()


def test_a_frozen_node_costs_its_deadline_once(four: list[MemcachedServer]) -> None:
    store = store_of(*four[:2], lookup_timeout=1.0)
    keys = [key(number) for number in range(100)]
    store.put_many([(each, [each]) for each in keys])
    four[1].freeze()
    try:
        store.contains_many(keys)
        found = store.contains_many(keys)
        assert 10 < sum(found) < 90
        assert list(store._down) == [four[1].where]
        assert store._down[four[1].where].cause == "timeout"
        assert store.contains_many(keys) == found
    finally:
        four[1].thaw()
    store.ping()
    assert not store._down
    assert all(store.contains_many(keys))
    store.close()


def test_values_larger_than_a_node_takes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-I 512k``: refused writes do not stop reads, and no request fails."""
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.2)
    with memcached_server("-I", "512k") as server:
        store = store_of(server)
        store.put(key(1), [b"small"])
        with pytest.raises(StoreError) as raised:
            store.put(key(2), [bytes(700_000)])
        assert raised.value.cause == "full"
        assert store.get(key(1)) == b"small"
        store.close()
        wide = KVLayout.uniform(LAYOUT.identity, num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32",
                                block_tokens=2048)  # fmt: skip
        big, small = list(range(2048 * 2)), list(range(16 * 20))
        options = "lookup_timeout=5&load_timeout=5"
        with (
            caplog.at_level(logging.WARNING, "kvkeep"),
            kvkeep.open(f"memcached://{server.where}?{options}", memory="16MiB") as root,
        ):
            remote = root.store.tiers[1]
            assert root.bind(wide).save(big, Source(big, wide)) == 2
            assert root.flush(20)
            assert root.counters.count("dropped", tier="remote", cause="full") == 2
            assert remote.breakers.medium.closed, "it can be read"
            wait_for(lambda: remote.breakers.writes.closed, "writes are never tried again")
            cache = root.bind(LAYOUT)
            assert cache.save(small, Source(small)) == 20
            assert root.flush(20)
            assert all(remote.contains_many(cache.match(small).keys))


@pytest.mark.parametrize(
    "answer",
    [b"VA 5 x\r\nab", b"VA 99999999999\r\n", b"hello\r\n", b"\0" * 600, b"", b"HD\r\nHD\r\n", b"VA 3\r\nabcd\r\n"],
)
def test_a_server_that_answers_garbage(answer: bytes) -> None:
    def serve(connection: object) -> None:
        connection.recv(4096)  # type: ignore[attr-defined]
        connection.sendall(answer)  # type: ignore[attr-defined]

    with tcp_server(serve) as port:
        store = MemcachedStore([("127.0.0.1", port)], lookup_timeout=1, load_timeout=1)
        with pytest.raises(StoreError) as raised:
            store.get(key(1))
        assert raised.value.cause in ("garbage", "unreachable")
        store.close()


def test_two_caches_share_a_ring(four: list[MemcachedServer]) -> None:
    hosts = ",".join(server.where for server in four)
    url = f"memcached://{hosts}?lookup_timeout=5&load_timeout=5"
    tokens = list(range(16 * 40))
    with kvkeep.open(memory="4MiB", remote=url) as one:
        assert one.bind(LAYOUT).save(tokens, Source(tokens)) == 40
    with kvkeep.open(url, memory="4MiB") as other:
        cache = other.bind(LAYOUT)
        assert {tier.name for tier in cache.match(tokens).places} == {"remote"}
        sink = Sink()
        with cache.lease(cache.match(tokens)) as lease:
            cache.load(lease, sink)
        assert sink.check(tokens) == 40


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memcached://", "names its nodes"),
        ("memcached://a:x", "a host and a port"),
        ("memcached://user:hunter2@a", "without user and password"),
        ("memcached://a?lookup_timeuot=1", "did you mean 'lookup_timeout'"),
        ("memcached://a?rate=fast", "is a number"),
        ("memcached://a?ttl=0", "above 0"),
        ("memcachd://a", "did you mean 'memcached'"),
    ],
)
def test_a_wrong_address_is_named(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        open_store(url)
    assert "hunter2" not in str(raised.value)


def test_addresses() -> None:
    store = open_store("memcached://a:1,b,[::1]:3?prefix=mine&rate=1e6", ttl=60)
    assert repr(store) == "MemcachedStore(a:1, b:11211, ::1:3, prefix='mine')"
