"""A directory that several processes share, that is removed, or whose disk fills up."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep import breaker
from kvkeep.errors import StoreError, StoreFullError
from kvkeep.keys import BlockKey
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.slabs import Slab
from kvkeep.testing.stores import key, read, value

CAPACITY = 1 << 20
SLAB = 64 << 10


def disk(path: Path, *, read_only: bool = False) -> DiskStore:
    return DiskStore(path / "cache", capacity=CAPACITY, slab_nbytes=SLAB, read_only=read_only)


def contents(store: DiskStore) -> dict[BlockKey, bytes | None]:
    return {block: read(store, block) for block, _ in store.items()}


def in_logs(path: Path) -> int:
    """Values that the logs say are live, each slab's counted by itself."""
    reader = disk(path, read_only=True)
    count = sum(len(slab.live) for slab in reader._slabs.values())
    reader.close()
    return count


def write_unasked(store: DiskStore, number: int) -> None:
    """As ``put``, from a process that has not seen yet that another one has the same value."""
    item = (key(number), [value(number)])
    store._write(store._place([item]), [item])


# Several processes


def test_every_reader_finds_what_is_live(tmp_path: Path) -> None:
    """Values that are evicted and stored again lie in another slab than before, and the old one's log names them."""
    rng = random.Random(5)
    owner, reader = disk(tmp_path), disk(tmp_path, read_only=True)
    for turn in range(400):
        block = rng.randrange(40)
        if owner.contains(key(block)):
            owner.delete(key(block))
        else:
            owner.put(key(block), [value(block, rng.randrange(1, 12_000))])
        if turn % 20 == 0:
            late = disk(tmp_path, read_only=True)
            assert contents(owner) == contents(reader) == contents(late)
            late.close()
    assert in_logs(tmp_path) == len(list(owner.items()))
    owner.close()
    reader.close()


def test_of_two_copies_one_goes(tmp_path: Path) -> None:
    """Two processes have stored the same block, as they may: when one evicts its own, readers find the other's."""
    one, two, reader = disk(tmp_path), disk(tmp_path), disk(tmp_path, read_only=True)
    for number in range(6):
        one.put(key(number), [value(number)])
        write_unasked(two, number)
    assert len(list(reader.items())) == 6
    for number, writer in enumerate([one, two] * 2):
        assert writer.delete(key(number))
        assert contents(reader) == {key(each): value(each) for each in range(6)}
    assert one.delete(key(1))
    assert key(1) not in contents(reader)
    for store in (one, two, reader):
        store.close()


def test_who_adopts_two_copies_keeps_one(tmp_path: Path) -> None:
    one, two = disk(tmp_path), disk(tmp_path)
    for store in (one, two):
        write_unasked(store, 1)
        store.put(key(2 if store is one else 3), [b"x"])
    one.close()
    two.close()
    assert in_logs(tmp_path) == 4
    heir = disk(tmp_path)
    assert in_logs(tmp_path) == 3
    assert read(heir, key(1)) == value(1)
    assert heir.delete(key(1))
    assert in_logs(tmp_path) == 2
    pages = sum(slab.room.units - slab.room.free_units for slab in heir._slabs.values())
    assert pages == 2
    heir.close()


def test_a_directory_that_another_process_made_anew(tmp_path: Path) -> None:
    """Slabs have the same numbers again: what is open is still the old file."""
    reader, one = disk(tmp_path, read_only=True), disk(tmp_path)
    one.put(key(1), [b"one"])
    assert read(reader, key(1)) == b"one"
    shutil.rmtree(tmp_path / "cache")
    two = disk(tmp_path)
    two.put(key(2), [b"two"])
    assert read(reader, key(2)) == b"two"
    assert read(reader, key(1)) is None
    with pytest.raises(StoreError, match="removed"):
        one.maintain()
    assert read(one, key(2)) == b"two"
    for store in (reader, one, two):
        store.close()


