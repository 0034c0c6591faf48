"""Single-flight: one of many computes, the others wait for it as long as they said, and a dead one holds nobody up."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvkeep
from blocks import LAYOUT, Source
from kvkeep.errors import StoreError
from kvkeep.flight import FileLocks, Flight, Locks, ServerLocks
from kvkeep.stores.redis import RedisStore
from kvkeep.testing.servers import RedisServer, wait_for
from kvkeep.values.index import MemoryIndex
from kvkeep.values.redis import RedisIndex

PATIENT = "?lookup_timeout=20&load_timeout=20&save_timeout=20"
"""A busy machine is not what is tested here."""
HERE = Path(__file__).parent
NAME, OTHER = b"n" * 32, b"o" * 32
TOKENS = list(range(3000))


@pytest.fixture(params=["directory", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Locks]]:
    """Makes what another process would make."""
    if request.param == "directory":
        yield lambda: FileLocks(tmp_path / "claims.lock")
    else:
        stores: list[RedisStore] = []
        url = request.getfixturevalue("redis_shared").url + PATIENT

        def make() -> Locks:
            stores.append(RedisStore.from_url(url))
            return ServerLocks(RedisIndex(stores[-1]), 0.5)

        yield make
        for store in stores:
            store.close()


def test_one_holds_a_name_at_a_time(place: Callable[[], Locks]) -> None:
    one, two = Flight([place()]), Flight([place()])
    claim = one.take(NAME)
    assert claim is not None
    assert one.take(NAME) is None
    assert two.take(NAME) is None
    other = two.take(OTHER)
    assert other is not None
    one.release(claim)
    again = two.take(NAME)
    assert again is not None
    assert one.take(NAME) is None
    two.release(again)
    two.release(other)


def test_a_claim_lasts_as_long_as_its_work(place: Callable[[], Locks]) -> None:
    """Longer than a server's entry lives: it is renewed."""
    one, two = Flight([place()]), Flight([place()])
    claim = one.take(NAME)
    assert claim is not None
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        assert two.take(NAME) is None
        time.sleep(0.05)
    one.release(claim)
    assert two.wait(NAME, 5, lambda: False) is not None


def test_waiting_ends_when_it_is_ready_or_free_or_the_time_is_over(place: Callable[[], Locks]) -> None:
    one, two = Flight([place()]), Flight([place()])
    claim = one.take(NAME)
    assert claim is not None
    begin = time.monotonic()
    assert two.wait(NAME, 0.2, lambda: False) is None
    assert one.wait(NAME, 0.2, lambda: False) is None
    assert time.monotonic() - begin >= 0.4
    assert two.wait(NAME, 60, lambda: True) is None
    threading.Timer(0.2, one.release, [claim]).start()
    mine = two.wait(NAME, 60, lambda: False)
    assert mine is not None
    two.release(mine)


def test_a_claim_is_kept_until_what_was_made_can_be_seen(place: Callable[[], Locks]) -> None:
    written = threading.Event()
    one, two = Flight([place()], written=written.is_set), Flight([place()])
    claim = one.take(NAME)
    assert claim is not None
    one.release(claim)
    time.sleep(0.1)
    assert two.take(NAME) is None
    written.set()
    assert two.wait(NAME, 30, lambda: False) is not None


def test_a_server_that_has_forgotten_a_claim_takes_no_others(redis_shared: RedisServer) -> None:
    """The claimer was stopped for longer than its claim lived; then it releases what is another's by now."""
    store = RedisStore.from_url(redis_shared.url + PATIENT)
    one, two = ServerLocks(RedisIndex(store), 0.2), ServerLocks(RedisIndex(store), 60)
    late = one.lock(NAME)
    assert late is not None
    time.sleep(0.3)
    assert two.lock(NAME) is not None
    late()
    assert one.lock(NAME) is None
    store.close()


class Broken(Locks):
    def lock(self, name: bytes) -> None:
        raise StoreError("out of order")

    def locked(self, names: object) -> bool:
        raise StoreError("out of order")


def test_a_broken_place_is_left_out(tmp_path: Path) -> None:
    folder = FileLocks(tmp_path)  # a folder, not a file
    for broken in (Broken(), folder):
        flight = Flight([broken])
        claim = flight.take(NAME)
        assert claim is not None
        assert flight.take(NAME) is None, "within the process it is kept all the same"
        with flight.prefix([OTHER], lambda: 0, 0.0) as mine:
            assert mine
        flight.release(claim)
        assert flight.take(NAME) is not None


def test_a_forked_child_holds_nothing_of_its_parents(place: Callable[[], Locks]) -> None:
    flight = Flight([place()])
    claim = flight.take(NAME)
    assert claim is not None
    child = os.fork()
    if not child:
        time.sleep(0.5)
        os._exit(0)
    flight.release(claim)
    other = Flight([place()])
    assert other.wait(NAME, 0.4, lambda: False) is not None, "although the child lives"
    os.waitpid(child, 0)


# Prefixes


