"""Codecs inside a cache: what was stored comes back, and a frame that cannot be decoded here is a miss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvkeep
from kvkeep.cache import KVCache
from kvkeep.errors import ConfigError
from kvkeep.testing.codecs import gaussian, layout

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
        "assert cache.counters.count('corrupt', cause='codec') == 1\n"
        "assert bound.save(TOKENS, Blocks()) >= 1\n"
        "cache.close(); print('went on')\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(Path(__file__).parent)}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr
