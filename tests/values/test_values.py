"""The key-value face of a cache, in memory, in a directory and over real servers."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import kvkeep
from kvkeep.cache import KVCache
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access
from kvkeep.stores.redis import RedisStore
from kvkeep.stores.redis_cluster import slot_of
from kvkeep.testing.faults import FaultyStore
from kvkeep.testing.servers import MemcachedServer, RedisServer, memcached_server, redis_cluster, wait_for
from kvkeep.values.entry import Entry, encode
from kvkeep.values.index import Item
from kvkeep.values.store import layout_of

PATIENT = "?lookup_timeout=20&load_timeout=20&save_timeout=20"
_numbers = itertools.count()
ARRAY = np.random.default_rng(0).standard_normal((300, 40))


@pytest.fixture(params=["memory", "directory", "server", "directory and server", "memcached server"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., KVCache]]:
    """Opens caches that share what can be shared."""
    kind = request.param
    url = None
    if "memcached" in kind:
        where = request.getfixturevalue("memcached_shared").where
        url = f"memcached://{where}{PATIENT}&prefix=values{next(_numbers)}"
    elif "server" in kind:
        url = request.getfixturevalue("redis_shared").url + PATIENT
    with contextlib.ExitStack() as stack:

        def make(folder: str = "a", **options: Any) -> KVCache:
            path = tmp_path / folder if "directory" in kind else None
            cache = kvkeep.open(path, memory="16MiB", disk="32MiB", remote=url, **options)
            stack.callback(cache.close)
            return cache

        make.kind = kind  # type: ignore[attr-defined]
        yield make


@pytest.fixture
def cache(opened: Callable[..., KVCache]) -> KVCache:
    return opened()


def test_values_come_back(cache: KVCache) -> None:
    things = {
        "array": ARRAY,
        "text": "é" * 500,
        "small": 1.5,
        "nothing": None,
        "bytes": b"x" * 5000,
        "list": [1, [ARRAY]],
    }
    for name, thing in things.items():
        assert cache.set_value(name, thing)
    for name, thing in things.items():
        found = cache.get_value(name, "missing")
        assert type(found) is type(thing)
        np.testing.assert_equal(found, thing)
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
    cache.set_value(("frame", 1), frame)
    pd.testing.assert_frame_equal(cache.get_value(("frame", 1)), frame)
    assert cache.get_value("frame") is None
    assert cache.get_value("frame", 7) == 7


def test_what_is_got_is_the_callers_own(cache: KVCache) -> None:
    cache.set_value("a", ARRAY)
    first = cache.get_value("a")
    first[:] = 0
    assert np.array_equal(cache.get_value("a"), ARRAY)
    kept = ARRAY.copy()
    cache.set_value("b", kept)
    kept[:] = 0
    assert np.array_equal(cache.get_value("b"), ARRAY)


def test_a_key_is_its_type_too(cache: KVCache) -> None:
    keys = ["1", 1, 1.0, True, b"1", ("1",), (1,), None, (), ("1", ("1",))]
    assert cache.set_values({"x": None}) == 1
    for at, key in enumerate(keys):
        cache.set_value(key, at)
    assert [cache.get_value(key) for key in keys] == list(range(len(keys)))
    for bad in ([1], {"a": 1}, np.float64(1.0), ARRAY, ("a", [1])):
        with pytest.raises(TypeError, match="a key is"):
            cache.get_value(bad)
        with pytest.raises(TypeError, match="a key is"):
            cache.set_value(bad, 1)


def test_what_no_medium_takes_is_refused_before_it_is_asked(cache: KVCache) -> None:
    """Else it would take the index for broken, and leave it alone."""
    with pytest.raises(ValueError, match="digest of it instead"):
        cache.set_value("x" * 10_000_000, 1)
    assert cache.set_value("x" * 60_000, 2)
    assert cache.get_value("x" * 60_000) == 2


def test_what_is_wrong_is_said_in_its_terms(cache: KVCache) -> None:
    for wait in (None, "5", True, float("nan"), -1):
        with pytest.raises((TypeError, ValueError), match="wait is a number of seconds"):
            cache.get_or_compute("a", lambda: 1, wait=wait)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ttl is a number of seconds, not True"):
        cache.set_value("a", 1, ttl=True)
    with pytest.raises(TypeError, match=r"number of Python's.*not numpy.int64"):
        cache.set_value(np.int64(1), 1)
    with pytest.raises(TypeError, match="a tag is a text"):
        cache.invalidate(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a dict of keys and values, not list"):
        cache.set_values([("a", 1)])  # type: ignore[arg-type]
    assert cache.get_or_compute("a", lambda: 1, wait=1e300) == 1


def test_numbers_of_numpy_are_lives(cache: KVCache) -> None:
    for ttl in (np.int64(100), np.float32(100), np.float16(100)):
        assert cache.set_value("a", ARRAY, ttl=ttl)  # type: ignore[arg-type]
        assert cache.get_value("a") is not None
    assert cache.get_or_compute("b", lambda: 1, ttl=np.float32(0.2), wait=np.float32(1)) == 1  # type: ignore[arg-type]
    assert cache.get_value("b") == 1
    time.sleep(0.25)
    assert cache.get_value("b") is None


def test_a_tag_is_any_text(cache: KVCache) -> None:
    assert cache.set_value("a", 1, tags=["\ud800", "\ud800"])
    assert cache.get_value("a") == 1
    assert cache.invalidate("\ud800")
    assert cache.get_value("a") is None


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_cache_misses_and_keeps_nothing(
    opened: Callable[..., KVCache], used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = opened()
    if used:
        cache.set_values({"a": 1, "b": ARRAY})
    cache.close()
    assert not cache.set_value("c", 1)
    assert not cache.set_value("d", ARRAY, tags=["t"])
    assert cache.get_values(["a", "b", "c", "d"], "gone") == ["gone"] * 4
    assert not cache.delete_value("a")
    assert not cache.invalidate("t")
    assert cache.keys_of(1) == []
    assert [cache.get_or_compute("e", lambda: 3) for _ in range(2)] == [3, 3]
    assert cache.stats().values.names is None
    assert not caplog.records


def test_a_life_may_be_longer_than_a_medium_counts(cache: KVCache) -> None:
    for ttl in (40 * 86400, 20 * 365 * 86400, 1e300, 10**400):
        assert cache.set_value(("for ever", str(ttl)[:9]), ARRAY, ttl=ttl)
        assert cache.get_value(("for ever", str(ttl)[:9])) is not None
    assert cache.get_or_compute("refreshed", lambda: 3, ttl=100, stale=1e300) == 3
    assert cache.get_or_compute("refreshed", lambda: 4, ttl=100, stale=1e300) == 3
    assert cache.counters.count("store_error") == 0


def test_replacing_and_deleting(cache: KVCache) -> None:
    cache.set_value("a", ARRAY)
    cache.set_value("a", ARRAY + 1)
    assert np.array_equal(cache.get_value("a"), ARRAY + 1)
    assert cache.delete_value("a")
    assert not cache.delete_value("a")
    assert cache.get_value("a") is None
    assert all(tier.usage[0] == 0 for tier in cache.store.tiers), "no bytes are left"


def test_many_at_once(cache: KVCache) -> None:
    matrix = ARRAY[:20, :20]
    cells = {("C", i, j): float(matrix[i, j]) for i in range(20) for j in range(20)}
    assert cache.set_values(cells) == 400
    assert cache.get_values(list(cells)) == list(cells.values())
    assert cache.get_values([("C", 0, 0), ("C", 99, 0)], "missing") == [matrix[0, 0], "missing"]
    assert cache.get_values([]) == []
    with pytest.raises(TypeError, match="not one"):
        cache.get_values("C")


def test_a_life_is_exact(cache: KVCache) -> None:
    cache.get_value("price")  # the connection
    start = time.monotonic()
    cache.set_value("price", 101.5, ttl=0.3)
    cache.set_value("array", ARRAY, ttl=0.3)
    cache.set_value("long", 1, ttl=100)
    set_at = time.monotonic()
    while time.monotonic() - start < 0.2:
        found = cache.get_value("price"), cache.get_value("array") is not None
        assert time.monotonic() - start > 0.3 or found == (101.5, True)
    time.sleep(max(0.0, set_at + 0.35 - time.monotonic()))
    assert cache.get_value("price") is None
    assert cache.get_value("array") is None
    assert cache.get_value("long") == 1
    for ttl in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ttl"):
            cache.set_value("x", 1, ttl=ttl)
    with pytest.raises(TypeError, match="seconds, not '7d'"):
        cache.set_value("x", 1, ttl="7d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ttl"):
        cache.get_or_compute("x", lambda: pytest.fail("computed in vain"), ttl=-1)


def test_tags(opened: Callable[..., KVCache]) -> None:
    cache, other = opened(), opened()
    seen = cache if opened.kind == "memory" else other  # type: ignore[attr-defined]
    cache.set_value("a", ARRAY, tags=["prices", "eu"])
    cache.set_value("b", 2, tags=["prices", "us"])
    cache.set_value("c", 3)
    assert seen.get_value("b") == 2
    assert seen.invalidate("eu")
    assert cache.get_value("a") is None
    assert seen.get_value("a") is None
    assert cache.get_value("b") == 2
    cache.set_value("a", ARRAY, tags=["prices", "eu"])
    assert seen.get_value("a") is not None
    cache.invalidate("prices")
    assert seen.get_values(["a", "b", "c"]) == [None, None, 3]
    with pytest.raises(TypeError, match="not 'eu'"):
        cache.set_value("a", 1, tags="eu")
    with pytest.raises(TypeError, match="not 'eu'"):
        cache.get_or_compute("a", lambda: 1, tags="eu")
    for wrong in (7, ["eu"]):
        with pytest.raises(TypeError):
            cache.invalidate(wrong)  # type: ignore[arg-type]


def test_equal_values_are_stored_once(cache: KVCache) -> None:
    cache.set_value("a", ARRAY)
    before = [tier.usage for tier in cache.store.tiers]
    cache.set_value("b", ARRAY.copy())
    cache.set_value(("c", 1), ARRAY)
    cache.set_value("d", ARRAY + 1)
    cache.delete_value("d")
    assert [tier.usage for tier in cache.store.tiers] == before
    assert sorted(cache.keys_of(ARRAY), key=str) == [("c", 1), "a", "b"]
    assert cache.keys_of(ARRAY + 1) == []
    assert cache.counters.count("value_shared") == 2
    assert cache.counters.nbytes("value_shared") >= 2 * ARRAY.nbytes
    cache.delete_value("a")
    assert sorted(cache.keys_of(ARRAY), key=str) == [("c", 1), "b"]
    assert np.array_equal(cache.get_value("b"), ARRAY)
    cache.set_value("b", 1)
    cache.delete_value(("c", 1))
    assert cache.keys_of(ARRAY) == []
    assert cache.keys_of(1) == ["b"]


def test_tenants_share_nothing(opened: Callable[..., KVCache]) -> None:
    mine, yours = opened(namespace=b"mine"), opened(namespace=b"yours")
    mine.set_value("a", ARRAY)
    assert yours.get_value("a") is None
    assert yours.keys_of(ARRAY) == []
    yours.set_value("a", ARRAY)
    assert yours.counters.count("value_shared") == 0
    yours.invalidate("x")
    yours.delete_value("a")
    assert np.array_equal(mine.get_value("a"), ARRAY)


def test_a_second_cache_finds_them(opened: Callable[..., KVCache]) -> None:
    """Another process, another directory: whatever reaches as far as the index does."""
    if opened.kind == "memory":  # type: ignore[attr-defined]
        return
    cache = opened()
    other = opened("b" if "server" in opened.kind else "a")  # type: ignore[attr-defined]
    cache.set_value("a", ARRAY)
    assert np.array_equal(other.get_value("a"), ARRAY)
    assert other.keys_of(ARRAY) == ["a"]
    other.set_value("a", 5)
    assert cache.get_value("a") == 5


@pytest.mark.parametrize("array", [ARRAY, np.asfortranarray(ARRAY), np.zeros((500, 100)), ARRAY.astype("f2")[::2]])
@pytest.mark.parametrize("encryption", [None, lambda: b"k" * 32])
def test_an_array_from_below_lies_where_it_was_received(
    opened: Callable[..., KVCache], array: np.ndarray, encryption: Any
) -> None:
    cache = opened(encryption=encryption)
    cache.set_value("a", array)
    cache.set_value("b", [array, array])
    if opened.kind != "memory":  # type: ignore[attr-defined]
        cache.close()
        cache = opened(encryption=encryption)
    for _ in range(4):
        found, both = cache.get_value("a"), cache.get_value("b")
        for one in (found, *both):
            assert one.dtype == array.dtype
            assert one.strides == array.copy("K").strides
            assert np.array_equal(one, array)
            assert one.flags.writeable
            assert one.flags.aligned
            one[:] = 7
        assert not np.shares_memory(*both)


def test_a_frame_that_is_too_long_is_refused(redis_shared: RedisServer) -> None:
    url = f"{redis_shared.url}{PATIENT}&prefix=values{next(_numbers)}"
    with kvkeep.open(url, memory="16MiB") as cache:
        cache.set_value("a", ARRAY)
    with kvkeep.open(url, memory="16MiB") as cache:
        store = cache.store.tiers[-1].store
        ((key, _),) = store.items()
        frame = bytes(store.get(key) or b"")
        store.delete(key)
        store.put(key, [frame, bytes(100_000)])
        assert cache.get_value("a", "missing") == "missing"
        assert cache.counters.count("corrupt", tier="remote", cause="long") == 1
        assert store.get(key) is None
        assert cache.set_value("a", ARRAY)
        assert np.array_equal(cache.get_value("a"), ARRAY)


def test_a_restart_finds_them(opened: Callable[..., KVCache]) -> None:
    cache = opened()
    cache.set_value("a", ARRAY, tags=["t"])
    cache.close()
    again = opened()
    if opened.kind == "memory":  # type: ignore[attr-defined]
        assert again.get_value("a") is None
    else:
        assert np.array_equal(again.get_value("a"), ARRAY)


def test_an_object_is_an_error_and_nothing_is_set(cache: KVCache) -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        cache.set_values({"good": 1, "bad": object()})
    assert cache.get_value("good") is None


@pytest.mark.parametrize("codec", ["lossless", "int4", "uqz"])
def test_lossy_codecs_leave_values_alone(tmp_path: Path, codec: str) -> None:
    with kvkeep.open(tmp_path, memory="8MiB", disk="16MiB", codec=codec) as cache:
        cache.set_value("a", ARRAY)
    with kvkeep.open(tmp_path, memory="8MiB", disk="16MiB", codec=codec) as cache:
        assert np.array_equal(cache.get_value("a"), ARRAY)
        assert cache.counters.count("load", tier="disk") == 1


def test_what_hardly_gets_smaller_is_kept_as_it_is(tmp_path: Path) -> None:
    """Reading it is then as fast as copying it."""
    stored = {}
    for name, array in (("noise", ARRAY), ("zeros", np.zeros_like(ARRAY))):
        with kvkeep.open(tmp_path / name, memory="8MiB", disk="16MiB", codec="lossless") as cache:
            cache.set_value("a", array)
            stored[name] = cache.store.tiers[1].usage[1]
    assert stored["noise"] >= ARRAY.nbytes
    assert stored["zeros"] < ARRAY.nbytes / 10


def test_what_was_used_last_stays_in_memory() -> None:
    """Policies are told of hits a few at a time, but before anything has to give way."""
    arrays = [np.full(1 << 17, float(at)) for at in range(4)]
    with kvkeep.open(memory="3400KiB", policy="lru") as cache:
        for at in range(3):
            assert cache.set_value(at, arrays[at])
        assert cache.get_value(0) is not None
        cache.set_value(3, arrays[3])
        assert [cache.get_value(at) is not None for at in range(4)] == [True, False, True, True]


def test_memory_gives_no_frame_that_is_not_the_values_own(cache: KVCache) -> None:
    cache.set_value("a", ARRAY)
    cache.set_value("b", ARRAY + 1)
    assert np.array_equal(cache.get_value("a"), ARRAY)
    memory = cache.store.tiers[0].store
    (a, frame_a), (b, frame_b) = [(key, bytes(memory.get(key) or b"")) for key, _ in memory.items()]
    at_key, at_layout = slice(32, 64), slice(64, 96)
    for wrong in (frame_b, frame_a[:100], frame_a + b"x", b"", frame_a.replace(frame_a[at_key], b, 1),
                  frame_a.replace(frame_a[at_layout], bytes(32), 1)):  # fmt: skip
        memory.delete(a)
        memory.put(a, [wrong])
        other = cache.get_value("a")  # perhaps from below
        assert other is None or np.array_equal(other, ARRAY)
        cache.set_value("a", ARRAY)
        assert np.array_equal(cache.get_value("a"), ARRAY)


def test_with_small_memory_values_and_blocks_stay_in_their_room(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="1MiB", disk="2MiB") as cache:
        arrays = [np.random.default_rng(number).standard_normal(10_000) for number in range(100)]
        for number, array in enumerate(arrays):
            cache.set_value(number, array)
        assert sum(tier.usage[1] for tier in cache.store.tiers) <= 3 << 20
        found = [cache.get_value(number) for number in range(100)]
        assert all(one is None or np.array_equal(one, array) for one, array in zip(found, arrays, strict=True))
        assert any(one is not None for one in found)
        assert cache.counters.count("value_miss", cause="lost") > 0
        assert not cache.set_value("huge", np.random.default_rng(0).integers(0, 256, 10 << 20, np.uint8))
        assert cache.get_value("huge") is None


def test_stats_and_their_frame(cache: KVCache) -> None:
    assert cache.stats().values is None
    for key in "abc":
        cache.set_value(key, ARRAY)
    cache.get_values(["a", "b", "missing"])
    values = cache.stats().values
    assert values is not None
    assert (values.hits, values.misses, values.kept, values.shared) == (2, 1, 3, 2)
    assert 2 * ARRAY.nbytes <= values.saved_nbytes <= 2 * ARRAY.nbytes + 1000
    assert (values.names, values.distinct) in [(3, 1), (None, None)]
    frame = cache.stats().to_frame().set_index(["event", "tier", "cause"])
    assert frame.loc[("value_hit", "", ""), "count"] == 2
    assert frame.loc[("resident", "memory", ""), "count"] == 1
    assert frame.loc[("values saved", "", ""), "nbytes"] == values.saved_nbytes
    assert not frame.index.duplicated().any()


# Many that write at once


def test_two_writers_never_mix(opened: Callable[..., KVCache]) -> None:
    caches = [opened(), opened()]
    stop = time.monotonic() + 1.0
    failures: list[Any] = []

    def write(at: int) -> None:
        while time.monotonic() < stop:
            caches[at % 2].set_value("shared", np.full(3000, at), ttl=50 + at)
            found = caches[at % 2].get_value("shared")
            if found is not None and len(set(found.tolist())) != 1:
                failures.append(found)

    threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Hostile and broken media


def replace_bytes(cache: KVCache, key: Any, packed: bytes) -> None:
    """What one who can write everywhere, and knows the namespace, would leave: whole frames and whole entries."""
    values = cache.values
    digest = b"d" * 32
    name = values.name(b"".join(kvkeep_pack(key)))
    layout = layout_of(len(packed), cache.namespace)
    assert cache.store.save_now(BlockKey(digest), memoryview(packed), layout, Access(0.0))
    values.index.set_many([Item(name, encode(name, Entry(digest, len(packed), b"", ())), None, digest, len(packed))])


def kvkeep_pack(key: Any) -> list[Any]:
    from kvkeep.values.form import pack

    return pack(key)


@pytest.mark.parametrize("evil", [b"cos\nsystem\n(S'false'\ntR.", b"\x80\x04\x95" + b"x" * 100, bytes(500)])
def test_stored_bytes_that_are_no_value_are_a_miss(cache: KVCache, evil: bytes) -> None:
    cache.set_value("a", ARRAY)
    replace_bytes(cache, "a", evil)
    assert cache.get_value("a") is None
    assert cache.counters.count("value_miss", cause="corrupt") == 1
    assert cache.get_or_compute("a", lambda: 5) == 5
    assert cache.get_value("a") == 5


def test_entries_of_another_name_or_damaged_ones_are_a_miss(cache: KVCache) -> None:
    cache.set_value("a", 1)
    cache.set_value("b", 2)
    index = cache.values.index
    names = {key: cache.values.name(b"".join(kvkeep_pack(key))) for key in "ab"}
    (found,) = index.get_many([names["a"]])
    assert found is not None
    index.set_many([Item(names["b"], found.body)])
    assert cache.get_value("b") is None
    for body in (b"", found.body[:-1], found.body[:50], bytes([found.body[0] ^ 1]) + found.body[1:], b"x" * 1000):
        index.set_many([Item(names["a"], body)])
        assert cache.get_value("a") is None
    assert cache.counters.count("value_miss", cause="corrupt") == 6


@pytest.mark.parametrize("fault", ["error", "full", "truncate", "flip", "swap", "lose"])
def test_a_faulty_disk_costs_hits_and_nothing_else(tmp_path: Path, fault: Any) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as cache:
        disk = cache.store.tiers[1]
        disk.store = FaultyStore(disk.store)
        disk.store.fail(fault)
        cache.set_value("a", ARRAY)
        for key, _ in list(cache.store.tiers[0].store.items()):
            cache.store.tiers[0].delete(key)
        found = cache.get_value("a")
        assert found is None or np.array_equal(found, ARRAY)
        assert cache.get_or_compute("b", lambda: ARRAY) is ARRAY
        assert np.array_equal(cache.get_value("b"), ARRAY)


def test_a_directory_without_its_index(tmp_path: Path) -> None:
    """Somebody put a folder where the index should be."""
    (tmp_path / "values.sqlite").mkdir()
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as cache:
        assert not cache.set_value("a", ARRAY)
        assert cache.get_value("a") is None
        assert cache.get_or_compute("a", lambda: 3) == 3
        assert cache.counters.count("store_error", tier="index") >= 1  # once more for each probe


def test_a_server_that_dies_and_comes_back(redis_own: RedisServer) -> None:
    with kvkeep.open(redis_own.url + "?lookup_timeout=0.3", memory="8MiB") as cache:
        wait_for(lambda: cache.set_value("a", ARRAY), "the server is not used")
        redis_own.kill()
        for _ in range(3):
            assert cache.get_value("a") is None
            assert not cache.set_value("b", 1)
            assert cache.get_or_compute("c", lambda: 3) == 3
            assert not cache.delete_value("a")
            assert not cache.invalidate("t")
            assert cache.keys_of(1) == []
        begin = time.monotonic()
        for _ in range(200):
            cache.get_value("a")
        assert time.monotonic() - begin < 1.0, "the breaker is open: nobody waits"
        redis_own.start()
        wait_for(lambda: cache.set_value("b", 2), "the index does not come back")
        assert cache.get_value("b") == 2


@pytest.mark.parametrize(
    "write",
    [
        lambda cache: cache.set_value("b", 2),
        lambda cache: cache.set_value("b", ARRAY + 1),
        lambda cache: cache.delete_value("a"),
        lambda cache: cache.invalidate("t"),
    ],
)
@pytest.mark.parametrize("kind", ["redis", "memcached"])
def test_a_write_to_a_frozen_server_does_not_hold_anybody(
    redis_own: RedisServer, kind: str, write: Callable[[KVCache], bool]
) -> None:
    with contextlib.ExitStack() as stack:
        server: RedisServer | MemcachedServer = redis_own
        url = redis_own.url
        if kind == "memcached":
            server = stack.enter_context(memcached_server())
            url = f"memcached://{server.where}"
        cache = stack.enter_context(kvkeep.open(url + "?lookup_timeout=0.1", memory="8MiB"))
        wait_for(lambda: cache.set_value("a", ARRAY, tags=["t"]), "the server is not used")
        server.freeze()
        stack.callback(server.thaw)
        begin = time.monotonic()
        assert not write(cache)
        assert time.monotonic() - begin < 1.0
        begin = time.monotonic()
        assert not write(cache)
        assert time.monotonic() - begin < 0.1


def test_a_frozen_server_does_not_hold_anybody(redis_own: RedisServer) -> None:
    with kvkeep.open(redis_own.url, memory="8MiB") as cache:
        wait_for(lambda: cache.set_value("a", ARRAY), "the server is not used")
        redis_own.freeze()
        begin = time.monotonic()
        assert cache.get_or_compute("c", lambda: 3) == 3
        assert cache.get_value("a") is None
        assert time.monotonic() - begin < 2.0
        begin = time.monotonic()
        assert [cache.get_or_compute(("d", at), lambda at=at: at) for at in range(10)] == list(range(10))  # type: ignore[misc]
        with cache.values.flight.prefix([b"p" * 32], lambda: 0, 5.0) as mine:
            assert mine
        assert time.monotonic() - begin < 0.25, "claims, too, are not asked of a server that is left alone"
        redis_own.thaw()
        wait_for(lambda: cache.set_value("b", 2), "the index does not come back")


def test_a_dead_master_takes_only_its_own_names(caplog: pytest.LogCaptureFixture) -> None:
    """Asked for one by one, too: a small value is its name, a large one its name and its bytes."""
    with redis_cluster(3, 0, "--cluster-require-full-coverage", "no") as cluster, contextlib.ExitStack() as stack:
        url = cluster.url + "?lookup_timeout=2&load_timeout=2&save_timeout=2"
        writer = stack.enter_context(kvkeep.open(url, memory="8MiB"))
        reader = stack.enter_context(kvkeep.open(url, memory=0))
        small, large = [("small", at) for at in range(40)], [("large", at) for at in range(20)]
        wait_for(lambda: writer.set_values({key: key[1] for key in small}) == 40, "the cluster is not used")
        assert all(writer.set_value(key, ARRAY + key[1]) for key in large)
        assert [reader.get_value(key) for key in small] == list(range(40))
        assert all(reader.get_value(key) is not None for key in large)
        cluster.nodes[0].kill()

        def lives(name: bytes) -> bool:
            return slot_of(name) >= 16384 // 3

        def stands(key: Any) -> bool:
            return lives(b"kvkeep:v:" + writer.values.name(writer.values.packed(key)).hex().encode())

        store = writer.store.tiers[-1].store
        assert isinstance(store, RedisStore)
        bytes_of = [BlockKey(writer.values._digest(kvkeep_pack(ARRAY + at))) for at in range(20)]
        for _ in range(2):
            begin = time.monotonic()
            assert [reader.get_value(key) is not None for key in small] == [stands(key) for key in small]
            assert [reader.get_value(key) is not None for key in large] == [
                stands(key) and lives(name) for key, name in zip(large, store.names(bytes_of), strict=True)
            ]
            assert [writer.set_value(key, -1) for key in small] == [stands(key) for key in small]
            assert writer.set_values(dict.fromkeys(small, 7)) == sum(map(stands, small))
            assert [writer.get_or_compute((*key, "made"), lambda: 3) for key in small] == [3] * 40
            assert sorted({writer.invalidate(str(at)) for at in range(20)}) == [False, True]
            assert time.monotonic() - begin < 3.0, "nobody waits for the dead one"
        late = stack.enter_context(kvkeep.open(url, memory=0))
        assert [late.get_value(key) is not None for key in small] == [stands(key) for key in small]
        assert not [record for record in caplog.records if "tier index" in record.getMessage()]
        cluster.nodes[0].start()
        wait_for(lambda: writer.set_values(dict.fromkeys(small, 8)) == 40, "the master is not used again")


@pytest.mark.parametrize("fault", ["full", "readonly"])
def test_what_cannot_be_written_to_is_still_read(
    redis_own: RedisServer, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with kvkeep.open(redis_own.url + PATIENT, memory="8MiB") as cache:
        wait_for(lambda: cache.set_value("a", ARRAY, tags=["t"]), "the server is not used")
        if fault == "full":
            redis_own.call("CONFIG", "SET", "maxmemory-policy", "noeviction")
            redis_own.call("CONFIG", "SET", "maxmemory", "1mb")
        else:
            redis_own.call("REPLICAOF", "127.0.0.1", "1")
        end = time.monotonic() + 4  # several probes
        while time.monotonic() < end:
            assert not cache.set_value("b", 1)
            assert cache.get_value("a") is not None
            assert cache.get_or_compute("c", lambda: 3, tags=["t"]) == 3
            assert cache.invalidate("u") == (fault == "full"), "what makes room is not refused"
            time.sleep(0.05)
        assert cache.counters.count("store_error", tier="index (writes)", cause=fault) >= 1
        if fault == "full":
            redis_own.call("CONFIG", "SET", "maxmemory", "256mb")
        else:
            redis_own.call("REPLICAOF", "NO", "ONE")
        wait_for(lambda: cache.set_value("b", 2), "it is not written to again")
    said = [record.getMessage() for record in caplog.records if "tier index" in record.getMessage()]
    assert len(said) == 2, said
    assert f"failed ({fault})" in said[0]
    assert said[1] == "tier index (writes): is back"


def test_a_server_that_forgets_a_tag_never_revives_what_it_had(redis_shared: RedisServer) -> None:
    with kvkeep.open(redis_shared.url + PATIENT, memory="8MiB") as cache:
        cache.set_value("a", 1, tags=["t"])
        cache.invalidate("t")
        cache.set_value("b", 2, tags=["t"])
        (store,) = (tier.store for tier in cache.store.tiers if isinstance(tier.store, RedisStore))
        for key in redis_shared.call("KEYS", "kvkeep:v:*"):  # what eviction may do
            if redis_shared.call("STRLEN", key) == 40 + 16:
                redis_shared.call("DEL", key)
        assert cache.get_values(["a", "b"]) == [None, None]
        cache.set_value("c", 3, tags=["t"])
        assert cache.get_values(["a", "b", "c"]) == [None, None, 3]
        assert store.prefix == "kvkeep"


# Computing


def test_get_or_compute(cache: KVCache) -> None:
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return ARRAY

    assert cache.get_or_compute("a", compute) is ARRAY
    assert np.array_equal(cache.get_or_compute("a", compute), ARRAY)
    assert len(calls) == 1
    cache.delete_value("a")
    cache.get_or_compute("a", compute, ttl=0.1, tags=["t"])
    cache.invalidate("t")
    cache.get_or_compute("a", compute, ttl=0.1)
    time.sleep(0.12)
    cache.get_or_compute("a", compute, ttl=0.1)
    assert len(calls) == 4


def test_what_is_computed_while_its_tag_is_invalidated_is_stale(cache: KVCache) -> None:
    cache.get_or_compute("a", lambda: cache.invalidate("t"), tags=["t"])
    assert cache.get_value("a") is None


def test_an_error_is_the_callers_and_the_next_one_computes(cache: KVCache) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.get_or_compute("a", lambda: 1 / 0)
    assert cache.get_or_compute("a", lambda: 1) == 1
    with pytest.raises(TypeError, match="tags is a list of texts, not 5"):
        cache.get_or_compute("b", lambda: 1, tags=5)  # type: ignore[arg-type]
    assert cache.get_or_compute("b", lambda: 1) == 1


def test_no_tags_may_be_none(cache: KVCache) -> None:
    assert cache.set_value("a", 1, tags=None)
    assert cache.set_values({"b": 2}, tags=None) == 1
    assert cache.get_or_compute("c", lambda: 3, tags=None) == 3
    assert cache.memoize(tags=None, version="1")(lambda: 4)() == 4
    assert cache.get_values(["a", "b", "c"]) == [1, 2, 3]


def test_a_result_that_cannot_be_kept_is_handed_back(cache: KVCache, caplog: pytest.LogCaptureFixture) -> None:
    class Answer:
        pass

    def slow() -> Answer:
        time.sleep(0.3)
        return Answer()

    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(cache.get_or_compute("a", slow))) for _ in range(6)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 1.5, "they compute at the same time, once it is known, not one after the other"
    assert [type(result) for result in results] == [Answer] * 6
    memoized = cache.memoize(version="1")(lambda: [Answer(), object()])
    assert isinstance(memoized()[0], Answer)
    assert isinstance(memoized()[0], Answer)
    said = [record.message for record in caplog.records if "cannot be kept" in record.message]
    assert len(said) == 2, "once for each type"
    assert "Answer cannot be kept as a value" in said[0]
    assert cache.counters.count("dropped", cause="type") >= 3
    with pytest.raises(TypeError, match="Answer cannot be kept as a value"):
        cache.set_value("b", Answer())
    assert cache.get_value("a") is None
    assert cache.get_or_compute("a", lambda: 1) == 1


def test_threads_compute_once(opened: Callable[..., KVCache]) -> None:
    caches = [opened()] if opened.kind == "memory" else [opened(), opened()]  # type: ignore[attr-defined]
    calls: list[int] = []
    results: list[Any] = []

    def compute() -> np.ndarray:
        calls.append(1)
        time.sleep(0.3)
        return ARRAY

    def ask(at: int) -> None:
        results.append(caches[at % len(caches)].get_or_compute("a", compute, wait=60))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 8
    assert all(np.array_equal(result, ARRAY) for result in results)
    assert len({id(result) for result in results}) == 8, "each has its own"


@pytest.mark.parametrize("outcome", ["fails once", "fails", "cannot be kept"])
@pytest.mark.parametrize("each_its_own", [False, True])
def test_nobody_queues_for_what_ends_without_a_value(
    opened: Callable[..., KVCache], outcome: str, each_its_own: bool
) -> None:
    """All compute at the same time: one after the other, the last would wait for all before."""
    shared = opened()
    caches = [opened() if each_its_own else shared for _ in range(6)]
    calls: list[int] = []
    results: list[Any] = []

    def compute() -> Any:
        calls.append(1)
        fails = outcome == "fails" or (outcome == "fails once" and len(calls) == 1)
        time.sleep(0.4)
        if fails:
            raise ZeroDivisionError
        return threading.Lock() if outcome == "cannot be kept" else 7

    def ask(cache: KVCache) -> None:
        try:
            results.append(cache.get_or_compute("a", compute))
        except ZeroDivisionError:
            results.append("failed")

    threads = [threading.Thread(target=ask, args=(cache,)) for cache in caches]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 1.5
    assert len(results) == 6
    if outcome == "fails once" and not each_its_own:
        assert sorted(map(str, results)) == [*["7"] * 5, "failed"]
        assert shared.get_value("a") == 7, "what they made is kept"


def test_who_asks_for_what_he_computes_computes_it(opened: Callable[..., KVCache]) -> None:
    cache = opened()
    begin = time.monotonic()
    assert cache.get_or_compute("a", lambda: cache.get_or_compute("a", lambda: 1) + 1) == 2
    assert cache.get_value("a") == 2
    assert time.monotonic() - begin < 10


def test_nobody_waits_longer_than_they_said(opened: Callable[..., KVCache]) -> None:
    first, second = opened(), opened()
    entered, leave = threading.Event(), threading.Event()

    def slow() -> int:
        entered.set()
        leave.wait(30)
        return 1

    thread = threading.Thread(target=lambda: first.get_or_compute("a", slow))
    thread.start()
    assert entered.wait(10)
    begin = time.monotonic()
    assert second.get_or_compute("a", lambda: 2, wait=0.2) == 2
    assert first.get_or_compute("a", lambda: 3, wait=0.2) in (2, 3)
    assert time.monotonic() - begin < 5
    leave.set()
    thread.join()


def test_the_stale_value_while_one_refreshes(opened: Callable[..., KVCache]) -> None:
    first, second = opened(), opened()
    if opened.kind == "memory":  # type: ignore[attr-defined]
        second = first
    entered, leave = threading.Event(), threading.Event()

    def refresh() -> str:
        entered.set()
        assert leave.wait(30)
        return "new"

    def never() -> str:
        raise AssertionError("somebody else computes")

    assert first.get_or_compute("a", lambda: "old", ttl=0.1, stale=60) == "old"
    assert second.get_or_compute("a", never, ttl=0.1, stale=60) == "old"
    time.sleep(0.15)
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(first.get_or_compute("a", refresh, ttl=30, stale=60)))
    thread.start()
    assert entered.wait(10)
    assert second.get_or_compute("a", never, ttl=0.1, stale=60) == "old"
    assert first.get_or_compute("a", never, ttl=0.1, stale=60) == "old"
    assert first.get_value("a") is None, "without the option, what is too old is missing"
    leave.set()
    thread.join()
    assert results == ["new"]
    assert second.get_or_compute("a", never, ttl=0.1, stale=60) == "new"


ASKER = textwrap.dedent(
    """
    import sys, time, kvkeep, numpy as np
    where, calls, go = sys.argv[1:4]
    def compute():
        with open(calls, "a") as file:
            file.write("computed\\n")
        time.sleep(0.5)
        return np.arange(1000.0)
    remote = where if "://" in where else None
    cache = kvkeep.open(None if remote else where, memory="8MiB", disk="16MiB", remote=remote)
    cache.get_value("warm")
    print("ready", flush=True)
    sys.stdin.readline()
    result = cache.get_or_compute("answer", compute, wait=60)
    print("sum", result.sum(), flush=True)
    cache.close()
    """
)


@pytest.mark.parametrize("where", ["directory", "server"])
def test_processes_compute_once(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    place = str(tmp_path / "kept")
    if where == "server":
        place = request.getfixturevalue("redis_shared").url + PATIENT
    calls = tmp_path / "calls"
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASKER, place, str(calls), ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for asker in askers:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n"
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write("go\n")
        asker.stdin.flush()
    assert [asker.communicate(timeout=60)[0] for asker in askers] == [f"sum {sum(range(1000)):.1f}\n"] * 4
    assert calls.read_text() == "computed\n"
