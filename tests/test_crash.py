"""kill -9 at random moments of writing, and the other ways in which a disk lets one down."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Sink, Source
from kvkeep.stores.disk import DiskStore

WRITER = """
import os, sys
sys.path.insert(0, sys.argv[2])
import kvkeep
from blocks import LAYOUT, Source
cache = kvkeep.open(sys.argv[1], memory="1MiB", disk="3MiB").bind(LAYOUT)
print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        break
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        turn = int(line)
        while os.getppid() == parent:
            tokens = list(range(turn % 37 * 1000, turn % 37 * 1000 + 16 * (4 + turn % 9)))
            cache.save(tokens, Source(tokens))
            turn += 1
            if turn == int(line) + 2:
                cache.flush(10)
                os.write(1, b"wrote\\n")
    os.write(1, b"%d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


@pytest.mark.timeout(300)
def test_200_kills_while_writing(tmp_path: Path) -> None:
    """Never a wrong byte, never over budget, and every start works."""
    rng = random.Random(7)
    directory = tmp_path / "cache"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(Path(__file__).parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    found = 0
    try:
        for turn in range(200):
            writer.stdin.write(f"{turn}\n")
            writer.stdin.flush()
            line = writer.stdout.readline()
            wrote = line == "wrote\n"  # the child may be quicker than its parent
            child = int(writer.stdout.readline() if wrote else line)
            if turn % 2 and not wrote:  # every other writer is killed in its first moments, the rest later on
                assert writer.stdout.readline() == "wrote\n"
            time.sleep(rng.uniform(0.001, 0.03))
            os.kill(child, signal.SIGKILL)
            while writer.stdout.readline() == "wrote\n":
                pass
            assert sum(path.stat().st_size for path in directory.iterdir()) <= 3 << 20
            if turn % 5 == 0:
                found += survey(directory)
    finally:
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    found += survey(directory)
    assert found > 100, "the writers did write"


def survey(directory: Path) -> int:
    """Open anew, load all that is found, check every byte."""
    found = 0
    with kvkeep.open(directory, memory="1MiB", disk="3MiB") as root:
        cache = root.bind(LAYOUT)
        for turn in range(37):
            tokens = list(range(turn * 1000, turn * 1000 + 16 * 13))
            sink = Sink()
            with cache.lease(cache.match(tokens)) as lease:
                cache.load(lease, sink)
            found += sink.check(tokens)
    return found


def test_a_full_disk_drops_writes_and_goes_on(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the same error path, from the kernel, without a mount."""
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2]); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import kvkeep; from blocks import *; t = list(range(320))\n"
        "root = kvkeep.open(sys.argv[1], memory='4MiB', disk='8MiB'); c = root.bind(LAYOUT)\n"
        "assert c.save(t, Source(t)) == 20; root.flush(10); s = Sink()\n"
        "with c.lease(c.match(t)) as lease: assert c.load(lease, s) == 320\n"
        "s.check(t); print(root.counters.count('dropped', tier='disk'))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    here = str(Path(__file__).parent)
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), here], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) == 20


FULL = """
import subprocess, sys, time; sys.path.insert(0, sys.argv[2])
import kvkeep; from blocks import *
root = kvkeep.open(sys.argv[1], memory='4MiB', disk='64MiB'); c = root.bind(LAYOUT)
def turn(first):
    t = list(range(first, first + 320))
    assert c.save(t, Source(t)) == 20 and root.flush(20)
    s = Sink()
    with c.lease(c.match(t)) as lease: assert c.load(lease, s) == 320
    s.check(t)
turn(0)
assert root.counters.count('dropped', tier='disk') == 20, root.counters.rows()
subprocess.run(['mount', '-o', 'remount,size=100m', sys.argv[1]], check=True)
end = time.monotonic() + 30
first = 1000
while not root.counters.count('put', tier='disk') and time.monotonic() < end:
    turn(first); first += 1000; time.sleep(0.2)
print(root.counters.count('put', tier='disk') > 0)
"""


def test_a_full_file_system_drops_writes_until_there_is_room(tmp_path: Path) -> None:
    """A real one, small, in a mount namespace of its own."""
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$2" && exec "$0" -c "$1" "$2" "$3"']
    arguments = [sys.executable, FULL, str(tmp_path), str(Path(__file__).parent)]
    try:
        subprocess.run([*command[:4], 'mount -t tmpfs tmpfs "$0"', str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount; the file size limit above stands in for it")
    out = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (out.stdout, out.returncode) == ("True\n", 0), out.stderr


def test_a_removed_directory_costs_hits_only(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    with kvkeep.open(directory, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        tokens = list(range(320))
        assert cache.save(tokens, Source(tokens)) == 20
        root.flush(10)
        assert cache.match(tokens).num_tokens == 320


def test_a_place_that_cannot_be_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(kvkeep.StoreError, match="cannot open"):
        kvkeep.open(tmp_path / "file", disk="8MiB")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_directory_without_permission_is_a_clear_error(tmp_path: Path) -> None:
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o000)
    child = os.fork()
    if child == 0:  # root may read everything, so the child becomes nobody
        status = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            kvkeep.open(directory, memory="1MiB", disk="8MiB")
        except kvkeep.StoreError as error:
            status = 0 if "cannot open" in str(error) and "Permission denied" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_files_are_private_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 8192)
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    (directory / "slab-000000.data").symlink_to(outside)
    os.mkfifo(directory / "slab-000001.data")
    with kvkeep.open(directory, memory="4MiB", disk="8MiB") as root:
        root.bind(LAYOUT).save(list(range(320)), Source(list(range(320))))
    assert outside.read_bytes() == b"x" * 8192
    made = [path for path in directory.iterdir() if path.is_file() and not path.is_symlink()]
    assert {path.stat().st_mode & 0o777 for path in made if path.suffix in {".data", ".log"}} == {0o600}


def test_garbage_in_the_directory_is_a_miss(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        root.bind(LAYOUT).save(list(range(320)), Source(list(range(320))))
    rng = random.Random(3)
    for path in tmp_path.iterdir():
        path.write_bytes(rng.randbytes(path.stat().st_size))
    (tmp_path / "slab-000009.data").write_bytes(b"torn")
    (tmp_path / "slab-000010.log").write_bytes(b"no data file")
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        cache = root.bind(LAYOUT)
        assert cache.match(list(range(320))).num_tokens == 0
        cache.save(list(range(320)), Source(list(range(320))))
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as root:
        assert root.bind(LAYOUT).match(list(range(320))).num_tokens == 320


def test_a_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="2MiB", disk="16MiB") as root:
        for start in range(40):
            tokens = list(range(start * 1000, start * 1000 + 640))
            root.bind(LAYOUT).save(tokens, Source(tokens))
            root.flush(10)
    store = DiskStore(tmp_path, capacity=9 << 20)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 9 << 20
    store.close()
