"""The cache as its users see it: save, match, lease, load, over real tiers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep import KVLayout, tiered, writing
from kvkeep.codecs.raw import Raw
from kvkeep.errors import ConfigError
from kvkeep.events import Counters
from kvkeep.opening import codec_named
from kvkeep.policies.lru import LRU
from kvkeep.stores.base import Item
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.memory import MemoryStore
from kvkeep.testing.faults import Fault, FaultyStore
from kvkeep.tier import Tier

TOKENS = list(range(16 * 20 + 5))


def load(cache: kvkeep.KVCache, tokens: list[int]) -> int:
    """Blocks loaded, each checked byte for byte."""
    sink = Sink()
    with cache.lease(cache.match(tokens)) as lease:
        loaded = cache.load(lease, sink)
    assert loaded == sink.check(tokens) * LAYOUT.block_tokens
    return len(sink.got)


def test_saved_blocks_come_back_and_nothing_is_read_twice(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        source = Source(TOKENS)
        assert cache.match(TOKENS).num_tokens == 0
        assert cache.save(TOKENS, source) == 20
        assert load(cache, TOKENS) == 20
        assert cache.save(TOKENS, source) == 0
        assert source.asked == list(range(20))


def test_a_restart_finds_everything_on_disk(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        root.bind(LAYOUT).save(TOKENS, Source(TOKENS))
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        assert {tier.name for tier in cache.match(TOKENS).places} == {"disk"}
        assert load(cache, TOKENS) == 20
        assert root.flush(10)
        assert {tier.name for tier in cache.match(TOKENS).places} == {"memory"}
        assert load(cache, TOKENS) == 20


def test_another_process_finds_the_blocks_of_a_running_one(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import kvkeep; from blocks import *; t = list(range(325))\n"
        "c = kvkeep.open(sys.argv[1], memory='4MiB', disk='8MiB').bind(LAYOUT); s = Sink()\n"
        "with c.lease(c.match(t)) as lease: c.load(lease, s)\n"
        "print(s.check(t))"
    )
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        root.bind(LAYOUT).save(TOKENS, Source(TOKENS))
        assert root.flush(10)
        here = str(Path(__file__).parent)
        out = subprocess.run([sys.executable, "-c", script, str(tmp_path), here], capture_output=True, check=True)
        assert out.stdout.split() == [b"20"]


def test_a_prefix_is_shared_by_prompts_that_go_on_differently() -> None:
    with kvkeep.open(memory="4MiB") as root:
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        other = TOKENS[:100] + [7] * 100
        assert cache.match(other).num_tokens == 96
        source = Source(other)
        cache.save(other, source)
        assert source.asked == list(range(6, 12))
        assert load(cache, other) == 12


def test_other_layouts_and_tenants_share_nothing() -> None:
    identity = kvkeep.ModelIdentity(weights="test", kv_dtype="float32", namespace=b"tenant")
    other = kvkeep.KVLayout(identity, LAYOUT.groups, LAYOUT.dtype, LAYOUT.block_tokens)
    with kvkeep.open(memory="4MiB") as root:
        root.bind(LAYOUT).save(TOKENS, Source(TOKENS))
        assert root.bind(other).match(TOKENS).num_tokens == 0


def test_a_caches_namespace_separates_whatever_the_layout_says(tmp_path: Path) -> None:
    """An engine's author may have forgotten it: then one tenant's blocks must not be another's."""
    for tenant in (b"", b"a" * 16, b"b" * 16):
        with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB", namespace=tenant) as root:
            cache = root.bind(LAYOUT)
            assert cache.match(TOKENS).num_tokens == 0, "another tenant's blocks"
            cache.save(TOKENS, Source(TOKENS))
            assert load(cache, TOKENS) == 20
            named = replace(LAYOUT, identity=replace(LAYOUT.identity, namespace=tenant))
            assert root.bind(named).match(TOKENS).num_tokens == 320


