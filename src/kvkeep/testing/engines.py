"""What every engine's adapter has to hold.

Subclass :class:`EngineSuite` in a test module as ``TestMine`` and give it :meth:`EngineSuite.make`; pytest runs the
rest on real caches with a disk tier. Needs the extra ``test``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

import kvkeep
from kvkeep.errors import StoreError


class Engine(Protocol):
    """An engine under test, attached to a cache or not."""

    def generate(self, tokens: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy tokens after ``tokens``."""

    def cached_tokens(self) -> int:
        """How much of the last prompt came from the cache."""


class LossyCache:
    """A cache of which an engine sees only the faults: blocks that vanish after the match, or nothing but errors.

    ``keep_blocks``: a load ends after so many. ``dead``: every call raises, which no cache does and no engine may mind.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.keep_blocks = 1 << 30
        self.dead = False
        self._root: LossyCache = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def bind(self, *args: Any, **options: Any) -> LossyCache:
        bound = LossyCache(self._inner.bind(*args, **options))
        bound._root = self._root
        return bound

    def match(self, *args: Any, **options: Any) -> Any:
        self._breathe()
        return self._inner.match(*args, **options)

    def save(self, *args: Any, **options: Any) -> Any:
        self._breathe()
        return self._inner.save(*args, **options)

    @contextmanager
    def lease(self, match: Any) -> Iterator[Any]:
        self._breathe()
        with self._inner.lease(match) as lease:
            yield lease

    def load(self, lease: Any, sink: Any) -> int:
        self._breathe()
        limited = _LimitedSink(sink, self._root.keep_blocks)
        loaded = int(self._inner.load(lease, limited))
        return min(loaded, self._root.keep_blocks * loaded // max(1, limited.offered))

    def _breathe(self) -> None:
        if self._root.dead:
            raise StoreError("told to be dead")


class _LimitedSink:
    def __init__(self, sink: Any, limit: int) -> None:
        self._sink, self._limit = sink, limit
        self.offered = 0

    def write(self, index: int, payload: memoryview) -> None:
        self.offered += 1
        if index < self._limit:
            self._sink.write(index, payload)


class EngineSuite:
    """Give it :meth:`make`; the figures below are for a tiny model."""

    block_tokens: ClassVar[int] = 16
    vocabulary: ClassVar[int] = 256
    prompt_tokens: ClassVar[int] = 100
    new_tokens: ClassVar[int] = 8
    memory: ClassVar[str] = "16MiB"
    disk: ClassVar[str] = "64MiB"

    def make(self, cache: Any) -> Engine:
        """The same engine and model each time, attached to ``cache``; not attached where it is None."""
        raise NotImplementedError

    def open(self, path: Path, *, memory: str | int | None = None, disk: str | int | None = None) -> Any:
        return kvkeep.open(
            path,
            memory=self.memory if memory is None else memory,
            disk=self.disk if disk is None else disk,
            block_tokens=self.block_tokens,
        )

    def prompt(self, seed: int = 1, length: int | None = None) -> list[int]:
        count = self.prompt_tokens if length is None else length
        return [1 + (seed * 7919 + 31 * i + i * i) % (self.vocabulary - 1) for i in range(count)]

    @pytest.fixture
    def expected(self) -> list[int]:
        return self.make(None).generate(self.prompt(), self.new_tokens)

    @property
    def full_hit(self) -> int:
        """Tokens that a second run of :meth:`prompt` finds: whole blocks, one token left over."""
        return (self.prompt_tokens - 1) // self.block_tokens * self.block_tokens

    def test_a_hit_and_a_restart_give_the_same_tokens(self, tmp_path: Path, expected: list[int]) -> None:
        cache = self.open(tmp_path)
        engine = self.make(cache)
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() == 0
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() == self.full_hit
        cache.close()
        cache = self.open(tmp_path)
        engine = self.make(cache)
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() == self.full_hit
        cache.close()

    def test_a_shared_prefix_hits_as_far_as_it_goes(self, tmp_path: Path) -> None:
        shared = self.prompt()[: 3 * self.block_tokens + 5]
        other = shared + self.prompt(seed=2, length=40)
        cache = self.open(tmp_path)
        engine = self.make(cache)
        engine.generate(self.prompt(), self.new_tokens)
        assert engine.generate(other, self.new_tokens) == self.make(None).generate(other, self.new_tokens)
        assert engine.cached_tokens() == 3 * self.block_tokens
        cache.close()

    def test_a_lost_block_only_shortens_the_prefix(self, tmp_path: Path, expected: list[int]) -> None:
        cache = LossyCache(self.open(tmp_path))
        engine = self.make(cache)
        engine.generate(self.prompt(), self.new_tokens)
        for blocks in (2, 1, 0):
            cache.keep_blocks = blocks
            assert engine.generate(self.prompt(), self.new_tokens) == expected
            assert engine.cached_tokens() == blocks * self.block_tokens
        cache.close()

    def test_damaged_files_are_misses(self, tmp_path: Path, expected: list[int]) -> None:
        cache = self.open(tmp_path)
        self.make(cache).generate(self.prompt(), self.new_tokens)
        cache.close()
        damage(tmp_path)
        cache = self.open(tmp_path)
        engine = self.make(cache)
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() < self.full_hit
        cache.close()

    def test_a_dead_cache_changes_nothing_but_speed(self, tmp_path: Path, expected: list[int]) -> None:
        cache = LossyCache(self.open(tmp_path))
        engine = self.make(cache)
        engine.generate(self.prompt(), self.new_tokens)
        cache.dead = True
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() == 0
        cache.close()

    def test_no_room_anywhere(self, tmp_path: Path, expected: list[int]) -> None:
        cache = self.open(tmp_path, memory=4096, disk=0)  # smaller than a block
        engine = self.make(cache)
        for _ in range(2):
            assert engine.generate(self.prompt(), self.new_tokens) == expected
            assert engine.cached_tokens() == 0
        cache.close()

    @pytest.mark.timeout(240)
    def test_two_processes_share(self, tmp_path: Path, expected: list[int]) -> None:
        cache = self.open(tmp_path)
        engine = self.make(cache)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        child = context.Process(target=_generate_there, args=(type(self), tmp_path, results))
        child.start()
        there = results.get(timeout=200)
        child.join(timeout=30)
        assert there == expected
        assert engine.generate(self.prompt(), self.new_tokens) == expected
        assert engine.cached_tokens() == self.full_hit
        cache.close()


def _generate_there(suite: type[EngineSuite], path: Path, results: Any) -> None:
    tests = suite()
    cache = tests.open(path)
    tokens = tests.make(cache).generate(tests.prompt(), tests.new_tokens)
    cache.close()
    results.put(tokens)


def damage(folder: Path) -> None:
    """Turn a bit in every 512 bytes of every file."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            data = bytearray(path.read_bytes())
            for offset in range(100, len(data), 512):
                data[offset] ^= 0x04
            path.write_bytes(data)
