"""What every index of values has to hold: subclass :class:`IndexSuite` as ``TestMine`` and override
:meth:`IndexSuite.make`. Needs the extra ``test``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvkeep.values.index import Index, Item

BRIEF = 0.2
"""A life, in seconds, of which a test sees the beginning and the end."""


def name(number: int) -> bytes:
    return hashlib.sha256(b"index suite %d" % number).digest()


def group(number: int) -> bytes:
    return hashlib.sha256(b"group %d" % number).digest()


class IndexSuite:
    """Subclass and override :meth:`make`."""

    patience: float = 0.0
    """Seconds that an entry may outlive its life: 0 where the medium's clock is exact."""

    def make(self, path: Path) -> Index:
        """An index on ``path``, an empty folder or one that another index of this kind uses at the same time."""
        raise NotImplementedError

    shared: bool = True
    """Do two indexes on one path see the same entries?"""

    @pytest.fixture
    def index(self, tmp_path: Path) -> Iterator[Index]:
        index = self.make(tmp_path)
        yield index
        index.close()

    @pytest.fixture
    def other(self, index: Index, tmp_path: Path) -> Iterator[Index]:
        """Another process's, if they are shared."""
        other = self.make(tmp_path) if self.shared else index
        yield other
        if self.shared:
            other.close()

    def body(self, index: Index, number: int) -> bytes | None:
        (found,) = index.get_many([name(number)])
        return None if found is None else found.body

    def test_missing_is_none(self, index: Index) -> None:
        assert index.get_many([name(1), name(2)]) == [None, None]
        assert index.get_many([]) == []
        assert index.delete(name(1)) == (False, [])
        assert not index.contains_any([name(1)])
        assert index.members(group(1)) == []

    def test_what_is_set_is_got_and_replaced(self, index: Index, other: Index) -> None:
        bodies = [b"", b"x", bytes(range(256)) * 5]
        assert index.set_many([Item(name(at), body) for at, body in enumerate(bodies)]) == []
        assert [self.body(other, at) for at in range(3)] == bodies
        assert all(found is not None and found.left is None for found in other.get_many([name(at) for at in range(3)]))
        other.set_many([Item(name(1), b"new")])
        assert self.body(index, 1) == b"new"
        assert index.contains_any([name(7), name(1)])

    def test_many_at_once(self, index: Index, other: Index) -> None:
        items = [Item(name(number), b"%d" % number) for number in range(1200)]
        index.set_many(items)
        found = other.get_many([item.name for item in items])
        assert [one and one.body for one in found] == [item.body for item in items]

    def test_a_life_ends_by_itself(self, index: Index, other: Index) -> None:
        index.set_many([Item(name(1), b"brief", BRIEF), Item(name(2), b"long", 100.0)])
        brief, long = other.get_many([name(1), name(2)])
        assert brief is not None
        assert brief.left is not None
        assert 0 < brief.left <= BRIEF
        assert long is not None
        assert long.left is not None
        assert 90 < long.left <= 100
        time.sleep(BRIEF + self.patience + 0.01)
        assert self.body(other, 1) is None
        assert self.body(other, 2) == b"long"
        assert index.delete(name(1)) == (False, [])
        assert index.add(name(1), b"again", None)

    def test_a_new_entry_has_a_new_life(self, index: Index) -> None:
        index.set_many([Item(name(1), b"brief", BRIEF)])
        index.set_many([Item(name(1), b"for ever")])
        index.set_many([Item(name(2), b"for ever")])
        index.set_many([Item(name(2), b"brief", BRIEF)])
        time.sleep(BRIEF + self.patience + 0.01)
        assert self.body(index, 1) == b"for ever"
        assert self.body(index, 2) is None

    def test_deletion(self, index: Index, other: Index) -> None:
        index.set_many([Item(name(1), b"one"), Item(name(2), b"two")])
        assert other.delete(name(1)) == (True, [])
        assert self.body(index, 1) is None
        assert self.body(index, 2) == b"two"

    def test_groups(self, index: Index, other: Index) -> None:
        index.set_many([Item(name(at), b"same", None, group(1), 10) for at in range(3)])
        assert sorted(other.members(group(1))) == sorted(name(at) for at in range(3))
        assert other.delete(name(0)) == (True, [])
        assert other.set_many([Item(name(1), b"else", None, group(2))]) == []
        assert other.set_many([Item(name(1), b"else", None, group(2))]) == [], "set again, nothing was left"
        assert index.members(group(1)) == [name(2)]
        assert index.set_many([Item(name(2), b"else", None, group(2))]) == [group(1)], "the last one has left"
        assert sorted(index.members(group(2))) == sorted([name(1), name(2)])
        assert index.delete(name(1)) == (True, [])
        assert index.delete(name(2)) == (True, [group(2)])

    def test_names_and_what_stands_under_them_is_replaced(self, index: Index, other: Index) -> None:
        index.set_many([Item(name(1), b"one", 100.0, group(1), 10), Item(name(2), b"two")])
        assert sorted(other.names()) == sorted([name(1), name(2)])
        assert not other.replace(name(1), b"two", b"new")
        assert not other.replace(name(3), b"", b"new")
        assert other.replace(name(1), b"one", b"a new body")
        one, two, three = index.get_many([name(1), name(2), name(3)])
        assert one is not None
        assert one.body == b"a new body"
        assert one.left is not None, "the life stays"
        assert 90 < one.left <= 100
        assert two is not None
        assert two.left is None
        assert three is None
        assert other.replace(name(2), b"two", b"")
        assert self.body(index, 2) == b""
        index.tidy()
        assert index.members(group(1)) == [name(1)]
        assert index.delete(name(1)) == (True, [group(1)]), "so does the group"

    def test_add(self, index: Index, other: Index) -> None:
        assert index.add(name(1), b"mine", 100.0)
        assert not other.add(name(1), b"yours", 100.0)
        assert self.body(other, 1) == b"mine"
        assert index.add(name(2), b"brief", BRIEF)
        time.sleep(BRIEF + self.patience + 0.01)
        assert other.add(name(2), b"next", None)
        assert self.body(index, 2) == b"next"

    def test_compare_and_renew_or_release(self, index: Index, other: Index) -> None:
        life = BRIEF
        while True:
            begin = time.monotonic()
            index.add(name(1), b"mine", life)
            assert not other.renew(name(1), b"yours", 100.0)
            renewed = index.renew(name(1), b"mine", 100.0)
            if renewed or time.monotonic() - begin < life:
                break
            life *= 5  # a busy machine took longer than the entry lived: once more, from the start
        assert renewed
        time.sleep(life + self.patience + 0.01)
        assert self.body(other, 1) == b"mine"
        assert not other.release(name(1), b"yours")
        assert self.body(index, 1) == b"mine"
        assert index.release(name(1), b"mine")
        assert self.body(other, 1) is None
        assert not index.release(name(1), b"mine")
        assert not index.renew(name(1), b"mine", 100.0)

    def test_one_of_many_adds(self, index: Index, other: Index) -> None:
        for number in range(5):
            contested = name(number)

            def add(at: int, contested: bytes = contested) -> bool:
                return (index, other)[at % 2].add(contested, b"%d" % at, None)

            won = _together(add)
            assert won.count(True) == 1
            assert self.body(index, number) == b"%d" % won.index(True)

    def test_two_writers_never_mix(self, index: Index, other: Index) -> None:
        """Body and group are of the same writer, always."""
        failures: list[object] = []

        def write(at: int) -> bool:
            for turn in range(20):
                body = b"%d " % at * 200
                (index, other)[at % 2].set_many([Item(name(1), body, None, group(at)), Item(name(2), body)])
                if turn % 4 == 0:
                    (found,) = (index, other)[at % 2].get_many([name(1)])
                    if found is None or len(set(found.body.split())) != 1:
                        failures.append(found)
            return True

        _together(write)
        assert failures == []
        (found,) = index.get_many([name(1)])
        assert found is not None
        assert name(1) in index.members(group(int(found.body.split()[0])))

    def test_ping_and_maintain(self, index: Index) -> None:
        index.ping()
        index.ping_writes()
        index.set_many([Item(name(1), b"brief", BRIEF, group(1), 5), Item(name(2), b"long", None, group(2), 7)])
        time.sleep(BRIEF + self.patience + 0.01)
        assert index.maintain() in ([], [group(1)])
        assert self.body(index, 2) == b"long"
        usage = index.usage()
        assert usage is None or usage == (1, 7, 1, 7)


def _together(work: Callable[[int], bool], threads: int = 4) -> list[bool]:
    """``work(0)`` … at the same time."""
    start = threading.Barrier(threads)

    def run(at: int) -> bool:
        start.wait()
        return work(at)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))
