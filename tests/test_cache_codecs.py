"""Codecs inside a cache: what was stored comes back, and a frame that cannot be decoded here is a miss."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvkeep
import kvkeep.cache as cache_module
from kvkeep import frame, registry
from kvkeep.cache import KVCache
from kvkeep.errors import ConfigError
from kvkeep.events import Counters
from kvkeep.opening import codec_named
from kvkeep.policies.lru import LRU
from kvkeep.stores.memory import MemoryStore
from kvkeep.testing.codecs import gaussian, layout
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore

LAYOUT = layout("bfloat16", block_tokens=64)
TOKENS = list(range(64 * 6))


class Blocks:
    """Source and sink: block ``index`` is a function of its number."""

    def __init__(self) -> None:
        self.got: list[tuple[int, bool]] = []

    def read(self, index: int, out: memoryview) -> None:
        out[:] = gaussian(LAYOUT, index)

    def write(self, index: int, payload: memoryview) -> None:
        self.got.append((index, bytes(payload) == gaussian(LAYOUT, index)))


def load(cache: KVCache) -> list[tuple[int, bool]]:
    blocks = Blocks()
    with cache.lease(cache.match(TOKENS)) as lease:
        cache.load(lease, blocks)
    return blocks.got


ALL_RIGHT = [(index, True) for index in range(6)]


def test_promotion_waits_for_the_rest_of_the_prompt_unless_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", 3600.0)
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB") as cache:
        cache.bind(LAYOUT).save(TOKENS, Blocks())
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB") as cache:
        bound = cache.bind(LAYOUT)
        assert load(bound) == ALL_RIGHT
        more = [*TOKENS, *range(64)]
        assert bound.save(more, Blocks()) == 1  # what is saved does not wait behind it
        deadline = time.monotonic() + 20
        while not (known := cache.store.tiers[1].contains_many(bound.match(more).keys))[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all(known)
        assert cache.store.tiers[0].usage[0] == 1
        assert cache.flush(10)
        assert cache.store.tiers[0].usage[0] == 7


def test_what_waits_to_be_promoted_is_given_up_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROMOTE_AFTER_SECONDS", 3600.0)
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB") as cache:
        cache.bind(LAYOUT).save(TOKENS, Blocks())
    cache = kvkeep.open(tmp_path, memory="1MiB", disk="8MiB")
    assert load(cache.bind(LAYOUT)) == ALL_RIGHT
    before = time.monotonic()
    cache.close()
    assert time.monotonic() - before < 30
    assert cache.store.tiers[0].usage[0] == 0


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu", "sieve"])
def test_memory_then_disk(tmp_path: Path, codec: str, policy: str) -> None:
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec=codec, policy=policy) as cache:
        bound = cache.bind(LAYOUT)
        assert bound.save(TOKENS, Blocks()) == 6
        assert load(bound) == ALL_RIGHT
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec=codec, policy=policy) as cache:
        bound = cache.bind(LAYOUT)
        assert load(bound) == ALL_RIGHT
        assert cache.flush(10)
        assert load(bound) == ALL_RIGHT  # promoted: from memory now
        assert cache.counters.count("corrupt") == 0


LOSSY = ("int8", "uqz-hq", "uqz", "uqz-max", "int4")


class Kept(Blocks):
    """What comes out, to be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[bytes] = []

    def write(self, index: int, payload: memoryview) -> None:
        self.blocks.append(bytes(payload))


def once(codec: str) -> list[bytes]:
    """Each block after it has been through ``codec`` one time."""
    lossy = registry.lookup("codecs", codec)()
    out = []
    for index in range(6):
        room = bytearray(LAYOUT.block_nbytes)
        stored = (lossy.encode if index else lossy.encode_first)(gaussian(LAYOUT, index), LAYOUT)
        lossy.decode(stored, LAYOUT, memoryview(room))
        out.append(bytes(room))
    return out


def three(memory: str, disk: str, remote: str) -> tuple[KVCache, list[MemoryStore]]:
    counters = Counters()
    stores = [MemoryStore(8 << 20) for _ in range(3)]
    names = (("memory", memory), ("disk", disk), ("remote", remote))
    tiers = [
        Tier(name, store, policy=LRU, codec=registry.lookup("codecs", codec)(), observer=counters,
             trusted=name == "memory")
        for (name, codec), store in zip(names, stores, strict=True)
    ]  # fmt: skip
    store = TieredStore(tiers, codec=codec_named, observer=counters)
    return KVCache(store, counters=counters, observer=counters).bind(LAYOUT), stores


def codecs_in(store: MemoryStore) -> set[str]:
    values = (store.get(key) for key, _ in store.items())
    return {frame.parse(value)[0].codec for value in values if value is not None}


