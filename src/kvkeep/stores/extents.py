"""Room inside a fixed span: who has which units. Shared by the memory arena and the disk's slabs.

Best fit over free extents that are merged as they touch. Values here are mostly of one size, so a hole that an
eviction leaves fits the next value, and a fresh span fills front to back: neighbours in a save lie together.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class Extents:
    """Allocator over ``units`` equal units, numbered from 0. Not thread-safe.

    Holds: free + allocated == units (``free_units`` is kept, not computed). Cost: O(log distinct sizes) a call.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self.free_units = 0
        self._length: dict[int, int] = {}  # start of a free extent → its length
        self._start: dict[int, int] = {}  # end of a free extent → its start
        self._by_length: dict[int, dict[int, None]] = {}  # length → starts, as an ordered set
        self._lengths: list[int] = []  # keys of _by_length, sorted
        if units:
            self.free(0, units)

    def allocate(self, units: int) -> int | None:
        """The start of ``units`` consecutive units, or ``None``."""
        at = bisect_left(self._lengths, units)
        if at == len(self._lengths):
            return None
        length = self._lengths[at]
        start = next(iter(self._by_length[length]))
        self._forget(start, length)
        if length > units:
            self._remember(start + units, length - units)
        return start

    def free(self, start: int, units: int) -> None:
        """Give back what ``allocate`` gave."""
        before = self._start.get(start)
        if before is not None:
            length = self._length[before]
            self._forget(before, length)
            start, units = before, units + length
        after = self._length.get(start + units)
        if after is not None:
            self._forget(start + units, after)
            units += after
        self._remember(start, units)

    @classmethod
    def around(cls, units: int, taken: list[tuple[int, int]]) -> Extents:
        """An allocator in which the ``(start, units)`` of ``taken``, which must not overlap, are allocated."""
        room = cls(0)
        room.units = units
        at = 0
        for start, length in sorted(taken):
            if start > at:
                room._remember(at, start - at)
            at = start + length
        if at < units:
            room._remember(at, units - at)
        return room

    def _remember(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        starts = self._by_length.get(length)
        if starts is None:
            starts = self._by_length[length] = {}
            insort(self._lengths, length)
        starts[start] = None
        self.free_units += length

    def _forget(self, start: int, length: int) -> None:
        del self._length[start], self._start[start + length]
        starts = self._by_length[length]
        del starts[start]
        if not starts:
            del self._by_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
        self.free_units -= length
