"""The shipped stores pass the shipped suites; the suites' own fault store breaks as told."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvkeep.buffers import Buffer
from kvkeep.errors import StoreError, StoreFullError
from kvkeep.keys import BlockKey
from kvkeep.stores import slabs
from kvkeep.stores.base import Store
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.memory import MemoryStore
from kvkeep.testing.faults import FaultyStore
from kvkeep.testing.stores import BoundedStoreSuite, PersistentSuite, StoreSuite, key, read, value


class DictStore(Store):
    """The five methods that must be written, so that the defaults of the others are tested too."""

    def __init__(self) -> None:
        self.values: dict[BlockKey, bytes] | None = {}

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.open.setdefault(key, b"".join(parts))

    def get(self, key: BlockKey) -> Buffer | None:
        return self.open.get(key)

    def contains(self, key: BlockKey) -> bool:
        return key in self.open

    def delete(self, key: BlockKey) -> bool:
        return self.open.pop(key, None) is not None

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        return iter([(key, len(data)) for key, data in list(self.open.items())])

    def close(self) -> None:
        self.values = None

    @property
    def open(self) -> dict[BlockKey, bytes]:
        if self.values is None:
            raise StoreError("closed")
        return self.values


class TestDefaults(StoreSuite):
    def make(self, path: Path, capacity: int | None) -> Store:
        return DictStore()


class TestMemory(BoundedStoreSuite):
    capacity = 256 << 10

    def make(self, path: Path, capacity: int | None) -> Store:
        assert capacity is not None
        return MemoryStore(capacity)


class TestDisk(PersistentSuite, BoundedStoreSuite):
    capacity = 1 << 20

    def make(self, path: Path, capacity: int | None) -> Store:
        assert capacity is not None
        return DiskStore(path / "cache", capacity=capacity)


class TestDiskPastThePageCache(PersistentSuite, BoundedStoreSuite):
    """Every run is asked for, however short, and nothing is found in the page cache."""

    capacity = 1 << 20

    @pytest.fixture(autouse=True)
    def cold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slabs, "DIRECT_NBYTES", 1)
        monkeypatch.setattr(slabs, "cached_nbytes", lambda fd, offset, nbytes: 0)

    def make(self, path: Path, capacity: int | None) -> Store:
        assert capacity is not None
        return DiskStore(path / "cache", capacity=capacity, direct=True)


@pytest.mark.parametrize("direct", [True, False])
def test_what_lies_in_memory_above_leaves_the_page_cache_alone(tmp_path: Path, direct: bool) -> None:
    data = random.Random(1).randbytes(1 << 20)
    store = DiskStore(tmp_path / "cache", capacity=8 << 20, direct=direct)
    store.put(key(1), [data])
    with (tmp_path / "cache" / "slab-000000.data").open("rb") as file:
        try:
            assert slabs.cached_nbytes(file.fileno(), 0, len(data)) == len(data)
        except OSError:
            pytest.skip("this system does not tell what its page cache holds")
        assert store.get(key(1)) == data  # from there
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if slabs.cached_nbytes(file.fileno(), 0, len(data)):
            pytest.skip("a file system that forgets nothing")
        assert store.get(key(1)) == data
        assert slabs.cached_nbytes(file.fileno(), 0, len(data)) == (
            0 if direct and slabs_read_directly(store) else 1 << 20
        )
    store.close()


def test_another_process_s_slabs_are_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(slabs, "cached_nbytes", lambda fd, offset, nbytes: asked.append(nbytes) or 0)
    writer = DiskStore(tmp_path / "cache", capacity=8 << 20, direct=True)
    writer.put(key(1), [b"x" * (1 << 20)])
    reader = DiskStore(tmp_path / "cache", capacity=8 << 20, direct=True)  # as one of another process: the lock is held
    assert reader.get(key(1)) == b"x" * (1 << 20)
    assert not asked
    assert writer.get(key(1)) == b"x" * (1 << 20)
    assert asked == [1 << 20]
    reader.close()
    writer.close()


def slabs_read_directly(store: DiskStore) -> bool:
    """False where the file system turned out not to."""
    return all(slab.direct for slab in store._slabs.values())


@pytest.mark.parametrize("missing", ["cachestat", "O_DIRECT"])
def test_a_system_that_cannot_read_past_its_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(slabs, "cached_nbytes", refuse if missing == "cachestat" else lambda *args: 0)
    if missing == "O_DIRECT":
        monkeypatch.setattr(slabs.Slab, "_open_direct_fd", refuse)
    data = random.Random(2).randbytes(1 << 20)
    store = DiskStore(tmp_path / "cache", capacity=8 << 20, direct=True)
    store.put(key(1), [data])
    assert store.get(key(1)) == data
    assert not slabs_read_directly(store)
    store.prefetch([key(1)])
    assert store.get(key(1)) == data
    store.close()


def test_a_file_that_was_cut_is_no_stale_bytes_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slabs, "cached_nbytes", lambda *args: 0)
    store = DiskStore(tmp_path / "cache", capacity=8 << 20, direct=True)
    store.put(key(1), [b"x" * (1 << 20)])
    assert store.get(key(1)) == b"x" * (1 << 20)  # the pool's buffer is full of them now
    os.truncate(tmp_path / "cache" / "slab-000000.data", 10_000)
    assert store.get(key(1)) == b"x" * 10_000 + bytes((1 << 20) - 10_000)
    store.close()


class TestFaultyButWell(StoreSuite):
    def make(self, path: Path, capacity: int | None) -> Store:
        return FaultyStore(DictStore())


@pytest.fixture
def faulty() -> FaultyStore:
    store = FaultyStore(DictStore(), hang_seconds=0.05)
    for number in (1, 2):
        store.put(key(number), [value(number)])
    return store


def test_a_view_of_deleted_memory_stays(tmp_path: Path) -> None:
    store = MemoryStore(16 << 10)
    store.put(key(1), [value(1)])
    with store.read([key(1)]) as (view,):
        store.delete(key(1))
        assert store.put_many([(key(number), [value(number)]) for number in range(2, 9)]) == 3
        assert view == value(1)
        assert not store.contains(key(1))
        with pytest.raises(StoreFullError):
            store.put(key(9), [value(9)])
    store.put(key(9), [value(9)])  # the reader is done: its place is free


def test_faults(faulty: FaultyStore) -> None:
    faulty.fail("truncate")
    assert read(faulty, key(1)) == value(1)[:2048]
    faulty.fail("flip")
    found = read(faulty, key(1))
    assert found is not None
    assert sum((a ^ b).bit_count() for a, b in zip(found, value(1), strict=True)) == 1
    faulty.fail("swap")
    assert read(faulty, key(1)) == value(2)
    faulty.fail("lose")
    assert faulty.contains(key(1))
    assert faulty.get(key(1)) is None
    faulty.fail("error", times=2)
    for _ in range(2):
        with pytest.raises(StoreError):
            faulty.contains(key(1))
    assert faulty.contains(key(1))
    faulty.fail("full")
    with pytest.raises(StoreFullError):
        faulty.put(key(3), [b"x"])
    assert faulty.put_many([(key(4), [b"x"])]) == 0
    faulty.fail("hang")
    assert read(faulty, key(1)) == value(1)
    faulty.heal()
    with faulty.read([key(1), key(2)]) as views:
        assert views == [value(1), value(2)]
    with pytest.raises(ValueError, match="flip"):
        faulty.fail("explode")  # type: ignore[arg-type]
