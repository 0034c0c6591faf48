"""A medium that fails: misses at once, a probe in the background, back by itself, one line for each change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from blocks import LAYOUT, Sink, Source
from kvkeep import breaker
from kvkeep.breaker import Breaker
from kvkeep.cache import KVCache
from kvkeep.codecs.raw import Raw
from kvkeep.errors import StoreError
from kvkeep.events import Counters
from kvkeep.opening import codec_named
from kvkeep.policies.lru import LRU
from kvkeep.stores.memory import MemoryStore
from kvkeep.testing.faults import FaultyStore
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore

TOKENS = list(range(16 * 8))


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def broken() -> None:
    raise StoreError("still dead", cause="unreachable")


def test_the_pause_doubles_while_probes_fail_and_is_short_again_after_a_good_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(breaker.time, "monotonic", lambda: now)
    counters = Counters()
    switch = Breaker("remote", counters)
    opened: list[bool] = []
    switch.on_open = lambda: opened.append(True)
    pings: list[float] = []

    def ping() -> None:
        pings.append(now)
        broken()

    with caplog.at_level(logging.WARNING, "kvkeep"):
        switch.failed("a lookup", StoreError("no answer", cause="timeout"))
        switch.failed("a read", StoreError("no answer", cause="timeout"))
        assert not switch.closed
        for _ in range(400):
            now += 0.25
            switch.probe(ping)
        assert [later - earlier for earlier, later in pairwise(pings)] == [2, 4, 8, 16, 30, 30]
        now += 30
        switch.probe(lambda: None)
        assert switch.closed
    assert opened == [True]
    assert [record.getMessage() for record in caplog.records] == [
        "tier remote: a lookup failed (timeout), so it is left alone until it is well: no answer",
        "tier remote: is back",
    ]
    assert counters.count("store_error", cause="timeout") == 2
    assert counters.count("restored", tier="remote") == 1
    now += 1000
    switch.failed("a read", StoreError("again"))
    switch.probe(lambda: pytest.fail("asked before the pause is over"))
    now += breaker.PAUSE_SECONDS
    switch.probe(lambda: None)
    assert switch.closed


def test_a_dead_shared_tier_is_a_miss_at_once_and_comes_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.2)
    counters = Counters()
    medium = FaultyStore(MemoryStore(8 << 20), hang_seconds=0.5)
    tiers = [
        Tier("memory", MemoryStore(8 << 20), policy=LRU, codec=Raw(), observer=counters, trusted=True),
        Tier("remote", medium, policy=None, codec=Raw(), observer=counters),
    ]
    cache = KVCache(TieredStore(tiers, codec=codec_named, observer=counters), counters=counters, observer=counters)
    bound = cache.bind(LAYOUT)
    with cache:
        assert bound.save(TOKENS, Source(TOKENS)) == 8
        assert bound.flush(10)
        for key, _ in list(tiers[0].store.items()):
            tiers[0].delete(key)
        assert {tier.name for tier in bound.match(TOKENS).places} == {"remote"}
        medium.fail("error")
        assert bound.match(TOKENS).num_blocks == 0
        asked = counters.count("store_error")
        for _ in range(50):
            assert bound.match(TOKENS).num_blocks == 0
        assert counters.count("store_error") == asked == 1
        medium.heal()
        assert wait_for(lambda: bound.match(TOKENS).num_blocks == 8)
        sink = Sink()
        with bound.lease(bound.match(TOKENS)) as lease:
            bound.load(lease, sink)
        assert sink.check(TOKENS) == 8


def test_what_a_server_missed_or_lost_reaches_it_when_it_is_found_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.1)
    counters = Counters()
    medium = FaultyStore(MemoryStore(8 << 20))
    tiers = [
        Tier("memory", MemoryStore(8 << 20), policy=LRU, codec=Raw(), observer=counters, trusted=True),
        Tier("remote", medium, policy=None, codec=Raw(), observer=counters),
    ]
    cache = KVCache(TieredStore(tiers, codec=codec_named, observer=counters), counters=counters, observer=counters)
    bound = cache.bind(LAYOUT)

    def ask(tokens: list[int]) -> None:
        with bound.lease(bound.match(tokens)) as lease:
            assert bound.load(lease, Sink()) == len(tokens)
        assert bound.flush(10)

    with cache:
        lost, missed = TOKENS[:64], [token + 1 for token in TOKENS]
        bound.save(lost, Source(lost))
        assert bound.flush(10)
        ask(lost)
        assert counters.count("put", tier="remote") == 4
        medium.fail("error")
        bound.save(missed, Source(missed))
        assert bound.flush(10)
        assert counters.count("dropped", tier="remote") == 8
        medium.inner = MemoryStore(8 << 20)  # an empty one in its place
        medium.heal()
        assert wait_for(lambda: tiers[1].breakers.medium.closed)
        for _ in range(2):
            ask(lost)
            ask(missed)
        assert counters.count("put", tier="remote") == 4 + 4 + 8
        assert len(list(medium.items())) == 12


def test_a_save_does_not_wait_for_a_hanging_server() -> None:
    counters = Counters()
    medium = FaultyStore(MemoryStore(8 << 20), hang_seconds=3.0)
    tiers = [
        Tier("memory", MemoryStore(8 << 20), policy=LRU, codec=Raw(), observer=counters, trusted=True),
        Tier("remote", medium, policy=None, codec=Raw(), observer=counters),
    ]
    cache = KVCache(TieredStore(tiers, codec=codec_named, observer=counters), counters=counters, observer=counters)
    with cache:
        medium.fail("hang", times=1)
        start = time.monotonic()
        assert cache.bind(LAYOUT).save(TOKENS, Source(TOKENS)) == 8
        assert time.monotonic() - start < 2.0
        assert cache.flush(10)
        assert counters.count("put", tier="remote") == 8
