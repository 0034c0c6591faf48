"""What a hostile reviewer of the core found: each was a crash, a hang, a leak or a loss that nobody had asked about."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import kvkeep
from kvkeep import frame
from kvkeep.buffers import Buffer, BufferPool
from kvkeep.codecs.lossless import Lossless
from kvkeep.codecs.raw import Raw
from kvkeep.crypt import Cipher
from kvkeep.events import Counters
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout
from kvkeep.opening import codec_named
from kvkeep.stores import disk, slabs
from kvkeep.stores.disk import DiskStore
from kvkeep.testing.stores import key, value
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore

CAPACITY = 1 << 20
TOKENS = list(range(64))


def layout() -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32")
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


class Ones:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = b"\1" * len(out)

    def write(self, index: int, payload: memoryview) -> None:
        assert payload == b"\1" * len(payload)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[kvkeep.KVCache]:
    """Four blocks on disk, none in memory."""
    with kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB") as root:
        root.bind(layout()).save(TOKENS, Ones())
    with kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB") as root:
        yield root.bind(layout())


# A cache never fails a request


@pytest.mark.parametrize("encryption", [None, lambda: bytes(32)], ids=["plain", "encrypted"])
def test_a_load_from_a_cache_that_is_closed_meanwhile(tmp_path: Path, encryption: object) -> None:
    """A server shuts down while a request still has its match: nothing is loaded, nothing is raised."""
    options = {"memory": "4MiB", "disk": "16MiB", "encryption": encryption}
    with kvkeep.open(tmp_path / "kept", **options) as root:  # type: ignore[arg-type]
        root.bind(layout()).save(TOKENS, Ones())
    root = kvkeep.open(tmp_path / "kept", **options)  # type: ignore[arg-type]
    bound = root.bind(layout())
    with bound.lease(bound.match(TOKENS)) as lease:
        root.close()
        assert bound.load(lease, Ones()) == 0
    bound.save(TOKENS, Ones())


def test_a_load_that_a_close_meets_in_the_middle(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB", encryption=lambda: bytes(32)) as root:
        root.bind(layout()).save(range(16 * 40), Ones())
    root = kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB", encryption=lambda: bytes(32))
    bound = root.bind(layout())

    class Closing(Ones):
        def write(self, index: int, payload: memoryview) -> None:
            super().write(index, payload)
            if index == 3:
                closer = threading.Thread(target=root.close)
                closer.start()
                closer.join(5)

    with bound.lease(bound.match(range(16 * 40))) as lease:
        assert bound.load(lease, Closing()) >= 16 * 4


class Moody(Raw):
    """A codec with a bug that shows once."""

    name = "moody"
    lossless = True
    left = 1

    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        if Moody.left:
            Moody.left -= 1
            raise ZeroDivisionError("a bug in a codec")
        return super().encode(data, layout)


def test_the_writer_survives_a_bug_in_a_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug is shown (by the thread's traceback); what comes after is written all the same."""
    Moody.left = 1
    shown = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: shown.set())
    with kvkeep.open(tmp_path / "kept", memory="4MiB", disk="16MiB") as root:
        root.store.tiers[1].codec = Moody()
        bound = root.bind(layout())
        bound.save(TOKENS, Ones())
        assert root.flush(10), "the queue is not stuck"
        assert shown.wait(10)
        bound.save(range(1000, 1064), Ones())
        assert root.flush(10)
        there = root.store.tiers[1].contains_many(kvkeep.block_keys(layout(), range(1000, 1064)))
        assert there == [True] * 4
        assert not root.store.tiers[0]._pins


def test_a_sink_that_fails_gives_everything_back(cache: kvkeep.KVCache) -> None:
    class Failing:
        def write(self, index: int, payload: memoryview) -> None:
            raise KeyError("the engine's own error")

    kept: list[BaseException] = []
    with cache.lease(cache.match(TOKENS)) as lease:
        try:
            cache.load(lease, Failing())
        except KeyError as error:
            kept.append(error)  # as a server's log does, with its traceback and all its frames
    store = cache.store.tiers[1].store
    assert isinstance(store, DiskStore)
    assert kept
    assert not store._reading, "places are held as long as somebody keeps the exception"


# Forks