@pytest.mark.parametrize("lossy", LOSSY)
@pytest.mark.parametrize(
    ("memory", "disk", "remote"),
    [
        ("raw", "X", "int4"),
        ("X", "lossless", "int4"),
        ("X", "uqz-max", "X"),
        ("raw", "raw", "X"),
        ("lossless", "X", "X"),
    ],
)
def test_what_is_decoded_is_never_encoded_again(lossy: str, memory: str, disk: str, remote: str) -> None:
    """Whatever way a block goes through the tiers, each answer is the block after exactly one encoding."""
    asked = [lossy if codec == "X" else codec for codec in (memory, disk, remote)]
    cache, stores = three(*asked)
    with cache:
        assert cache.save(TOKENS, Blocks()) == 6
        assert cache.flush(30)
        # A lossy memory decides for all: what lies below is what is above, never a copy of a copy.
        below = [asked[0]] * 3 if asked[0] not in ("raw", "lossless") else asked
        assert [codecs_in(store) for store in stores] == [{codec} for codec in below]
        for gone in range(3):
            got = Kept()
            with cache.lease(cache.match(TOKENS)) as lease:
                assert cache.load(lease, got) == len(TOKENS)
            assert got.blocks == once(below[gone]), f"from tier {gone}"
            cache.flush(30)  # promoted into memory as it is
            for store in stores[: gone + 1]:
                for key, _ in list(store.items()):
                    store.delete(key)


@pytest.mark.parametrize("lossy", LOSSY)
def test_promoted_blocks_keep_their_codec(tmp_path: Path, lossy: str) -> None:
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec={"disk": lossy}) as cache:
        cache.bind(LAYOUT).save(TOKENS, Blocks())
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec={"disk": lossy}) as cache:
        bound = cache.bind(LAYOUT)
        for _ in range(2):  # from disk, then from memory
            got = Kept()
            with bound.lease(bound.match(TOKENS)) as lease:
                bound.load(lease, got)
            assert got.blocks == once(lossy)
            assert cache.flush(10)
        assert bound.save(TOKENS, Blocks()) == 0  # there already, as it is: not stored anew


@pytest.mark.parametrize("lossy", LOSSY)
@pytest.mark.parametrize("other", [None, "raw", "X and int8", "int4 or uqz"])
def test_lossy_blocks_are_for_those_who_asked_for_them(tmp_path: Path, lossy: str, other: str | None) -> None:
    """A cache with other codecs does not find them, and puts nothing in their place."""
    codec: dict[str, str] | str | None = other
    if other == "X and int8":
        codec = {"disk": lossy, "memory": "int8"} if lossy != "int8" else {"disk": "int8", "memory": "uqz"}
    elif other == "int4 or uqz":
        codec = "int4" if lossy != "int4" else "uqz"
    with kvkeep.open(tmp_path, memory=0, disk="16MiB", codec=lossy) as cache:
        assert cache.bind(LAYOUT).save(TOKENS, Blocks()) == 6
    with kvkeep.open(tmp_path, memory="2MiB", disk="16MiB", codec=codec) as cache:
        bound = cache.bind(cache.bind(LAYOUT).layout or LAYOUT)
        assert load(bound) == []
        assert bound.save(TOKENS, Blocks()) == 6
        if other in (None, "raw"):
            assert load(bound) == ALL_RIGHT
    with kvkeep.open(tmp_path, memory=0, disk="16MiB", codec={"disk": lossy}) as cache:
        bound, got = cache.bind(LAYOUT), Kept()
        with bound.lease(bound.match(TOKENS)) as lease:
            bound.load(lease, got)
        assert got.blocks == once(lossy)
        assert bound.save(TOKENS, Blocks()) == 0


@pytest.mark.parametrize(("first", "second"), [("raw", "lossless"), ("lossless", "raw")])
def test_a_directory_written_with_another_codec_is_read(tmp_path: Path, first: str, second: str) -> None:
    with kvkeep.open(tmp_path, memory=0, disk="8MiB", codec=first) as cache:
        cache.bind(LAYOUT).save(TOKENS, Blocks())
    with kvkeep.open(tmp_path, memory=0, disk="8MiB", codec=second) as cache:
        assert load(cache.bind(LAYOUT)) == ALL_RIGHT


def test_a_misspelt_codec_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'lossless'"):
        kvkeep.open(tmp_path, codec="loseless")


def test_without_its_library_a_frame_is_a_miss(tmp_path: Path) -> None:
    """A directory written with zstd, opened where zstd is not installed: the request goes on without."""
    with kvkeep.open(tmp_path, memory=0, disk="8MiB", codec="lossless") as cache:
        cache.bind(LAYOUT).save(TOKENS, Blocks())
    program = (
        "import sys; sys.modules['zstandard'] = None\n"
        "import kvkeep; from test_cache_codecs import *\n"
        f"cache = kvkeep.open({str(tmp_path)!r}, memory=0, disk='8MiB')\n"
        "bound = cache.bind(LAYOUT)\n"
        "assert bound.match(TOKENS).num_blocks == 6\n"
        "assert load(bound) == []\n"
        "assert cache.counters.count('corrupt', cause='unknown') == 1\n"
        "assert bound.save(TOKENS, Blocks()) >= 1\n"
        "cache.close(); print('went on')\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(Path(__file__).parent)}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr
