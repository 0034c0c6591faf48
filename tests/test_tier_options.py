"""Time to live, priority, pins, and options that differ by tier."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep.codecs.raw import Raw
from kvkeep.events import Counters
from kvkeep.keys import BlockKey, block_keys
from kvkeep.policies.base import Access
from kvkeep.policies.lru import LRU
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.memory import MemoryStore
from kvkeep.tier import Tier

BLOCK = LAYOUT.block_nbytes


def prompt(seed: int, blocks: int = 4) -> list[int]:
    return [seed * 100_000 + at for at in range(16 * blocks)]


def stored(cache: kvkeep.KVCache, tokens: list[int]) -> int:
    return cache.match(tokens).num_blocks


def fill(tier: Tier, keys: list[BlockKey], now: float, *, priority: int = 0) -> int:
    items = [(key, [bytes(BLOCK)]) for key in keys]
    return tier.put_many(items, [Access(now, priority=priority)] * len(keys))


def test_a_block_older_than_its_ttl_is_neither_found_nor_kept() -> None:
    clock = [1000.0]
    counters = Counters()
    tier = Tier("memory", MemoryStore(1 << 20), policy=LRU, codec=Raw(), observer=counters, ttl=60,
                clock=lambda: clock[0])  # fmt: skip
    old, new = block_keys(LAYOUT, prompt(1)), block_keys(LAYOUT, prompt(2))
    fill(tier, old, clock[0])
    clock[0] += 40
    fill(tier, new, clock[0])
    assert all(tier.contains_many(old + new))
    clock[0] += 21
    assert tier.contains_many(old + new) == [False] * 4 + [True] * 4
    tier.maintain()
    assert sorted(key for key, _ in tier.store.items()) == sorted(new)
    assert counters.count("evict", cause="expired") == 4
    assert tier.usage[0] == 4


def test_the_age_on_disk_survives_a_restart(tmp_path: Path) -> None:
    clock = [1000.0]

    def opened() -> Tier:
        store = DiskStore(tmp_path, capacity=1 << 20, clock=lambda: clock[0])
        return Tier("disk", store, policy=LRU, codec=Raw(), observer=Counters(), ttl=60, clock=lambda: clock[0])

    keys = block_keys(LAYOUT, prompt(1))
    tier = opened()
    fill(tier, keys[:2], clock[0])
    clock[0] += 50
    fill(tier, keys[2:], clock[0])
    tier.store.close()
    clock[0] += 20
    tier = opened()
    assert tier.contains_many(keys) == [False, False, True, True]
    tier.maintain()
    assert {key for key, _ in tier.store.items()} == set(keys[2:])
    tier.store.close()


def test_a_lower_priority_goes_first_whatever_the_policy_says() -> None:
    counters = Counters()
    tier = Tier("memory", MemoryStore(8 * BLOCK), policy=LRU, codec=Raw(), observer=counters)
    precious, plain = block_keys(LAYOUT, prompt(1)), block_keys(LAYOUT, prompt(2))
    later = block_keys(LAYOUT, prompt(3))
    fill(tier, precious, 1.0, priority=5)
    fill(tier, plain, 2.0)
    assert fill(tier, later, 3.0) == 4
    assert tier.contains_many(precious + plain) == [True] * 4 + [False] * 4
    assert fill(tier, plain, 4.0, priority=7) == 4
    assert not any(tier.contains_many(later))
    assert fill(tier, later, 5.0, priority=7) == 4
    assert not any(tier.contains_many(precious))


def test_pinned_prompts_stay_until_they_are_unpinned() -> None:
    with kvkeep.open(memory=16 * (BLOCK + 192)) as root:
        cache = root.bind(LAYOUT)
        cache.pin(prompt(1))
        cache.save(prompt(1), Source(prompt(1)))
        for seed in range(2, 12):
            cache.save(prompt(seed), Source(prompt(seed)))
        assert stored(cache, prompt(1)) == 4
        cache.unpin(prompt(1))
        for seed in range(12, 22):
            cache.save(prompt(seed), Source(prompt(seed)))
        assert stored(cache, prompt(1)) == 0


def test_priority_of_a_bound_cache() -> None:
    with kvkeep.open(memory=16 * (BLOCK + 192)) as root:
        system, others = root.bind(LAYOUT, priority=1), root.bind(LAYOUT)
        system.save(prompt(1), Source(prompt(1)))
        for seed in range(2, 12):
            others.save(prompt(seed), Source(prompt(seed)))
        assert stored(others, prompt(1)) == 4


def test_a_prompt_of_many_blocks_does_not_push_out_a_higher_priority(tmp_path: Path) -> None:
    room = 16 * (BLOCK + 512)
    for path in (None, tmp_path):
        with kvkeep.open(path, memory=room, disk="8MiB") as root:
            system, others = root.bind(LAYOUT, priority=1), root.bind(LAYOUT)
            system.save(prompt(1, 8), Source(prompt(1, 8)))
            for seed in range(2, 6):
                saved = others.save(prompt(seed, 12), Source(prompt(seed, 12)))
                assert saved == (8 if path is None else 12), "where writes wait for the disk, all is taken"
            assert root.flush(10)
            assert stored(system, prompt(1, 8)) == 8
            assert stored(others, prompt(5, 12)) == (8 if path is None else 12)


@pytest.mark.parametrize(
    ("codec", "memory", "disk"),
    [
        (None, "raw", "lossless"),
        ("lossless", "raw", "lossless"),
        ("raw", "raw", "raw"),
        ({"memory": "lossless"}, "lossless", "lossless"),
        ({"disk": "raw", "memory": "lossless"}, "lossless", "raw"),
    ],
)
def test_each_tier_has_its_codec(tmp_path: Path, codec: str | dict[str, str] | None, memory: str, disk: str) -> None:
    tokens = prompt(1, 8)
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB", codec=codec) as root:
        cache = root.bind(LAYOUT)
        assert cache.save(tokens, Source(tokens)) == 8
        assert root.flush(10)
        found = []
        for tier in root.store.tiers:
            with tier.store.read([key for key, _ in tier.store.items()][:1]) as (value,):
                assert value is not None
                found.append(bytes(value[96:112]).rstrip(b"\0").decode())
        assert found == [memory, disk]
        sink = Sink()
        with cache.lease(cache.match(tokens)) as lease:
            cache.load(lease, sink)
        assert sink.check(tokens) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": {"dsik": "lru"}}, "did you mean 'disk'"),
        ({"codec": {"memory": "rwa"}}, "did you mean 'raw'"),
        ({"ttl": "soon"}, "is no age"),
        ({"ttl": 0}, "keeps nothing"),
        ({"memory": 0}, "without any tier"),
        ({"quota": {"remote": "1GiB"}}, "quota: a server bounds itself"),
        ({"policy": {"remote": "lru"}}, "policy: a server bounds itself"),
        ({"trace": 5}, "trace is a path, not 5"),
        ({"path": 5}, "path is a path, not 5"),
        ({"remote": 5}, "remote is a text"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(kvkeep.ConfigError, match=said):
        kvkeep.open(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("none", [None, {"memory": None}])
def test_none_is_the_default(none: dict[str, None] | None) -> None:
    options = dict.fromkeys(("policy", "codec", "ttl", "quota", "write_rule", "admission"), none)
    with kvkeep.open(memory="4MiB", **options) as root:  # type: ignore[arg-type]
        assert root.bind(LAYOUT).save(prompt(1), Source(prompt(1))) == 4


def test_ttl_of_an_open_cache(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB", ttl={"memory": "1d", "disk": 0.5}) as root:
        cache = root.bind(LAYOUT)
        cache.save(prompt(1), Source(prompt(1)))
        assert root.flush(10)
        memory, disk = root.store.tiers
        keys = block_keys(LAYOUT, prompt(1))
        end = time.monotonic() + 20
        while any(disk.contains_many(keys)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(disk.contains_many(keys))
        assert all(memory.contains_many(keys))


def test_a_write_rule_spares_the_disk_until_a_second_request_comes(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="8MiB", disk="8MiB", write_rule="seen-twice") as root:
        cache = root.bind(LAYOUT)
        memory, disk = root.store.tiers
        keys = block_keys(LAYOUT, prompt(1))
        assert cache.save(prompt(1), Source(prompt(1))) == 4
        assert root.flush(10)
        assert all(memory.contains_many(keys))
        assert not any(disk.contains_many(keys))
        with cache.lease(cache.match(prompt(1)[:32])) as lease:
            assert cache.load(lease, Sink()) == 32
        assert root.flush(10)
        assert disk.contains_many(keys) == [True, True, False, False]


def test_admission_keeps_what_is_asked_for_once_out_of_memory() -> None:
    with kvkeep.open(memory="8MiB", admission="seen-twice") as root:
        cache = root.bind(LAYOUT)
        assert cache.save(prompt(1), Source(prompt(1))) == 0
        assert stored(cache, prompt(1)) == 0
        assert cache.save(prompt(1), Source(prompt(1))) == 4
        assert stored(cache, prompt(1)) == 4


def test_a_recording_can_be_replayed(tmp_path: Path) -> None:
    from kvkeep.trace import read_all

    with kvkeep.open(memory="8MiB", trace=tmp_path / "requests.jsonl") as root:
        cache = root.bind(LAYOUT)
        for tokens in (prompt(1), prompt(2), prompt(1)):
            cache.match(tokens)
            cache.save(tokens, Source(tokens))
    (trace,) = read_all([tmp_path / "requests.jsonl"])
    assert [len(request.keys) for request in trace.requests] == [4, 4, 4]
    assert trace.requests[0].keys == trace.requests[2].keys != trace.requests[1].keys
    assert trace.block_tokens == 16


def test_one_codec_is_for_memory_too_if_that_is_all_there_is() -> None:
    with kvkeep.open(memory="4MiB", codec="lossless") as root:
        assert root.store.tiers[0].codec.name == "lossless"