def in_child(work: Callable[[], bool]) -> bool:
    """Does ``work`` say yes in a forked child, within ten seconds?"""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


def test_a_fork_while_locks_are_held() -> None:
    """Another thread may be anywhere when one forks; in the child it is gone, and what it held stays locked."""
    pool, counters, cipher = BufferPool(), Counters(), Cipher([bytes(32)])

    def work() -> bool:
        with pool.borrow(10):
            counters.event("load")
        room = memoryview(bytearray(frame.TAG_NBYTES))
        return bool(cipher.encrypt(BlockKey(bytes(32)), layout(), "raw", b"", room))

    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock, counters._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_child(work)
    finally:
        release.set()
        thread.join()


def test_a_fork_while_the_directorys_lock_is_held(tmp_path: Path) -> None:
    """A lock ends with the last copy of its descriptor: a child must not keep it for its whole life."""
    store = DiskStore(tmp_path, capacity=CAPACITY)
    reading, writing = os.pipe()
    with store._directory_lock():
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with (tmp_path / "lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(reading)
        os.close(writing)
        os.waitpid(pid, 0)
    store.close()


def found(cache: kvkeep.KVCache) -> int:
    return cache.bind(layout()).match(TOKENS).num_blocks


def test_one_store_that_cannot_be_opened_in_a_child_leaves_the_others(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with kvkeep.open(one, memory="4MiB", disk="16MiB") as first, kvkeep.open(two, memory="4MiB", disk="16MiB") as other:
        for each in (first, other):
            each.bind(layout()).save(TOKENS, Ones())
            assert each.flush(10)
        disk.LOCK_SECONDS, before = 0.1, disk.LOCK_SECONDS
        held = [(path / "lock").open("rb") for path in (one, two)]
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX)
            assert in_child(lambda: other.store.writer._thread is None and found(other) == 4)
            fcntl.flock(held[0], fcntl.LOCK_UN)
            fcntl.flock(held[1], fcntl.LOCK_EX)
            assert in_child(lambda: first.store.writer._thread is None and found(first) == 4)
        finally:
            disk.LOCK_SECONDS = before
            for stream in held:
                stream.close()


# What whoever can write to a directory may leave in it


def record(op: int, page: int, nbytes: int, block: BlockKey) -> bytes:
    return slabs.pack_record(op, page, nbytes, 1, block)


def test_a_log_of_a_terabyte(tmp_path: Path) -> None:
    """Sparse: it costs the attacker nothing."""
    store = DiskStore(tmp_path, capacity=CAPACITY)
    store.put(key(1), [value(1, 5000)])
    store.close()
    with (tmp_path / "slab-000000.log").open("r+b") as stream:
        stream.truncate(1 << 40)
    for read_only in (True, False):
        tracemalloc.start()
        try:
            store = DiskStore(tmp_path, capacity=CAPACITY, read_only=read_only)
            assert store.get(key(1)) == value(1, 5000)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
            store.close()
    assert (tmp_path / "slab-000000.log").stat().st_size < CAPACITY


def test_many_keys_that_claim_a_whole_slab_each(tmp_path: Path) -> None:
    """Values of one slab lie side by side, so what is read at once is never more than it."""
    size = 4 << 20
    store = DiskStore(tmp_path, capacity=8 << 20, slab_nbytes=size)
    store.put(key(0), [b"x"])
    store.close()
    log = tmp_path / "slab-000000.log"
    log.write_bytes(log.read_bytes() + b"".join(record(1, 0, size, key(number)) for number in range(1, 400)))
    store = DiskStore(tmp_path, capacity=8 << 20, slab_nbytes=size, read_only=True)
    tracemalloc.start()
    before = maximum_resident()
    try:
        with store.read([key(number) for number in range(1, 400)]) as values:
            assert sum(len(each) for each in values if each is not None) <= size
    finally:
        tracemalloc.stop()
        store.close()
    assert maximum_resident() - before < 256 << 20


def maximum_resident() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmPeak:")[2].split()[0]) << 10


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_last_number_is_taken(tmp_path: Path, kind: str) -> None:
    """Slabs have six digits: a seventh would be seen by nobody, and count against no budget."""
    name = tmp_path / "slab-999999.data"
    if kind == "file":
        name.touch()
    else:
        name.mkdir()
    store = DiskStore(tmp_path, capacity=CAPACITY)
    for number in range(100):
        if not store.put_many([(key(number), [value(number, 60_000)])]):
            break
    assert number > 5
    assert store.nbytes_on_disk <= CAPACITY
    names = {path.name for path in tmp_path.glob("slab-*.data")}
    assert all(disk._NAME.fullmatch(each) for each in names)
    store.close()
    store = DiskStore(tmp_path, capacity=CAPACITY)
    assert store.get(key(0)) == value(0, 60_000)
    store.close()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_call_for_room_that_cannot_be_answered(tmp_path: Path, kind: str) -> None:
    """A holder must not give its slabs away, half each second, to nobody."""
    store = DiskStore(tmp_path, capacity=CAPACITY)
    for number in range(12):
        store.put(key(number), [value(number, 60_000)])
    mine = len(store._own)
    match kind:
        case "folder":
            (tmp_path / "want").mkdir()
        case "link":
            (tmp_path / "want").symlink_to(tmp_path / "lock")
        case "pipe":
            os.mkfifo(tmp_path / "want")
    for _ in range(3):
        store.maintain()
    assert len(store._own) == mine
    store.close()


def test_requests_do_not_wait_for_a_stopped_holder_of_the_directorys_lock(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, capacity=CAPACITY)
    with (tmp_path / "lock").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = threading.Thread(target=lambda: put_quietly(store))
        writer.start()
        time.sleep(0.05)
        start = time.monotonic()
        store.contains_many([key(5)])
        waited = time.monotonic() - start
        writer.join()
    assert waited < disk.LOCK_SECONDS / 4
    store.close()


def put_quietly(store: DiskStore) -> None:
    with suppress(kvkeep.StoreError):
        store.put(key(1), [b"no slab can be made"])


# Others' blocks


def test_a_codec_that_is_not_installed_here_deletes_nothing_on_a_server(cache: kvkeep.KVCache) -> None:
    """Of two machines that share a server one lacks a library: it misses, and leaves the blocks to the other."""
    store = cache.store.tiers[1].store
    observer = Counters()

    def without(name: str) -> kvkeep.codecs.base.Codec:  # type: ignore[name-defined]
        if name == "lossless":
            raise kvkeep.CodecError("a frame was written with codec 'lossless': pip install 'kvkeep[zstd]'")
        return codec_named(name)

    shape = layout()
    block = kvkeep.block_keys(shape, TOKENS)[0]
    payload = Lossless().encode(b"\1" * shape.block_nbytes, shape)
    head = frame.pack(block, shape.fingerprint, "lossless", len(payload), shape.block_nbytes)
    frame.seal(head, payload)
    store.delete(block)
    store.put(block, [bytes(head), payload])
    shared = Tier("remote", store, policy=None, codec=Raw(), observer=observer)
    tiered = TieredStore([shared], codec=without, observer=observer)
    assert tiered.locate([block]) == [shared]
    assert list(tiered.blocks([block], [shared], shape)) == []
    assert observer.count("lost", tier="remote", cause="unknown") == 1
    assert tiered.locate([block]) == [], "it is not promised again"
    assert store.get(block) is not None
    there = TieredStore([Tier("remote", store, policy=None, codec=Raw(), observer=observer)],
                        codec=codec_named, observer=observer)  # fmt: skip
    assert [bytes(data) for _, data in there.blocks([block], there.locate([block]), shape)] == [
        b"\1" * shape.block_nbytes
    ]


def test_records_are_64_bytes() -> None:
    assert len(record(1, 0, 1, key(1))) == slabs.RECORD.size == struct.calcsize("<B3xII4xQ32s8s")


def test_the_index_of_values_does_not_grow_with_memory(tmp_path: Path) -> None:
    """It lies in the directory: a large memory tier over a small disk must not make it larger than the disk."""
    with kvkeep.open(tmp_path / "kept", memory="64MiB", disk="4MiB") as cache:
        for number in range(2000):
            cache.set_value(f"name {number}", "x" * 50)
    taken = sum(entry.stat().st_blocks * 512 for entry in (tmp_path / "kept").iterdir())
    assert taken < 4 << 20
    assert sum(entry.stat().st_size for entry in (tmp_path / "kept").glob("values.sqlite")) <= 128 << 10