def test_a_layout_of_another_namespace_is_refused() -> None:
    other = replace(LAYOUT, identity=replace(LAYOUT.identity, namespace=b"b" * 16))
    with kvkeep.open(memory="4MiB", namespace=b"a" * 16) as root, pytest.raises(ConfigError, match="namespace") as said:
        root.bind(other)
    assert "bbbb" not in str(said.value)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "sieve"])
def test_small_tiers_evict_and_never_serve_a_wrong_byte(tmp_path: Path, codec: str, policy: str) -> None:
    with kvkeep.open(tmp_path, memory="600KiB", disk="1MiB", codec=codec, policy=policy) as root:
        cache = root.bind(LAYOUT)
        for start in range(12):
            tokens = list(range(start * 1000, start * 1000 + 16 * 20))
            cache.save(tokens, Source(tokens))
            assert load(cache, tokens) > 0
            for earlier in range(start):
                load(cache, list(range(earlier * 1000, earlier * 1000 + 16 * 20)))
        root.flush(10)
        used = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert used <= 1 << 20
        assert root.counters.count("evict", tier="memory") > 0
        assert root.counters.count("corrupt") == 0


def test_a_lost_block_shortens_the_prefix() -> None:
    with kvkeep.open(memory="4MiB") as root:
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        match = cache.match(TOKENS)
        root.store.tiers[0].store.delete(match.keys[7])
        sink = Sink()
        with cache.lease(match) as lease:
            assert cache.load(lease, sink) == 7 * 16
        assert sink.check(TOKENS) == 7
        assert root.counters.count("lost") > 0