# Removed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes at once."""
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has said since it was last looked at."""
    caplog.set_level(logging.WARNING, logger="kvkeep")

    class Said(list[str]):
        def __iter__(self) -> Iterator[str]:
            lines = [record.getMessage() for record in caplog.records if record.name == "kvkeep"]
            caplog.clear()
            return iter(lines)

    return Said()


def turn(root: kvkeep.KVCache, number: int) -> None:
    """Save a prompt of eight blocks of its own, and keep house."""
    tokens = list(range(1000 * number, 1000 * number + 128))
    root.bind(LAYOUT).save(tokens, Source(tokens))
    root.flush(10)
    root.store.tiers[-1].maintain()


def found(root: kvkeep.KVCache, number: int) -> int:
    """Blocks of that prompt that can be loaded, checked."""
    tokens = list(range(1000 * number, 1000 * number + 128))
    cache, sink = root.bind(LAYOUT), Sink()
    with cache.lease(cache.match(tokens)) as lease:
        cache.load(lease, sink)
    return sink.check(tokens)


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_a_removed_directory_is_made_anew(tmp_path: Path, said: list[str], how: str) -> None:
    directory = tmp_path / "cache"
    with kvkeep.open(directory, memory=0, disk="8MiB") as root:
        turn(root, 0)
        assert found(root, 0) == 8
        match how:
            case "removed":
                shutil.rmtree(directory)
            case "moved":
                directory.rename(tmp_path / "elsewhere")
            case "emptied":
                for path in directory.glob("slab-*"):
                    path.unlink()
        assert not list(said)
        root.store.tiers[-1].maintain()
        (line,) = said
        assert "were removed" in line
        assert root.counters.count("store_error", tier="disk") == 1
        assert root.store.tiers[-1].usage == (0, 0)
        for number in range(1, 4):
            turn(root, number)
        assert not list(said)
    with kvkeep.open(directory, memory=0, disk="8MiB") as root:
        assert [found(root, number) for number in range(4)] == [0, 8, 8, 8]


def test_a_slab_that_is_removed_while_it_is_read(tmp_path: Path) -> None:
    store = disk(tmp_path)
    store.put(key(1), [value(1)])
    with store.read([key(1)]) as (view,):
        shutil.rmtree(tmp_path / "cache")
        store.maintain()
        store.put(key(2), [value(2)])
        assert view == value(1)
    with pytest.raises(StoreError, match="removed"):
        store.maintain()
    assert not store.contains(key(1))
    store.put(key(3), [value(3)])
    assert read(store, key(3)) == value(3)
    store.close()


# Full


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While it holds anything, there is no room for another slab."""
    state: list[bool] = []
    allocate = os.posix_fallocate

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        if state:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    return state


def look_again(root: kvkeep.KVCache) -> None:
    """As if a second had passed."""
    store = root.store.tiers[-1].store
    assert isinstance(store, DiskStore)
    store._next_growth = 0.0


def test_a_disk_that_fills_after_the_first_slab(tmp_path: Path, said: list[str], full: list[bool]) -> None:
    with kvkeep.open(tmp_path / "cache", memory=0, disk="64MiB", policy="lru") as root:
        turn(root, 0)
        full.append(True)
        for number in range(1, 200):  # 6 MiB into a slab of 4
            turn(root, number)
            look_again(root)
        (line,) = said
        assert "No space left" in line
        assert root.counters.count("store_error", tier="disk", cause="full") == 1
        assert root.counters.count("evict", tier="disk") > 100
        assert root.counters.count("dropped", tier="disk") == 0
        assert found(root, 199) == 8
        full.clear()
        for number in range(200, 400):
            turn(root, number)
            look_again(root)
        assert len(list((tmp_path / "cache").glob("slab-*.data"))) > 1
        assert not list(said)


