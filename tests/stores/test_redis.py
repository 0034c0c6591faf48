"""Redis, Valkey and a cluster pass the store suite, and keep to what their module says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.stores.base import Store
from kvkeep.stores.redis import RedisStore
from kvkeep.testing.servers import RedisCluster, RedisServer, redis_server, valkey_binary
from kvkeep.testing.stores import StoreSuite

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
