"""Redis, Valkey and a cluster pass the store suite, and keep to what their module says."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.stores.base import Store
from kvkeep.stores.redis import Manifest, RedisStore
from kvkeep.testing.servers import RedisCluster, RedisServer, redis_server, valkey_binary
from kvkeep.testing.stores import StoreSuite, key, value

_prefixes = (f"suite{number}" for number in itertools.count())
PATIENT = {"lookup_timeout": 5.0, "load_timeout": 5.0}
"""Where the deadline is not what is tested: this machine may be busy."""


class TestRedis(StoreSuite):
    examples = 15

    @pytest.fixture(autouse=True)
    def _server(self, redis_shared: RedisServer) -> None:
        self.url = redis_shared.url

    def make(self, path: Path, capacity: int | None) -> Store:
        return RedisStore(self.url, prefix=next(_prefixes), **PATIENT)


class TestUnixSocket(TestRedis):
    examples = 5

    @pytest.fixture(autouse=True)
    def _server(self, redis_shared: RedisServer) -> None:
        self.url = redis_shared.unix_url


@pytest.mark.parametrize("nbytes", [48, 7 << 20, 30_000_001])
def test_values_that_begin_like_a_manifest(redis_shared: RedisServer, nbytes: int) -> None:
    """Nobody can make the store read other names, or mistake a value for a list of parts."""
    forged = Manifest(100, 100, bytes(16)).packed()
    data = (forged + value(1, nbytes))[:nbytes]
    with contextlib.closing(RedisStore(redis_shared.url, prefix=next(_prefixes), **PATIENT)) as store:
        store.put_many([(key(1), [data[:7], data[7:]]), (key(2), [b"x"])])
        assert store.get(key(1)) == data
        assert dict(store.items()) == {key(1): nbytes, key(2): 1}
        assert store.delete(key(1))
        assert len(redis_shared.call("KEYS", f"{store.prefix}:*")) == 1


@pytest.mark.parametrize("numbers", [(1 << 40, 4 << 20), (100 << 20, 1), (100 << 20, 1 << 30), (0, 0)])
def test_a_manifest_that_cannot_be_ours_is_a_value(redis_shared: RedisServer, numbers: tuple[int, int]) -> None:
    """Which its seal will refuse: nothing is asked for, no room is made."""
    forged = Manifest(*numbers, bytes(16)).packed()
    with contextlib.closing(RedisStore(redis_shared.url, prefix=next(_prefixes), **PATIENT)) as store:
        redis_shared.call("SET", store.names([key(1)])[0], forged)
        assert store.get(key(1)) == forged
        assert store.delete(key(1))


@pytest.mark.parametrize("nbytes", [48, 1000, 7 << 20, 30_000_001])
def test_a_value_is_received_where_it_shall_lie(redis_shared: RedisServer, nbytes: int) -> None:
    data, out = value(1, nbytes), bytearray(nbytes + 100)
    with contextlib.closing(RedisStore(redis_shared.url, prefix=next(_prefixes), **PATIENT)) as store:
        store.put(key(1), [data])
        assert store.get_into(key(1), memoryview(out)) == nbytes
        assert out == data + bytes(100)
        small = bytearray(nbytes - 1)
        with pytest.raises(ValueError, match="does not fit"):
            store.get_into(key(1), memoryview(small))
        assert not any(small)
        assert store.get(key(1)) == data, "the connection is in step"
        lost = [name for name in redis_shared.call("KEYS", f"{store.prefix}:*") if name.endswith(b".0")]
        if lost:  # a part
            redis_shared.call("DEL", *lost)
            assert store.get_into(key(1), memoryview(out)) is None
            assert not store.contains(key(1))


def test_a_lookup_of_very_many_keys(redis_shared: RedisServer, cluster_shared: RedisCluster) -> None:
    """A context of a million tokens."""
    keys = [key(number) for number in range(60_000)]
    for url in (redis_shared.url, cluster_shared.url):
        with contextlib.closing(RedisStore(url, prefix=next(_prefixes), **PATIENT)) as store:
            store.put_many([(key(number), [b"x"]) for number in range(0, 60_000, 1000)])
            assert [at for at, there in enumerate(store.contains_many(keys)) if there] == list(range(0, 60_000, 1000))


@pytest.fixture(scope="module")
def valkey() -> Iterator[RedisServer]:
    with redis_server(binary=valkey_binary()) as server:
        yield server


class TestValkey(TestRedis):
    examples = 5

    @pytest.fixture(autouse=True)
    def _server(self, valkey: RedisServer) -> None:  # type: ignore[override]
        self.url = valkey.url.replace("redis://", "valkey://")


class TestCluster(TestRedis):
    examples = 8

    @pytest.fixture(autouse=True)
    def _server(self, cluster_shared: RedisCluster) -> None:  # type: ignore[override]
        self.url = cluster_shared.url