def test_a_full_disk_is_not_back_before_a_write_works(
    tmp_path: Path, said: list[str], full: list[bool], quick: None
) -> None:
    full.append(True)
    with kvkeep.open(tmp_path / "cache", memory=0, disk="64MiB") as root:
        for number in range(5):
            turn(root, number)
        (line,) = said
        assert "failed (full)" in line
        full.clear()
        root.store.tiers[-1].breakers.writes._probe_at = 0.0
        root.store.tiers[-1].maintain()
        (line,) = said
        assert "is back" in line
        turn(root, 6)
        assert found(root, 6) == 8


def test_a_log_that_cannot_be_written(
    tmp_path: Path, said: list[str], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the few bytes that a log needs: nothing is stored, what is there is found."""
    write = os.pwrite

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with kvkeep.open(tmp_path / "cache", memory=0, disk="64MiB") as root:
        turn(root, 0)
        monkeypatch.setattr(os, "pwrite", refuse)
        for number in range(1, 5):
            turn(root, number)
        assert found(root, 0) == 8
        (line,) = said
        assert "failed (full)" in line
        monkeypatch.setattr(os, "pwrite", write)
        root.store.tiers[-1].breakers.writes._probe_at = 0.0
        root.store.tiers[-1].maintain()
        turn(root, 5)
        assert found(root, 5) == 8


def test_a_directory_that_was_replaced_by_a_file_is_not_back(tmp_path: Path, said: list[str], quick: None) -> None:
    with kvkeep.open(tmp_path / "cache", memory=0, disk="64MiB") as root:
        turn(root, 0)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("in the way")
        for number in range(1, 6):
            turn(root, number)
        assert len(list(said)) == 2, "it is removed; it cannot be made anew"
        (tmp_path / "cache").unlink()
        root.store.tiers[-1].breakers.medium._probe_at = 0.0
        root.store.tiers[-1].maintain()
        assert [line.partition(": ")[2] for line in said] == ["is back"]
        turn(root, 7)
        assert found(root, 7) == 8


def test_a_log_that_cannot_be_taken_over_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged log is written anew by who adopts the slab. Where there is no room for that, its blocks are still
    found."""
    store = disk(tmp_path)
    store.put(key(1), [value(1)])
    store.close()
    with next((tmp_path / "cache").glob("*.log")).open("ab") as log:
        log.write(b"torn")

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Slab, "rewrite_log", refuse)
        store = disk(tmp_path)
        assert read(store, key(1)) == value(1)
        store.close()
    store = disk(tmp_path)
    assert store.delete(key(1))
    store.close()


# Replaced


@pytest.mark.parametrize("room", ["roomy", "full"])
def test_a_value_that_is_replaced_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    """As ``kvkeep rotate`` does: a kill in between leaves the old value or the new one. Where the slabs have no room
    for both, the one of the two that is at work goes first."""
    store = DiskStore(tmp_path / "cache", capacity=CAPACITY, slab_nbytes=SLAB)
    count = 0
    while count < 20 or room == "full":
        try:
            store.put(key(count), [value(count)])
        except StoreFullError:
            break
        count += 1
    if room == "roomy":
        store.delete(key(3))
    there = {block for block, _ in store.items()}
    fewest = len(there)
    append = Slab.append_log

    def watched(slab: Slab, *arguments: Any) -> None:
        nonlocal fewest
        append(slab, *arguments)
        reader = disk(tmp_path, read_only=True)
        fewest = min(fewest, len(dict(reader.items()).keys() & there))
        reader.close()

    monkeypatch.setattr(Slab, "append_log", watched)
    slabs = len(list((tmp_path / "cache").glob("*.data")))
    for number in range(count):
        assert store.replace(key(number), [value(1000 + number)]) == (key(number) in there)
    assert fewest == len(there) - (room == "full")
    assert len(list((tmp_path / "cache").glob("*.data"))) == slabs, "no more room is taken"
    expected = {key(number): value(1000 + number) for number in range(count) if key(number) in there}
    assert contents(store) == expected
    assert in_logs(tmp_path) == len(there)
    store.close()
    store = disk(tmp_path)
    assert contents(store) == expected
    store.close()
