"""A cache with a real server below memory and disk: shared, never in the way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep import breaker
from kvkeep.testing.servers import RedisServer, redis_server, wait_for

PATIENT = "?lookup_timeout=5&load_timeout=5"
"""Where the deadline is not what is tested: this machine may be busy."""
TOKENS = list(range(16 * 20 + 5))


def load(cache: kvkeep.KVCache, tokens: list[int]) -> int:
    """Blocks loaded, each checked byte for byte."""
    sink = Sink()
    with cache.lease(cache.match(tokens)) as lease:
        cache.load(lease, sink)
    return sink.check(tokens)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.2)


def test_what_one_cache_saved_another_one_finds(redis_shared: RedisServer, tmp_path: Path) -> None:
    with kvkeep.open(tmp_path / "a", memory="4MiB", disk="8MiB", remote=redis_shared.url + PATIENT) as one:
        assert one.bind(LAYOUT).save(TOKENS, Source(TOKENS)) == 20
        assert one.flush(20)
    with kvkeep.open(tmp_path / "b", memory="4MiB", disk="8MiB", remote=redis_shared.url + PATIENT) as other:
        cache = other.bind(LAYOUT)
        assert {tier.name for tier in cache.match(TOKENS).places} == {"remote"}
        assert load(cache, TOKENS) == 20
        assert other.flush(20)
        assert {tier.name for tier in cache.match(TOKENS).places} == {"memory"}
        assert cache.save(TOKENS, Source(TOKENS)) == 0


def test_a_url_alone_and_another_namespace(redis_shared: RedisServer) -> None:
    tokens = [token + 7 for token in TOKENS]
    with kvkeep.open(redis_shared.unix_url + PATIENT, memory=0) as one:
        assert one.bind(LAYOUT).save(tokens, Source(tokens)) == 20
    with kvkeep.open(redis_shared.url + PATIENT, memory="4MiB", codec="lossless") as other:
        assert load(other.bind(LAYOUT), tokens) == 20
    with pytest.raises(kvkeep.ConfigError, match="two servers"):
        kvkeep.open(redis_shared.url, remote=redis_shared.url + PATIENT)


def test_a_server_killed_and_back_is_never_in_the_way(tmp_path: Path) -> None:
    with redis_server() as server, kvkeep.open(tmp_path, memory="1MiB", disk=0, remote=server.url + PATIENT) as root:
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        assert root.flush(20)
        server.kill()
        for seed in range(1, 6):
            tokens = [token + 1000 * seed for token in TOKENS]
            start = time.monotonic()
            assert load(cache, tokens) == 0
            assert cache.save(tokens, Source(tokens)) == 20
            assert load(cache, tokens) == 20
            assert time.monotonic() - start < 5
        assert root.counters.count("store_error", tier="remote") == 1, "asked once, then left alone"
        server.start()
        tokens = [token + 9000 for token in TOKENS]
        wait_for(lambda: root.store.tiers[1].breakers.medium.closed, "the breaker stays open")
        cache.save(tokens, Source(tokens))
        assert root.flush(20)
        wait_for(lambda: sum(root.store.tiers[1].contains_many(cache.match(tokens).keys)) == 20, "nothing was written")


def test_a_server_that_is_not_there_is_no_error() -> None:
    with kvkeep.open("redis://127.0.0.1:1/0", memory="4MiB") as root:
        cache = root.bind(LAYOUT)
        assert cache.save(TOKENS, Source(TOKENS)) == 20
        assert load(cache, TOKENS) == 20
        assert cache.match([9, *TOKENS]).num_blocks == 0