def test_the_claim_of_a_prompt() -> None:
    with kvkeep.open(memory="64MiB") as root:
        cache = root.bind(LAYOUT)
        with cache.claim(TOKENS) as mine:
            assert mine
            with cache.claim(TOKENS) as second:
                assert not second
            with cache.claim(TOKENS[:100] + [7] * 100) as shares:
                assert not shares, "it misses the same first block"
            with cache.claim([9] * 100) as another:
                assert another
            cache.save(TOKENS, Source(TOKENS))
        with cache.claim(TOKENS) as mine:
            assert not mine, "nothing is missing"
        with cache.claim(TOKENS + [1] * 16) as mine:
            assert mine, "its last block"
        with cache.claim([1, 2, 3]) as mine:
            assert not mine, "no block"


def test_who_waits_loads(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="64MiB", disk="64MiB") as one, kvkeep.open(tmp_path, disk="64MiB") as two:
        first, second = one.bind(LAYOUT), two.bind(LAYOUT)
        seen: list[object] = []
        claimed = threading.Event()

        def wait() -> None:
            claimed.wait(10)
            with second.claim(TOKENS, wait=60) as mine:
                seen.append(mine)
                seen.append(second.match(TOKENS).num_tokens)

        thread = threading.Thread(target=wait)
        thread.start()
        with first.claim(TOKENS) as mine:
            assert mine
            claimed.set()
            time.sleep(0.2)
            first.save(TOKENS, Source(TOKENS))
        thread.join(60)
        assert seen == [False, 3000 // 16 * 16]


def test_who_comes_while_the_rest_is_being_written_waits(tmp_path: Path) -> None:
    """The first blocks are there, so the first missing one is not that of the claim."""
    with kvkeep.open(tmp_path, memory="64MiB", disk="64MiB") as one, kvkeep.open(tmp_path, disk="64MiB") as two:
        first, second = one.bind(LAYOUT), two.bind(LAYOUT)
        with first.claim(TOKENS) as mine:
            assert mine
            first.save(TOKENS[:480], Source(TOKENS[:480]))
            assert one.flush(30)
            wait_for(lambda: second.match(TOKENS).num_tokens == 480, "the first blocks are not seen")
            with second.claim(TOKENS, wait=0.2) as late:
                assert not late


WORKER = textwrap.dedent(
    """
    # Forks COUNT askers that all want the same prefix at once; each prints what it did.
    import os, signal, sys, time
    sys.path[:0] = [sys.argv[1]]
    import kvkeep
    from blocks import LAYOUT, Sink, Source
    where, prefills, count, deadly = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "deadly"
    tokens = list(range(3000))
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()

    def ask(at):
        remote = where if "://" in where else None
        root = kvkeep.open(None if remote else where, memory="64MiB", disk="256MiB", remote=remote)
        cache = root.bind(LAYOUT)
        root.get_value("warm")
        os.write(ready_write, b"r")
        os.read(go_read, 1)
        with cache.claim(tokens, wait=60) as mine:
            match = cache.match(tokens)
            sink = Sink()
            with cache.lease(match) as lease:
                loaded = cache.load(lease, sink)
            sink.check(tokens)
            if loaded < len(tokens) // 16 * 16:
                if deadly:
                    try:
                        os.close(os.open(prefills + ".dead", os.O_CREAT | os.O_EXCL))
                        os.kill(os.getpid(), signal.SIGKILL)
                    except FileExistsError:
                        pass
                time.sleep(0.5)  # the prefill
                with open(prefills, "a") as file:
                    file.write(f"{at} {mine} {loaded}\\n")
                cache.save(tokens, Source(tokens))
        root.close()

    children = []
    for at in range(count):
        child = os.fork()
        if not child:
            try:
                ask(at)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    for _ in children:
        os.read(ready_read, 1)
    os.write(go_write, b"g" * count)
    print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
    """
)


@pytest.mark.parametrize("deadly", [False, True], ids=["all live", "the first is killed"])
@pytest.mark.parametrize("where", ["directory", "server"])
def test_eight_processes_compute_one_prefix_once(
    tmp_path: Path, where: str, deadly: bool, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "kept")
    if where == "server":
        place = request.getfixturevalue("redis_shared").url + PATIENT
    prefills = tmp_path / "prefills"
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(HERE), place, str(prefills), "8", "deadly" if deadly else ""],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == f"{[-9, *[0] * 7] if deadly else [0] * 8}\n", done.stderr
    lines = prefills.read_text().splitlines()
    assert len(lines) == 1, (lines, done.stderr)
    assert lines[0].endswith(" True 0"), "by the one that had the claim, from the first token on"


def test_without_waiting_all_compute(tmp_path: Path) -> None:
    """The control: the same askers, none of whom waits."""
    program = WORKER.replace("wait=60", "wait=0")
    prefills = tmp_path / "prefills"
    subprocess.run(
        [sys.executable, "-c", program, str(HERE), str(tmp_path / "kept"), str(prefills), "4", ""],
        capture_output=True, check=True,
    )  # fmt: skip
    assert len(prefills.read_text().splitlines()) == 4


def test_a_ledger_in_memory_serves_too() -> None:
    index = MemoryIndex()
    one, two = Flight([ServerLocks(index)]), Flight([ServerLocks(index)])
    claim = one.take(NAME)
    assert claim is not None
    assert two.take(NAME) is None
    one.release(claim)
    assert two.take(NAME) is not None
