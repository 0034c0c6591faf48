"""What every store has to hold.

Subclass one suite in a test module as ``TestMine`` and override :meth:`StoreSuite.make`; pytest runs the rest:
:class:`StoreSuite` for a medium that bounds itself, :class:`BoundedStoreSuite` for one with a ``capacity``, either
together with :class:`PersistentSuite` where what was stored outlives the store. Needs the extra ``test``.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvkeep.buffers import Buffer
from kvkeep.errors import ConfigError, StoreError, StoreFullError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Store


def key(number: int) -> BlockKey:
    """A block key made from a number."""
    return BlockKey(hashlib.sha256(b"store suite %d" % number).digest())


def value(number: int, nbytes: int = 4096) -> bytes:
    """Bytes that belong to a number, different for each."""
    return hashlib.shake_128(b"value %d" % number).digest(nbytes)


def read(store: Store, block: BlockKey) -> bytes | None:
    """What ``get`` says, as bytes."""
    found = store.get(block)
    return None if found is None else bytes(found)


class StoreSuite:
    """Subclass and override :meth:`make`."""

    capacity: ClassVar[int | None] = None
    """Handed to :meth:`make`. A bounded store needs room for at least 16 values of ``value_nbytes``."""

    value_nbytes: ClassVar[int] = 4096

    keeps: ClassVar[bool] = True
    """Does a value stay until it is deleted? A server that evicts by itself says False."""

    examples: ClassVar[int] = 40
    """Runs of the state machine: lower it for a slow medium."""

    def make(self, path: Path, capacity: int | None) -> Store:
        """A new store on ``path``, an empty folder or one that an earlier, closed store has used."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make(tmp_path, self.capacity)
        yield store
        store.close()

    def expect(self, found: object, expected: object) -> None:
        """Equal, or missing where the medium may evict by itself."""
        if found is None and not self.keeps:
            return
        assert found == expected

    def test_missing_is_none(self, store: Store) -> None:
        assert store.get(key(1)) is None
        assert store.get_into(key(1), memoryview(bytearray(10))) is None
        assert store.get_many([key(1), key(2)]) == [None, None]
        assert not store.contains(key(1))
        assert store.contains_many([key(1), key(2)]) == [False, False]
        assert store.contains_many([]) == []
        assert list(store.items()) == []
        with store.read([key(1)]) as values:
            assert values == [None]
        assert not store.delete(key(1))

    def test_what_is_put_is_got(self, store: Store) -> None:
        for number in range(8):
            store.put(key(number), [value(number, 100 + 37 * number)])
        for number in range(8):
            self.expect(read(store, key(number)), value(number, 100 + 37 * number))
            assert store.contains(key(number)) or not self.keeps
        assert store.get(key(8)) is None

    def test_parts_are_joined(self, store: Store) -> None:
        array = np.arange(24, dtype="<u4").reshape(4, 6)
        parts: list[Buffer] = [b"head", bytearray(b"er"), b"", memoryview(b"abcdef")[1:3], array.data]
        store.put(key(1), parts)
        self.expect(read(store, key(1)), b"headerbc" + array.tobytes())

    def test_the_first_write_wins(self, store: Store) -> None:
        store.put(key(1), [b"first"])
        store.put(key(1), [b"second, and longer"])
        self.expect(read(store, key(1)), b"first")
        assert store.put_many([(key(1), [b"third"]), (key(2), [b"new"])]) == 2
        self.expect(read(store, key(1)), b"first")
        self.expect(read(store, key(2)), b"new")
        assert dict(store.items()) == {key(1): 5, key(2): 3} or not self.keeps

    def test_the_callers_buffer_is_not_kept(self, store: Store) -> None:
        buffer = bytearray(value(1, self.value_nbytes))
        store.put(key(1), [buffer])
        store.put_many([(key(2), [memoryview(buffer)])])
        buffer[:] = bytes(len(buffer))  # would raise BufferError too if a view were kept and buffer resized
        self.expect(read(store, key(1)), value(1, self.value_nbytes))
        self.expect(read(store, key(2)), value(1, self.value_nbytes))

    def test_a_value_got_is_memory_of_its_own(self, store: Store) -> None:
        store.put(key(1), [value(1)])
        found = store.get(key(1))
        store.delete(key(1))
        for number in range(2, 6):
            store.put(key(number), [value(number)])
        self.expect(None if found is None else bytes(found), value(1))

    def test_deletion(self, store: Store) -> None:
        store.put(key(1), [b"one"])
        store.put(key(2), [b"two"])
        assert store.delete(key(1)) or not self.keeps
        assert not store.delete(key(1))
        assert store.get(key(1)) is None
        assert not store.contains(key(1))
        self.expect(read(store, key(2)), b"two")
        store.put(key(1), [b"again"])
        self.expect(read(store, key(1)), b"again")

    def test_replacing(self, store: Store) -> None:
        store.put(key(1), [b"one"])
        assert store.replace(key(1), [b"in another", b" form"]) or not self.keeps
        self.expect(read(store, key(1)), b"in another form")
        assert not store.replace(key(2), [b"two"])
        assert not store.contains(key(2))

    def test_items_are_a_snapshot(self, store: Store) -> None:
        for number in range(6):
            store.put(key(number), [value(number, 10 + number)])
        seen = []
        for block, nbytes in store.items():
            seen.append((block, nbytes))
            store.delete(block)
            store.put(key(100 + len(seen)), [b"new"])
        assert set(seen) == {(key(number), 10 + number) for number in range(6)} or not self.keeps

    def test_get_into(self, store: Store) -> None:
        store.put(key(1), [value(1, 1000)])
        out = bytearray(b"\xee" * 1200)
        nbytes = store.get_into(key(1), memoryview(out))
        if nbytes is not None or self.keeps:
            assert nbytes == 1000
            assert out[:1000] == value(1, 1000)
            assert out[1000:] == b"\xee" * 200
        exact = bytearray(1000)
        self.expect(store.get_into(key(1), memoryview(exact)), 1000)

    def test_get_into_too_small_a_buffer_writes_nothing(self, store: Store) -> None:
        store.put(key(1), [value(1, 1000)])
        out = bytearray(b"\xee" * 999)
        if store.contains(key(1)) or self.keeps:
            with pytest.raises(ValueError):  # noqa: PT011  # the message is the medium's
                store.get_into(key(1), memoryview(out))
        assert out == b"\xee" * 999

    def test_many_at_once_keep_the_order_asked_for(self, store: Store) -> None:
        for number in (1, 2, 3):
            store.put(key(number), [value(number, 50)])
        asked = [key(number) for number in (3, 9, 1, 1, 2)]
        expected = [value(3, 50), None, value(1, 50), value(1, 50), value(2, 50)]
        for found, right in zip(store.get_many(asked), expected, strict=True):
            self.expect(None if found is None else bytes(found), right)
        with store.read(asked) as views:
            for view, right in zip(views, expected, strict=True):
                self.expect(None if view is None else bytes(view), right)
        for there, right in zip(store.contains_many(asked), expected, strict=True):
            assert there == (right is not None) or not self.keeps

    def test_views_are_flat_bytes(self, store: Store) -> None:
        store.put(key(1), [np.arange(10, dtype="<f8").data])
        with store.read([key(1)]) as (view,):
            if view is not None or self.keeps:
                assert isinstance(view, memoryview)
                assert (view.format, view.ndim, view.nbytes) == ("B", 1, 80)

    def test_a_failure_inside_read_leaves_the_store_usable(self, store: Store) -> None:
        store.put(key(1), [b"one"])
        with pytest.raises(ZeroDivisionError), store.read([key(1)]):
            raise ZeroDivisionError
        assert store.delete(key(1)) or not self.keeps
        store.put(key(1), [b"new"])
        self.expect(read(store, key(1)), b"new")

    def test_hints_and_housekeeping_change_nothing(self, store: Store) -> None:
        store.put(key(1), [b"one"])
        store.prefetch([key(1), key(2)])
        store.maintain()
        self.expect(read(store, key(1)), b"one")
        assert not store.contains(key(2))

    def test_an_owner_is_told_what_is_there(self, store: Store) -> None:
        for number in range(5):
            store.put(key(number), [value(number, 100)])
        owner = _Owner()
        store.attach(owner)
        assert owner.keys == {key(number): 100 for number in range(5)} or not self.keeps

    def test_a_closed_store_says_so(self, store: Store) -> None:
        store.put(key(1), [b"one"])
        store.close()
        with pytest.raises(StoreError):
            store.get(key(1))
        with pytest.raises(StoreError):
            store.put(key(2), [b"two"])
        store.close()  # again: nothing happens

    def test_threads(self, store: Store) -> None:
        """Eight threads on sixteen keys: a read finds nothing or the right bytes, whatever the others do."""
        blocks = [key(number) for number in range(16)]
        values = [value(number, self.value_nbytes) for number in range(16)]
        failures: list[str] = []

        def work(seed: int) -> None:
            out = memoryview(bytearray(self.value_nbytes))
            for step in range(150):
                number = (seed * 7 + step * 5 + step * step) % 16
                block, right = blocks[number], values[number]
                match (seed + step) % 5:
                    case 0 | 1:
                        try:
                            store.put(block, [right[:100], right[100:]])
                        except StoreFullError:
                            store.delete(blocks[(number + 1) % 16])
                    case 2:
                        if store.get_into(block, out) not in (None, len(right)):
                            failures.append("a wrong length")
                        with store.read([block, blocks[0]]) as views:
                            for view, expected in zip(views, (right, values[0]), strict=True):
                                if view is not None and view != expected:
                                    failures.append("a view of wrong bytes")
                    case 3:
                        found = store.get(block)
                        if found is not None and bytes(found) != right:
                            failures.append("wrong bytes")
                    case 4:
                        store.delete(block)
                        if any(nbytes != self.value_nbytes for _, nbytes in store.items()):
                            failures.append("a wrong size")

        def guarded(seed: int) -> None:
            try:
                work(seed)
            except BaseException as error:
                failures.append(repr(error))
                raise

        threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_a_large_value_asked_for_several_times_at_once(self, tmp_path: Path) -> None:
        store = self.make(tmp_path, self.capacity)
        nbytes = LARGEST * max(1, (store.capacity or 0) // (4 * LARGEST)) // 2
        store.put(key(1), [value(1, nbytes)])
        with store.read([key(1)] * 5) as found:
            got = [None if one is None else bytes(one) for one in found]
        assert got == [value(1, nbytes)] * 5
        store.close()

    def test_against_a_dict(self, tmp_path: Path) -> None:
        folders = itertools.count()

        def machine() -> RuleBasedStateMachine:
            folder = tmp_path / str(next(folders))
            folder.mkdir()
            return StoreMachine(self.make(folder, self.capacity), self.keeps)

        run_state_machine_as_test(
            machine,  # type: ignore[arg-type]  # typed as a class, documented as a factory
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=30,
                derandomize=True,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
            ),
        )