def test_a_damaged_block_on_disk_is_a_miss_with_a_cause_and_is_saved_anew(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        root.bind(LAYOUT).save(TOKENS, Source(TOKENS))
    (data,) = tmp_path.glob("*.data")
    with data.open("r+b") as file:
        file.seek(data.read_bytes().index(kvkeep.block_keys(LAYOUT, TOKENS)[5]) + 500)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        assert load(cache, TOKENS) == 5
        assert root.counters.count("corrupt", tier="disk", cause="checksum") == 1
        cache.save(TOKENS, Source(TOKENS))
        assert load(cache, TOKENS) == 20


def test_leased_blocks_stay_while_others_are_saved() -> None:
    with kvkeep.open(memory="400KiB") as root:
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        with cache.lease(cache.match(TOKENS)) as lease:
            for start in range(1, 9):
                tokens = list(range(start * 1000, start * 1000 + 320))
                cache.save(tokens, Source(tokens))
            sink = Sink()
            assert cache.load(lease, sink) == 320
            sink.check(TOKENS)
        assert not root.store.tiers[0]._pins, "every pin was taken back"


@pytest.mark.parametrize("fault", ["error", "full", "truncate", "flip", "swap", "lose"])
def test_a_faulty_medium_costs_hits_and_nothing_else(tmp_path: Path, fault: Fault) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        disk = root.store.tiers[1]
        faulty = FaultyStore(disk.store)
        disk.store = faulty
        faulty.fail(fault)
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        root.flush(10)
        for key in kvkeep.block_keys(LAYOUT, TOKENS):
            root.store.tiers[0].store.delete(key)
        loaded = load(cache, TOKENS)
        assert loaded == 0
        faulty.heal()
        cache.save(TOKENS, Source(TOKENS))
        assert load(cache, TOKENS) == 20


def test_many_threads_over_one_small_cache(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with kvkeep.open(tmp_path, memory="800KiB", disk="1MiB") as root:
        cache = root.bind(LAYOUT)

        def work(seed: int) -> None:
            try:
                for turn in range(25):
                    base = (seed * 7 + turn) % 9 * 1000
                    tokens = list(range(base, base + 16 * 12))
                    cache.save(tokens, Source(tokens))
                    load(cache, tokens)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert root.flush(10)
        assert not root.store.tiers[0]._pins


@pytest.mark.parametrize("memory", [LAYOUT.block_nbytes + 512, 4 * LAYOUT.block_nbytes])
def test_a_prompt_larger_than_memory_reaches_the_disk_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    write = DiskStore.put_many

    def slowly(self: DiskStore, items: Sequence[Item]) -> int:
        time.sleep(0.01)
        return write(self, items)

    monkeypatch.setattr(DiskStore, "put_many", slowly)
    monkeypatch.setattr(writing, "BATCH_NBYTES", 1)
    with kvkeep.open(tmp_path, memory=memory, disk="8MiB") as root:
        assert root.bind(LAYOUT).save(TOKENS, Source(TOKENS), patience=10) == 20
        assert root.counters.count("dropped") == 0
    with kvkeep.open(tmp_path, disk="8MiB") as root:
        assert load(root.bind(LAYOUT), TOKENS) == 20


@pytest.mark.parametrize("policy", ["lru", "sieve", "hazard"])
def test_a_prompt_larger_than_the_disk_keeps_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr(writing, "BATCH_NBYTES", 4 * LAYOUT.block_nbytes)
    tokens = list(range(16 * 600))
    with kvkeep.open(tmp_path, memory="64MiB", disk="2MiB", policy=policy, codec="raw") as root:
        cache = root.bind(LAYOUT)
        other = [token + 50_000 for token in TOKENS]
        cache.save(other, Source(other))
        assert cache.save(tokens, Source(tokens)) == 600
    with kvkeep.open(tmp_path, disk="2MiB") as root:
        assert 600 * LAYOUT.block_nbytes > 2 << 20
        assert load(root.bind(LAYOUT), tokens) > (1 << 20) // LAYOUT.block_nbytes


def test_a_disk_that_hangs_costs_one_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awake = threading.Event()
    write = DiskStore.put_many

    def hang(self: DiskStore, items: Sequence[Item]) -> int:
        awake.wait(20)
        return write(self, items)

    monkeypatch.setattr(DiskStore, "put_many", hang)
    with kvkeep.open(tmp_path, memory=8 * LAYOUT.block_nbytes, disk="8MiB") as root:
        began = time.monotonic()
        for seed in range(1, 7):
            tokens = [seed * 1000 + token for token in TOKENS]
            root.bind(LAYOUT).save(tokens, Source(tokens), patience=1.0)
        assert time.monotonic() - began < 4, "six waits would take 6 s"
        awake.set()
        assert root.flush(10)
        assert root.bind(LAYOUT).save(TOKENS, Source(TOKENS), patience=10) == 20, "it gets on: saves wait again"
        assert root.flush(10)
        assert not root.store.tiers[0]._pins


def test_a_full_queue_drops_the_write_and_counts_it(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        root.store.writer.queue_nbytes = 3 * LAYOUT.block_nbytes
        with root.store.writer._wake:  # the writer waits: nothing leaves the queue
            root.bind(LAYOUT).save(TOKENS, Source(TOKENS), patience=0)
        assert root.counters.count("dropped", tier="disk", cause="queue full") == 17
        assert root.flush(10)
        assert load(root.bind(LAYOUT), TOKENS) == 20


def test_an_exit_without_close_still_writes(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import kvkeep; from blocks import *\n"
        "t = list(range(325)); c = kvkeep.open(sys.argv[1], memory='4MiB', disk='8MiB').bind(LAYOUT)\n"
        "c.save(t, Source(t))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], check=True)
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        assert root.bind(LAYOUT).match(TOKENS).num_blocks == 20


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_clean(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        cache.save(TOKENS, Source(TOKENS))
        assert root.flush(10)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                other = list(range(5000, 5320))
                assert load(cache, TOKENS) == 20
                cache.save(other, Source(other))
                assert load(cache, other) == 20
                assert root.flush(10)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert load(cache, TOKENS) == 20


def test_two_processes_and_a_small_budget_both_get_room(tmp_path: Path) -> None:
    """The second finds every slab taken, asks, and is handed half of them."""
    with kvkeep.open(tmp_path, memory="2MiB", disk="4MiB") as first:
        for start in range(30):
            tokens = list(range(start * 1000, start * 1000 + 320))
            first.bind(LAYOUT).save(tokens, Source(tokens))
        first.flush(10)
        with kvkeep.open(tmp_path, memory="2MiB", disk="4MiB") as second:
            deadline = time.monotonic() + 20
            tokens = list(range(90000, 90320))
            while time.monotonic() < deadline and not second.counters.count("put", tier="disk"):
                tokens = [token + 1000 for token in tokens]
                second.bind(LAYOUT).save(tokens, Source(tokens))
                second.flush(10)
                time.sleep(0.2)
            assert second.counters.count("put", tier="disk") > 0
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 << 20


def test_wrong_arguments_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(kvkeep.ConfigError, match="did you mean 'sieve'"):
        kvkeep.open(memory="1MiB", policy="seive")
    with pytest.raises(kvkeep.ConfigError, match="is no size"):
        kvkeep.open(memory="1 gigabyte")
    with pytest.raises(kvkeep.ConfigError, match="keeps nothing"):
        kvkeep.open(memory=0)
    with kvkeep.open(memory="1MiB") as root:
        with pytest.raises(kvkeep.LayoutError, match="bind"):
            root.match([1, 2, 3])
        with pytest.raises(kvkeep.LayoutError, match="multiple"):
            root.bind(LAYOUT).save(TOKENS, Source(TOKENS), start=5)
        for start in (-16, 16 * 30):
            with pytest.raises(kvkeep.LayoutError, match="outside"):
                root.bind(LAYOUT).save(TOKENS, Source(TOKENS), start=start)


@pytest.mark.parametrize(("memory", "disk", "small"), [(4096, 8 << 20, "memory"), (4 << 20, 262144, "disk")])
def test_a_tier_too_small_for_a_block_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, memory: int, disk: int, small: str
) -> None:
    with kvkeep.open(tmp_path, memory=memory, disk=disk) as root:
        wide = KVLayout.uniform(LAYOUT.identity, num_layers=2, num_kv_heads=2, head_dim=512, dtype="float32",
                                block_tokens=16)  # fmt: skip
        layout = LAYOUT if small == "memory" else wide
        for seed in range(3):
            tokens = [seed * 1000 + token for token in TOKENS]
            root.bind(layout).save(tokens, Source(tokens, layout))
        root.flush(10)
    said = [record.getMessage() for record in caplog.records if "no block of this size" in record.getMessage()]
    assert len(said) == 1
    assert small in said[0]


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_cache_closed_under_a_load_only_ends_it(tmp_path: Path, codec: str) -> None:
    class Closing(Sink):
        def write(self, index: int, payload: memoryview) -> None:
            super().write(index, payload)
            if index == 0:
                root.close()

    tokens = list(range(16 * 3000))
    with kvkeep.open(tmp_path, memory="1MiB", disk="64MiB", codec=codec) as root:
        root.bind(LAYOUT).save(tokens, Source(tokens))
    root = kvkeep.open(tmp_path, memory="1MiB", disk="64MiB", codec=codec)
    cache, sink = root.bind(LAYOUT), Closing()
    with cache.lease(cache.match(tokens)) as lease:
        assert cache.load(lease, sink) == 16 * sink.check(tokens)
    assert 0 < len(sink.got) < 3000


def test_housekeeping_goes_on_while_there_is_more_to_do_but_not_beside_a_load() -> None:
    """Touching fresh memory takes a core, and holds up whoever maps some."""
    rounds = []

    class Busy(MemoryStore):
        def maintain(self) -> bool:
            rounds.append(time.monotonic())
            return True

    counters = Counters()
    tier = Tier("memory", Busy(1 << 20), policy=LRU, codec=Raw(), observer=counters, trusted=True)
    store = tiered.TieredStore([tier], codec=codec_named, observer=counters)
    tokens = list(range(64))
    with kvkeep.KVCache(store, counters=counters, observer=counters).bind(LAYOUT) as cache:
        cache.save(tokens, Source(tokens))
        keys = Source(tokens).keys
        for _ in range(3):  # no thread: each step waits until it is due
            store.writer.step()
        assert len(rounds) == 3
        blocks = store.blocks(keys, store.locate(keys), LAYOUT)
        next(blocks)
        store.writer.step()
        store.writer.step()
        assert len(rounds) == 3
        blocks.close()
        store.writer.step()
        assert len(rounds) == 4
