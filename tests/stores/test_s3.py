"""An S3-compatible server passes the store suite, and fails as a miss."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep.errors import ConfigError, StoreError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Store
from kvkeep.stores.s3 import S3Store, _failure
from kvkeep.stores.url import open_store
from kvkeep.testing.servers import S3Server, s3_server, wait_for
from kvkeep.testing.stores import StoreSuite

_prefixes = (f"suite/{number}" for number in itertools.count())
KEY = BlockKey(hashlib.sha256(b"a block").digest())


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-of-the-bucket")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def store_at(server: S3Server, **options: float) -> S3Store:
    patient = {"lookup_timeout": 20.0, "load_timeout": 20.0, **options}
    return S3Store(S3Server.bucket, prefix=next(_prefixes), endpoint=server.endpoint, **patient)


class TestS3(StoreSuite):
    examples = 3
    value_nbytes = 20_000

    @pytest.fixture(autouse=True)
    def _server(self, s3_shared: S3Server) -> None:
        self.server = s3_shared

    def make(self, path: Path, capacity: int | None) -> Store:
        return store_at(self.server)


def test_two_caches_share_a_bucket(s3_shared: S3Server) -> None:
    url = f"s3://{S3Server.bucket}/shared?endpoint={s3_shared.endpoint}&lookup_timeout=20&load_timeout=20"
    tokens = list(range(16 * 6))
    with kvkeep.open(memory="4MiB", remote=url) as one:
        assert one.bind(LAYOUT).save(tokens, Source(tokens)) == 6
    with kvkeep.open(url, memory="4MiB") as other:
        cache = other.bind(LAYOUT)
        assert {tier.name for tier in cache.match(tokens).places} == {"remote"}
        sink = Sink()
        with cache.lease(cache.match(tokens)) as lease:
            cache.load(lease, sink)
        assert sink.check(tokens) == 6


def test_a_frozen_or_dead_server_is_an_error_within_its_deadline() -> None:
    with s3_server() as server:
        store = store_at(server, lookup_timeout=0.3)
        store.put(KEY, [b"value"])
        server.freeze()
        with pytest.raises(StoreError) as raised:
            store.contains(KEY)
        assert raised.value.cause == "timeout"
        server.thaw()
        wait_for(lambda: answers(store), "it stays away")
        assert store.get(KEY) == b"value"
        server.kill()
        with pytest.raises(StoreError) as raised:
            store.get(KEY)
        assert raised.value.cause == "unreachable"
        assert "hunter2" not in f"{raised.value!r} {store!r}"
        store.close()


def answers(store: S3Store) -> bool:
    try:
        store.ping()
    except StoreError:
        return False
    return True


def test_a_bucket_that_does_not_exist(s3_shared: S3Server) -> None:
    store = S3Store("nowhere-at-all", endpoint=s3_shared.endpoint, lookup_timeout=20)
    with pytest.raises(StoreError):
        store.put(KEY, [b"value"])
    store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names its bucket"),
        ("s3://key:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket?enpoint=x", "did you mean 'endpoint'"),
        ("s3://bucket?rate=fast", "is a number"),
    ],
)
def test_a_wrong_address_is_named(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        open_store(url)
    assert "hunter2" not in str(raised.value)


def test_no_credentials_are_named_as_that() -> None:
    """Without any, the client asks the cloud that the machine may run in."""
    from obstore.exceptions import GenericError

    error = GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - 403")
    found = _failure(error)
    assert found.cause == "auth"
    assert "AWS_ACCESS_KEY_ID" in str(found)
