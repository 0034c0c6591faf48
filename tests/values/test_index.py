"""Every index holds the suite; what is special about SQLite's."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvkeep.errors import StoreError
from kvkeep.stores.base import Store
from kvkeep.stores.memcached import MemcachedStore
from kvkeep.stores.redis import RedisStore
from kvkeep.stores.redis_cluster import slot_of
from kvkeep.testing.indexes import IndexSuite, group, name
from kvkeep.testing.servers import MemcachedServer, RedisCluster, RedisServer
from kvkeep.values.index import Index, Item, MemoryIndex
from kvkeep.values.memcached import MemcachedIndex
from kvkeep.values.redis import RedisIndex
from kvkeep.values.sqlite import FILE, SqliteIndex

PATIENT = "?lookup_timeout=20&save_timeout=20"
"""A busy machine is not what is tested here."""

_numbers = itertools.count()


class TestMemory(IndexSuite):
    shared = False

    def make(self, path: Path) -> Index:
        return MemoryIndex()


class TestSqlite(IndexSuite):
    def make(self, path: Path) -> Index:
        return SqliteIndex(path)


class ServerSuite(IndexSuite):
    """With stores that are closed after the test."""

    @pytest.fixture(autouse=True)
    def stores(self) -> Iterator[list[Store]]:
        self.opened: list[Store] = []
        yield self.opened
        for store in self.opened:
            store.close()


class TestRedis(ServerSuite):
    @pytest.fixture(autouse=True)
    def server(self, redis_shared: RedisServer) -> None:
        self.url = redis_shared.url + PATIENT

    def make(self, path: Path) -> Index:
        store = RedisStore.from_url(self.url)
        self.opened.append(store)
        return RedisIndex(store)


class TestCluster(TestRedis):
    @pytest.fixture(autouse=True)
    def server(self, cluster_shared: RedisCluster) -> None:
        self.url = cluster_shared.url + PATIENT


def test_entries_are_found_while_their_slots_move(cluster_shared: RedisCluster) -> None:
    source, target = cluster_shared.nodes[0], cluster_shared.nodes[1]
    with closing(RedisStore.from_url(cluster_shared.url + PATIENT + "&prefix=moving")) as store:
        index = RedisIndex(store)
        slots = {number: slot_of(b"moving:v:" + name(number).hex().encode()) for number in range(60)}
        chosen = [number for number, slot in slots.items() if slot < 16384 // 3][:6]
        index.set_many([Item(name(number), b"%d" % number, 100.0) for number in chosen])
        for number in chosen:
            for moving in (
                cluster_shared.move_slot(slots[number], *ends) for ends in ((source, target), (target, source))
            ):
                for _ in moving:
                    found = index.get_many([name(number), name(chosen[0]), name(99)])
                    assert [one and one.body for one in found] == [b"%d" % number, b"%d" % chosen[0], None]
                    assert found[0] is not None
                    assert found[0].left is not None
                    assert 50 < found[0].left <= 100


class TestMemcached(ServerSuite):
    @pytest.fixture(autouse=True)
    def server(self, memcached_shared: MemcachedServer) -> None:
        self.url = f"memcached://{memcached_shared.where}{PATIENT}&prefix=index{next(_numbers)}"

    def make(self, path: Path) -> Index:
        store = MemcachedStore.from_url(self.url)
        self.opened.append(store)
        return MemcachedIndex(store)


def test_memory_stays_in_its_room_and_forgets_what_was_not_asked_for() -> None:
    index = MemoryIndex(100_000)
    index.set_many([Item(name(0), b"asked for", None, group(0), 9)])
    for number in range(1, 2000):
        index.set_many([Item(name(number), b"x" * 100, None, group(number), 1)])
        index.get_many([name(0)])
    assert index._used <= 100_000
    assert index.get_many([name(0)])[0] is not None
    assert index.get_many([name(1)])[0] is None
    assert index.members(group(1)) == []


def test_the_file_stays_in_its_room_and_forgets_the_oldest(tmp_path: Path) -> None:
    index = SqliteIndex(tmp_path, capacity=256 << 10)
    for number in range(3000):
        index.set_many([Item(name(number), b"x" * 300)])
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if not path.name.endswith("-shm")) <= 256 << 10
    assert index.get_many([name(0)]) == [None]
    assert index.get_many([name(2999)])[0] is not None
    index.close()


def test_the_log_beside_the_file_stays_in_its_room_while_others_read(tmp_path: Path) -> None:
    """A reader's snapshot keeps SQLite from starting its log anew: so somebody has to wait for a moment without one."""
    capacity = 1 << 20
    index = SqliteIndex(tmp_path, capacity=capacity)
    index.set_many([Item(name(0), b"x")])
    done = threading.Event()

    def read(delay: float) -> None:
        time.sleep(delay)
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as database:
            while not done.is_set():
                database.execute("BEGIN")
                database.execute("SELECT count(*) FROM entries").fetchall()
                time.sleep(0.02)
                database.execute("COMMIT")

    readers = [threading.Thread(target=read, args=(delay,)) for delay in (0.0, 0.007, 0.014)]
    for reader in readers:
        reader.start()
    longest = 0
    for number in range(60):
        index.set_many([Item(name(number % 7), b"x" * 50_000)])
        longest = max(longest, (tmp_path / f"{FILE}-wal").stat().st_size)
    done.set()
    for reader in readers:
        reader.join()
    index.close()
    assert longest <= capacity // 2


