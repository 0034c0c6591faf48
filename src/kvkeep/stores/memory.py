"""Memory: one arena, so that a value lands on pages that have been touched.

``read`` hands out views into the arena. A value that is deleted while somebody reads it keeps its place until the
last reader is done, so a view never changes under its reader.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress

from kvkeep.buffers import Buffer, as_bytes, nbytes_of, populate
from kvkeep.errors import ConfigError, StoreError, StoreFullError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Item, Store
from kvkeep.stores.extents import Extents

UNIT = 512
"""Allocation unit: a multiple of 64, so that a frame's payload is aligned for vector loads."""

TOUCH_AHEAD_NBYTES = 256 << 20
TOUCH_NBYTES = 16 << 20
"""Bytes that are touched by one :meth:`MemoryStore.maintain`."""


class _Slot:
    __slots__ = ("deleted", "nbytes", "readers", "start")

    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self.readers = 0
        self.deleted = False


class _Lent:
    """What :meth:`MemoryStore.read` gives. A generator would do the same in twice the time, which a hit notices."""

    __slots__ = ("_keys", "_slots", "_store")

    def __init__(self, store: MemoryStore, keys: Sequence[BlockKey]) -> None:
        self._store, self._keys = store, keys
        self._slots: list[_Slot | None] = []

    def __enter__(self) -> list[memoryview | None]:
        self._slots = self._store._lend(self._keys)
        return [None if slot is None else self._store._view(slot) for slot in self._slots]

    def __exit__(self, *exc: object) -> None:
        self._store._take_back(self._slots)


class MemoryStore(Store):
    """``capacity`` bytes of private memory, reserved at once and touched a little ahead of their use; with ``prefault``
    all of them as soon as :meth:`maintain` can."""

    def __init__(self, capacity: int, *, prefault: bool = False) -> None:
        if capacity < 0:
            raise ConfigError(f"a memory store of {capacity} bytes: capacity is at least 0")
        self.capacity = capacity
        self._ahead = capacity if prefault else TOUCH_AHEAD_NBYTES
        self._open(capacity)

    def _open(self, capacity: int) -> None:
        self._region = mmap.mmap(-1, max(capacity, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # huge pages are a hint: a kernel without them says EINVAL
            self._region.madvise(mmap.MADV_HUGEPAGE)
        self._arena = memoryview(self._region)[:capacity]
        self._room = Extents(capacity // UNIT)
        self._slots: dict[BlockKey, _Slot] = {}
        self._lock = threading.Lock()
        self._used = 0  # end of the highest slot so far
        self._touched = 0  # end of the pages that have been touched ahead
        self._closed = False

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        if self.put_many([(key, parts)]) == 0:
            raise StoreFullError("no room in memory")

    def put_many(self, items: Sequence[Item]) -> int:
        for done, (key, parts) in enumerate(items):
            nbytes = nbytes_of(list(parts))
            units = max(1, -(-nbytes // UNIT))
            if units > self._room.units:
                if done:
                    return done
                raise ValueTooLargeError(f"{nbytes} bytes do not fit into a memory store of {self.capacity}")
            # The copy is made under the lock: a put is whole or absent for every other thread, and takes microseconds.
            with self._lock:
                self._check_open()
                if key in self._slots:
                    continue
                unit = self._room.allocate(units)
                if unit is None:
                    return done
                at = unit * UNIT
                slot = _Slot(at, nbytes)
                for part in parts:
                    view = as_bytes(part)
                    self._arena[at : at + len(view)] = view
                    at += len(view)
                self._slots[key] = slot
                self._used = max(self._used, at)
        return len(items)

    def get(self, key: BlockKey) -> Buffer | None:
        with self.read([key]) as (value,):
            return None if value is None else bytes(value)

    def read(self, keys: Sequence[BlockKey]) -> AbstractContextManager[list[memoryview | None]]:
        return _Lent(self, keys)

    def _lend(self, keys: Sequence[BlockKey]) -> list[_Slot | None]:
        """The slots of ``keys``, which stay what they are until they are given to :meth:`_take_back`."""
        with self._lock:
            self._check_open()
            slots = [self._slots.get(key) for key in keys]
            for slot in slots:
                if slot is not None:
                    slot.readers += 1
            return slots

    def _view(self, slot: _Slot) -> memoryview:
        return self._arena[slot.start : slot.start + slot.nbytes].toreadonly()

    def _take_back(self, slots: Sequence[_Slot | None]) -> None:
        with self._lock:
            for slot in slots:
                if slot is not None:
                    slot.readers -= 1
                    if slot.deleted and not slot.readers:
                        self._give_back(slot)

    def contains(self, key: BlockKey) -> bool:
        return key in self._slots

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        slots = self._slots
        return [key in slots for key in keys]

    def delete(self, key: BlockKey) -> bool:
        with self._lock:
            slot = self._slots.pop(key, None)
            if slot is None:
                return False
            slot.deleted = True
            if not slot.readers:
                self._give_back(slot)
            return True

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        with self._lock:
            return iter([(key, slot.nbytes) for key, slot in self._slots.items()])

    def maintain(self) -> bool:
        """Touch pages ahead of their use: fresh ones would cost a save ten times the copy."""
        goal = min(self._used + self._ahead, self.capacity or 0)
        nbytes = min(TOUCH_NBYTES, goal - self._touched)
        if nbytes <= 0 or self._closed or not populate(self._region, self._touched, nbytes):
            return False
        self._touched += nbytes
        return self._touched < goal

    def after_fork(self) -> None:
        self._open(self.capacity or 0)

    def close(self) -> None:
        """Forget everything. Views that are still being read stay valid: they keep the arena alive."""
        with self._lock:
            self._closed = True
            self._slots.clear()

    def _give_back(self, slot: _Slot) -> None:
        self._room.free(slot.start // UNIT, max(1, -(-slot.nbytes // UNIT)))

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("this memory store is closed")
