"""Attack: other users of the machine. They read none of a cache's files, whatever the umask and the directory's mode,
and nothing that they leave in a directory where they may write is read or written to."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvkeep
from kvkeep import labels
from kvkeep.errors import StoreError
from kvkeep.stores import disk
from kvkeep.stores.disk import DiskStore
from kvkeep.testing.stores import key, value

CAPACITY = 1 << 20


def layout() -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32")
    return kvkeep.KVLayout.uniform(identity, num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_tokens=16)


class Ones:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = b"\1" * len(out)


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def modes(path: Path) -> dict[str, str]:
    return {entry.name: oct(stat.S_IMODE(entry.lstat().st_mode)) for entry in path.iterdir()}


@pytest.mark.usefixtures("no_umask")
@pytest.mark.parametrize("there_before", [False, True], ids=["made", "an existing, looser directory"])
def test_files_are_0600_and_the_directory_0700(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "kept"
    if there_before:
        path.mkdir(mode=0o777)
    with kvkeep.open(path, memory="4MiB", disk="16MiB") as cache:
        bound = cache.bind(layout(), description="model")
        for start in range(0, 4000, 16):
            bound.save(range(start, start + 16), Ones())
        assert cache.set_value("name", "value")
        assert cache.flush(10)
    if not there_before:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    found = modes(path)
    assert {"models.json", "lock", "slab-000000.data", "slab-000000.log", "values.sqlite"} <= set(found)
    assert set(found.values()) == {"0o600"}, found


@pytest.mark.usefixtures("no_umask")
def test_parents_and_a_trace_beside_the_blocks_are_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "kept"
    with kvkeep.open(path, memory="4MiB", disk="16MiB", trace=path / "traces" / "t.jsonl") as cache:
        bound = cache.bind(layout(), description="model")
        bound.match(range(100))
    for made in (path, path.parent, path.parent.parent, path / "traces"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700, made
    assert modes(path / "traces") == {"t.jsonl": "0o600"}


def test_a_log_that_is_written_anew_and_a_call_for_room_are_0600(tmp_path: Path) -> None:
    first = DiskStore(tmp_path, capacity=CAPACITY)
    for number in range(2000):
        first.put(key(number % 7), [value(number % 7, 100)])
        first.delete(key(number % 7))
    while first.put_many([(key(10_000 + sum(1 for _ in first.items())), [bytes(60_000)])]):
        pass
    second = DiskStore(tmp_path, capacity=CAPACITY)
    assert second.put_many([(key(3), [b"x"])]) == 0
    assert "want" in modes(tmp_path)
    assert set(modes(tmp_path).values()) == {"0o600"}
    first.close()
    second.close()


def test_a_looser_file_is_made_tight_and_a_looser_directory_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(tmp_path, capacity=CAPACITY)
    store.put(key(1), [b"value"])
    store.close()
    for file in tmp_path.iterdir():
        file.chmod(0o666)
    tmp_path.chmod(0o777)
    store = DiskStore(tmp_path, capacity=CAPACITY)
    assert store.get(key(1)) == b"value"
    assert {name: mode for name, mode in modes(tmp_path).items() if name != "lock"} == {
        "slab-000000.data": "0o600",
        "slab-000000.log": "0o600",
    }
    assert "chmod 700" in caplog.text
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("whose", ["slab-000000.data", "slab-000000.log"])
def test_another_users_files_are_ignored(tmp_path: Path, whose: str, caplog: pytest.LogCaptureFixture) -> None:
    """A slab that somebody else owns may be read and changed by them."""
    store = DiskStore(tmp_path, capacity=CAPACITY)
    store.put(key(1), [b"value"])
    store.close()
    os.chown(tmp_path / whose, 12345, 12345)
    before = (tmp_path / whose).read_bytes()
    store = DiskStore(tmp_path, capacity=CAPACITY)
    assert store.get(key(1)) is None
    store.put(key(2), [b"two"])
    store.close()
    if whose.endswith("data"):
        assert (tmp_path / whose).read_bytes() == before
        assert "ignores 1 files" in caplog.text
    looking = DiskStore(tmp_path, capacity=0, read_only=True)  # a tool of root's may look
    assert looking.get(key(2)) == b"two"
    looking.close()


def test_a_link_in_place_of_a_log_that_is_being_made(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    path = tmp_path / "kept"
    path.mkdir()
    for name in ("slab-000000.new", "slab-000000.log", f"models.{os.getpid()}.new", "models.json"):
        (path / name).symlink_to(outside)
    with kvkeep.open(path, memory="4MiB", disk="16MiB") as cache:
        assert cache.bind(layout()).save(range(32), Ones()) == 2
        assert cache.flush(10)
    assert outside.read_bytes() == b"precious"
    assert not any(entry.is_symlink() for entry in path.iterdir())


@pytest.mark.parametrize("beside", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "another user's"])
def test_values_beside_what_was_planted(tmp_path: Path, kind: str, beside: str) -> None:
    """SQLite follows links, waits for a pipe's writer and makes files for everybody to read, if it is let."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious" * 1000)
    path = tmp_path / "kept"
    with kvkeep.open(path, memory="4MiB", disk="16MiB") as cache:
        assert cache.set_value("before", 1)
    for file in (path / f"values.sqlite{beside}", path / "claims.lock"):
        file.unlink(missing_ok=True)
        match kind:
            case "link":
                file.symlink_to(outside)
            case "dangling":
                file.symlink_to(tmp_path / "made by a link")
            case "pipe":
                os.mkfifo(file)
            case "folder":
                file.mkdir()
            case "another user's":
                file.touch()
                if os.geteuid() == 0:
                    os.chown(file, 12345, 12345)
    with kvkeep.open(path, memory="4MiB", disk="16MiB") as cache:
        kept = cache.set_value("name", "value")
        assert cache.get_value("name") == ("value" if kept else None)
        assert cache.get_or_compute("other", lambda: 7) == 7
    assert outside.read_bytes() == b"precious" * 1000
    assert not (tmp_path / "made by a link").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "deep", "large", "text", "list", "wrong entries"])
def test_models_json_that_is_none(tmp_path: Path, kind: str) -> None:
    """It is only a label: opening goes on, without waiting for a pipe's writer and without reading gigabytes."""
    file = tmp_path / "models.json"
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "deep":
            file.write_text("[" * 1_000_000)
        case "large":
            with file.open("wb") as stream:
                stream.truncate(1 << 40)
        case "text":
            file.write_bytes(b"\xff\xfe")
        case "list":
            file.write_text("[1]")
        case "wrong entries":
            file.write_text('{"zz": {}, "00": 7, "11": [], "22": "x"}')
    assert labels.read(tmp_path) == {}
    with kvkeep.open(tmp_path, memory="4MiB", disk="16MiB") as cache:
        cache.bind(layout(), description="model")
    if kind != "folder":
        assert [facts["description"] for facts in labels.read(tmp_path).values()] == ["model"]


def test_a_process_that_is_stopped_with_the_directorys_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait a while, then say that they cannot open the directory, rather than hang."""
    DiskStore(tmp_path, capacity=CAPACITY).close()
    monkeypatch.setattr(disk, "LOCK_SECONDS", 0.2)
    program = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="holds the lock"):
            DiskStore(tmp_path, capacity=CAPACITY)
    finally:
        holder.communicate()
    store = DiskStore(tmp_path, capacity=CAPACITY)
    with (tmp_path / "lock").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="holds the lock"):
            store.put(key(1), [b"no room without a slab"])
    store.put(key(1), [b"one"])
    store.close()