def test_a_reader_that_stays_holds_up_one_write_not_all(tmp_path: Path) -> None:
    index = SqliteIndex(tmp_path, capacity=1 << 20)
    index.set_many([Item(name(0), b"x")])
    assert index._connection is not None
    said: list[str] = []
    index._connection.set_trace_callback(said.append)
    log = tmp_path / f"{FILE}-wal"
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchall()
        for number in range(40):
            index.set_many([Item(name(number % 7), b"x" * 50_000)])
        assert log.stat().st_size > 1 << 20
        assert sum("wal_checkpoint" in each for each in said) == 1
        reader.execute("COMMIT")
    index._cut_after = 0.0  # the time is over
    index.set_many([Item(name(1), b"x" * 50_000)])
    assert log.stat().st_size <= 1 << 18
    index.close()


def test_entries_outlive_the_process_and_others_see_them(tmp_path: Path) -> None:
    index = SqliteIndex(tmp_path)
    index.set_many([Item(name(1), b"one")])
    program = (
        "import sys; from pathlib import Path; from kvkeep.values.sqlite import SqliteIndex\n"
        "from kvkeep.values.index import Item; i = SqliteIndex(Path(sys.argv[1])); n = bytes.fromhex(sys.argv[2])\n"
        "print(i.get_many([n])[0].body); i.set_many([Item(n, b'two')]); i.close()"
    )
    command = [sys.executable, "-c", program, str(tmp_path), name(1).hex()]
    assert subprocess.run(command, capture_output=True, check=True).stdout.strip() == b"b'one'"
    found = index.get_many([name(1)])[0]
    assert found is not None
    assert found.body == b"two"
    index.close()


def test_a_clock_that_is_set_back_ends_lives_instead_of_prolonging_them(tmp_path: Path) -> None:
    now = 1000.0
    index = SqliteIndex(tmp_path, clock=lambda: now)
    index.set_many([Item(name(1), b"price", 1.0)])
    now = 500.0
    assert index.get_many([name(1)]) == [None]
    assert index.add(name(1), b"new price", 1.0)
    index.close()


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    index = SqliteIndex(tmp_path)
    index.set_many([Item(name(number), b"x" * 500) for number in range(100)])
    index.close()
    file = tmp_path / FILE
    content = file.read_bytes()
    file.write_bytes(os.urandom(len(content)) if damage == "garbage" else content[: len(content) // 2])
    index = SqliteIndex(tmp_path)
    names = [name(number) for number in range(100)]
    with pytest.raises(StoreError):
        index.get_many(names)
    assert index.get_many(names) == [None] * 100
    index.set_many([Item(name(1), b"again")])
    assert index.get_many([name(1)])[0] is not None
    index.close()


def test_a_damaged_schema_is_made_anew(tmp_path: Path) -> None:
    """Its texts need not be text any more, nor its columns those that are asked for."""
    made = SqliteIndex(tmp_path)
    made.set_many([Item(name(at), b"body", 1000.0, group(1), 4) for at in range(200)])
    made.tidy()
    made.close()
    file = tmp_path / FILE
    whole = file.read_bytes()
    for seed in range(150):
        random_bytes = random.Random(seed)
        content = bytearray(whole)
        for _ in range(random_bytes.choice([1, 3, 20, 200])):
            content[random_bytes.randrange(4096)] = random_bytes.randrange(256)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        file.write_bytes(content)
        index = SqliteIndex(tmp_path)
        works = False
        for _ in range(4):
            try:
                index.get_many([name(1)])
                index.set_many([Item(name(1), b"new", 5.0, group(2), 3)])
                assert all(type(each) is bytes for each in [*index.members(group(1)), *index.names()])
                works = True
                break
            except StoreError:
                continue
        assert works, seed
        index.close()


def test_a_hostile_file_runs_nothing_and_gives_nothing(tmp_path: Path) -> None:
    """Another schema under the same names, with a trigger and values of other types."""
    database = sqlite3.connect(tmp_path / FILE)
    database.executescript(
        "CREATE TABLE entries (name, body, born, until, grp, nbytes);"
        "CREATE TABLE traces (x);"
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN INSERT INTO traces VALUES (load_extension('evil')); END;"
    )
    database.execute("INSERT INTO traces VALUES (1)")
    database.execute("DROP TRIGGER t")
    database.execute("INSERT INTO entries VALUES (?, 'a text', 0, 'soon', 3, 4)", (name(1),))
    database.executescript(
        "CREATE TRIGGER t AFTER INSERT ON entries BEGIN INSERT INTO traces VALUES (load_extension('evil')); END;"
    )
    database.commit()
    database.close()
    index = SqliteIndex(tmp_path)
    assert index.get_many([name(1)]) == [None]
    with pytest.raises(StoreError):
        index.set_many([Item(name(2), b"body")])
    index.close()


def test_a_forked_child_has_a_connection_of_its_own(tmp_path: Path) -> None:
    index = SqliteIndex(tmp_path)
    index.set_many([Item(name(1), b"one")])
    child = os.fork()
    if not child:
        index.after_fork()
        index.set_many([Item(name(2), b"two")])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert index.get_many([name(2)])[0] is not None
    index.set_many([Item(name(3), b"three")])
    index.close()