class BoundedStoreSuite(StoreSuite):
    """For a store with a ``capacity``, which the owner frees by deleting."""

    capacity: ClassVar[int | None] = 1 << 20

    def occupied_nbytes(self, store: Store, path: Path) -> int:
        """What the store takes from its medium: here, the blocks of the files under ``path``."""
        return sum(entry.stat().st_blocks * 512 for entry in path.rglob("*") if entry.is_file())

    def fill(self, store: Store, first: int = 0) -> int:
        """Put values until there is no room; the number after the last one that was stored."""
        for number in itertools.count(first):
            try:
                store.put(key(number), [value(number, self.value_nbytes)])
            except StoreFullError:
                return number
            assert number * self.value_nbytes <= self.room, "more was stored than fits"
        raise AssertionError

    @property
    def room(self) -> int:
        assert self.capacity is not None
        return self.capacity

    def check(self, store: Store, path: Path) -> None:
        assert sum(nbytes for _, nbytes in store.items()) <= self.room
        assert self.occupied_nbytes(store, path) <= self.room

    def test_capacity_is_known(self, store: Store) -> None:
        assert store.capacity is not None
        assert store.capacity <= self.room

    def test_a_full_store_says_so_and_keeps_what_it_has(self, store: Store, tmp_path: Path) -> None:
        stored = self.fill(store)
        assert stored >= 16
        self.check(store, tmp_path)
        with pytest.raises(StoreFullError):
            store.put(key(stored), [value(stored, self.value_nbytes)])
        assert not store.contains(key(stored))
        store.put(key(0), [b"there already: no room is needed"])
        for number in range(stored):
            assert read(store, key(number)) == value(number, self.value_nbytes)

    def test_deleting_makes_room(self, store: Store, tmp_path: Path) -> None:
        stored = self.fill(store)
        for number in range(0, stored, 3):
            assert store.delete(key(number))
            store.put(key(1000 + number), [value(1000 + number, self.value_nbytes)])
        self.check(store, tmp_path)
        for number in range(stored):
            expected = None if number % 3 == 0 else value(number, self.value_nbytes)
            assert read(store, key(number)) == expected
            if expected is None:
                assert read(store, key(1000 + number)) == value(1000 + number, self.value_nbytes)

    def test_capacity_holds_under_churn(self, store: Store, tmp_path: Path) -> None:
        """Values of many sizes, the oldest deleted to make room, for several times the capacity."""
        sizes = [self.value_nbytes * step // 4 + 11 for step in (1, 2, 3, 4, 5, 7)]
        resident: list[tuple[int, int]] = []
        written, number = 0, 0
        while written < 3 * self.room:
            nbytes = sizes[number % len(sizes)]
            try:
                store.put(key(number), [value(number, nbytes)])
            except StoreFullError:
                oldest, size = resident.pop(0)
                assert read(store, key(oldest)) == value(oldest, size)
                assert store.delete(key(oldest))
                self.check(store, tmp_path)
                continue
            resident.append((number, nbytes))
            written += nbytes
            number += 1
        assert dict(store.items()) == {key(n): nbytes for n, nbytes in resident}

    def test_put_many_stores_from_the_front(self, store: Store, tmp_path: Path) -> None:
        count = self.room // self.value_nbytes + 5
        done = store.put_many([(key(n), [value(n, self.value_nbytes)]) for n in range(count)])
        assert 16 <= done < count
        assert store.contains_many([key(n) for n in range(count)]) == [n < done for n in range(count)]
        assert read(store, key(done - 1)) == value(done - 1, self.value_nbytes)
        self.check(store, tmp_path)

    def test_a_value_that_never_fits(self, store: Store) -> None:
        with pytest.raises(ValueTooLargeError):
            store.put(key(1), [bytes(self.room + 1)])
        assert not store.contains(key(1))
        assert list(store.items()) == []
        store.put(key(1), [b"small"])
        assert read(store, key(1)) == b"small"

    def test_a_store_of_no_capacity_stores_nothing_or_is_refused(self, tmp_path: Path) -> None:
        try:
            store = self.make(tmp_path, 0)
        except ConfigError:
            return
        with pytest.raises(StoreError):
            store.put(key(1), [b"one"])
        assert store.get(key(1)) is None
        assert list(store.items()) == []
        store.close()


class PersistentSuite:
    """Together with one of the above: what was stored outlives the store."""

    capacity: ClassVar[int | None]
    value_nbytes: ClassVar[int]

    def make(self, path: Path, capacity: int | None) -> Store:
        raise NotImplementedError

    def test_a_new_store_finds_what_was_stored(self, tmp_path: Path) -> None:
        first = self.make(tmp_path, self.capacity)
        for number in range(10):
            first.put(key(number), [value(number, self.value_nbytes - number)])
        first.delete(key(3))
        first.close()
        second = self.make(tmp_path, self.capacity)
        for number in range(10):
            expected = None if number == 3 else value(number, self.value_nbytes - number)
            assert read(second, key(number)) == expected
            assert second.contains(key(number)) == (expected is not None)
        assert dict(second.items()) == {key(n): self.value_nbytes - n for n in range(10) if n != 3}
        owner = _Owner()
        second.attach(owner)
        assert owner.keys.keys() == {key(n) for n in range(10) if n != 3}
        second.put(key(3), [b"again"])
        assert second.delete(key(4))
        second.close()
        third = self.make(tmp_path, self.capacity)
        assert read(third, key(3)) == b"again"
        assert not third.contains(key(4))
        third.close()

    def test_capacity_holds_across_restarts(self, tmp_path: Path) -> None:
        """The budget is the directory's: what an earlier store left counts."""
        assert self.capacity is not None
        number = 0
        for _ in range(4):
            store = self.make(tmp_path, self.capacity)
            try:
                while True:
                    store.put(key(number), [value(number, self.value_nbytes)])
                    number += 1
            except StoreFullError:
                pass
            assert sum(nbytes for _, nbytes in store.items()) <= self.capacity
            store.close()
            taken = sum(entry.stat().st_blocks * 512 for entry in tmp_path.rglob("*") if entry.is_file())
            assert taken <= self.capacity


class _Owner:
    """Remembers what it answers for."""

    def __init__(self) -> None:
        self.keys: dict[BlockKey, int] = {}

    def gained(self, items: Sequence[tuple[BlockKey, int]]) -> None:
        self.keys.update(items)

    def lost(self, keys: Sequence[BlockKey]) -> None:
        for block in keys:
            self.keys.pop(block, None)


LARGEST = 9000
"""Bytes of the machine's largest value, before it is scaled to the store's capacity."""

_numbers = st.integers(0, 19)
_sizes = st.integers(1, LARGEST) | st.sampled_from([LARGEST // 2, LARGEST])


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls, compared with a dict."""

    def __init__(self, store: Store, keeps: bool) -> None:
        super().__init__()
        self.store = store
        self.keeps = keeps
        self.scale = max(1, (store.capacity or 0) // (4 * LARGEST))  # a few keys fill a bounded store
        self.model: dict[BlockKey, bytes] = {}

    def agree(self, block: BlockKey, found: bytes | None) -> None:
        if found is None and not self.keeps:
            self.model.pop(block, None)
        assert found == self.model.get(block)

    @rule(number=_numbers, variant=st.integers(0, 2), nbytes=_sizes, cut=st.floats(0, 1))
    def put(self, number: int, variant: int, nbytes: int, cut: float) -> None:
        nbytes *= self.scale
        data = value(10 * number + variant, nbytes)
        at = int(cut * nbytes)
        if not self.keeps:
            self.agree(key(number), read(self.store, key(number)))
        try:
            self.store.put(key(number), [data[:at], memoryview(data)[at:]])
        except StoreFullError:
            assert self.store.capacity is not None
            assert key(number) not in self.model
            return
        self.model.setdefault(key(number), data)

    @rule(numbers=st.lists(_numbers, min_size=1, max_size=8), nbytes=_sizes)
    def put_many(self, numbers: list[int], nbytes: int) -> None:
        items = [(key(number), [value(10 * number, nbytes * self.scale)]) for number in numbers]
        if not self.keeps:
            for block, _ in items:
                self.agree(block, read(self.store, block))
        done = self.store.put_many(items)
        assert done == len(items) or self.store.capacity is not None
        for block, parts in items[:done]:
            self.model.setdefault(block, parts[0])

    @rule(number=_numbers)
    def get(self, number: int) -> None:
        self.agree(key(number), read(self.store, key(number)))

    @rule(number=_numbers, room=_sizes)
    def get_into(self, number: int, room: int) -> None:
        room *= self.scale
        out = bytearray(room)
        expected = self.model.get(key(number))
        if expected is not None and len(expected) > room and self.keeps:
            with pytest.raises(ValueError):  # noqa: PT011  # the message is the medium's
                self.store.get_into(key(number), memoryview(out))
            return
        try:
            nbytes = self.store.get_into(key(number), memoryview(out))
        except ValueError:
            assert expected is not None
            assert len(expected) > room
            return
        self.agree(key(number), None if nbytes is None else bytes(out[:nbytes]))

    @rule(numbers=st.lists(_numbers, max_size=6))
    def read_many(self, numbers: list[int]) -> None:
        blocks = [key(number) for number in numbers]
        with self.store.read(blocks) as views:
            copies = [None if view is None else bytes(view) for view in views]
        for block, copy, there in zip(blocks, copies, self.store.contains_many(blocks), strict=True):
            self.agree(block, copy)
            assert there == (copy is not None) or not self.keeps

    @rule(number=_numbers)
    def delete(self, number: int) -> None:
        deleted = self.store.delete(key(number))
        known = self.model.pop(key(number), None) is not None
        assert deleted == known or not self.keeps
        assert not self.store.contains(key(number))

    @rule()
    def maintain(self) -> None:
        self.store.maintain()

    @invariant()
    def same_items(self) -> None:
        items = dict(self.store.items())
        sizes = {block: len(data) for block, data in self.model.items()}
        assert items == sizes if self.keeps else items.items() <= sizes.items()

    def teardown(self) -> None:
        self.store.close()
