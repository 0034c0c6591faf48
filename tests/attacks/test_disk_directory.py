"""Attack: whoever can write to the cache directory leaves anything in it. Opening answers with a store or StoreError, a
read with nothing or with bytes that the frame's check refuses, and the budget holds all the same."""

from __future__ import annotations

import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from kvkeep import frame
from kvkeep.errors import FrameError, StoreError, StoreFullError
from kvkeep.keys import BlockKey
from kvkeep.stores.disk import DiskStore
from kvkeep.testing.stores import key, value

CAPACITY = 1 << 20
LAYOUT = b"l" * 32


def framed(number: int) -> list[bytes]:
    payload = value(number, 3000 + number)
    header = frame.pack(key(number), LAYOUT, "raw", len(payload), len(payload))
    frame.seal(header, payload)
    return [bytes(header), payload]


def believed(store: DiskStore, block: BlockKey) -> bytes | None:
    """What a cache would take from the store."""
    found = store.get(block)
    if found is None:
        return None
    try:
        header, payload = frame.verify(found)
        frame.check(header, block, LAYOUT)
    except FrameError:
        return None
    return bytes(payload)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    store = DiskStore(tmp_path / "cache", capacity=CAPACITY)
    for number in range(40):
        store.put(key(number), framed(number))
    for number in range(0, 40, 5):
        store.delete(key(number))
    store.close()
    return tmp_path / "cache"


def check(path: Path) -> int:
    """Opens, reads everything, fills it up, opens again; how many blocks were still right."""
    store = DiskStore(path, capacity=CAPACITY)
    right = 0
    for number in range(40):
        found = believed(store, key(number))
        assert found in (None, value(number, 3000 + number)), "a wrong block was believed"
        right += found is not None
    for number in range(100, 400):
        try:
            store.put(key(number), framed(number))
        except StoreFullError:
            break
        assert believed(store, key(number)) == value(number, 3000 + number)
    store.close()
    taken = sum(entry.lstat().st_blocks * 512 for entry in path.iterdir() if entry.name.startswith("slab-"))
    assert taken <= CAPACITY
    DiskStore(path, capacity=CAPACITY).close()
    return right


def test_an_honest_directory(cache: Path) -> None:
    assert check(cache) == 32


def test_damaged_files(cache: Path, tmp_path: Path) -> None:
    rng = random.Random(11)
    survived = []
    for round_ in range(60):
        victim = tmp_path / f"copy{round_}"
        shutil.copytree(cache, victim)
        target = rng.choice(sorted(victim.glob("slab-*")))
        data = bytearray(target.read_bytes())
        match rng.randrange(5):
            case 0:
                for _ in range(rng.choice((1, 30))):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                data[:] = rng.randbytes(len(data))
            case 3:
                at = rng.randrange(len(data))
                data[at : at + 64] = data[:64]
            case 4:
                data += rng.randbytes(rng.randrange(5000))
        target.write_bytes(data)
        survived.append(check(victim))
        shutil.rmtree(victim)
    assert min(survived) == 0
    assert max(survived) >= 32  # more: a lost deletion brings back a block, which is right all the same
    assert len(set(survived)) > 4, "the damage did not reach the blocks"


def test_every_bit_of_the_first_log_records(cache: Path, tmp_path: Path) -> None:
    log = min(cache.glob("slab-*.log"))
    right = log.read_bytes()
    for bit in range(0, 3 * 64 * 8, 7):
        wrong = bytearray(right)
        wrong[bit >> 3] ^= 1 << (bit & 7)
        victim = tmp_path / "copy"
        shutil.copytree(cache, victim)
        (victim / log.name).write_bytes(wrong)
        store = DiskStore(victim, capacity=CAPACITY)
        for number in (1, 2, 3):
            assert believed(store, key(number)) in (None, value(number, 3000 + number))
        store.close()
        shutil.rmtree(victim)


def test_a_log_of_another_slab(cache: Path, tmp_path: Path) -> None:
    """Records that check, about bytes that are not theirs."""
    other = DiskStore(tmp_path / "other", capacity=CAPACITY)
    for number in range(39, -1, -1):
        other.put(key(number), framed(number))
    other.close()
    shutil.copy(min((tmp_path / "other").glob("*.log")), min(cache.glob("*.log")))
    assert check(cache) < 40


@pytest.mark.parametrize("name", ["slab-000007.data", "slab-000000.log", "lock", "want"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_what_is_no_regular_file(cache: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Nothing outside the directory is touched, nothing blocks; at worst the store says that it cannot be opened."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious" * 1000)
    target = cache / name
    target.unlink(missing_ok=True)
    match kind:
        case "link":
            target.symlink_to(outside)
        case "dangling":
            target.symlink_to(tmp_path / "made by a link")
        case "fifo":
            os.mkfifo(target)
        case "folder":
            target.mkdir()
    with suppress(StoreError):
        check(cache)
    assert outside.read_bytes() == b"precious" * 1000
    assert not (tmp_path / "made by a link").exists()


def test_strangers_are_left_alone(cache: Path) -> None:
    names = ["slab-1.data", "slab-000001.data.bak", "notes.txt", "slab-0000001.data", "SLAB-000001.data"]
    for name in names:
        (cache / name).write_bytes(b"mine")
    assert check(cache) == 32
    assert all((cache / name).read_bytes() == b"mine" for name in names)
