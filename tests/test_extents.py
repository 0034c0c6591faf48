"""Extents: free + allocated == units, nothing is given twice, holes that touch become one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.stores.extents import Extents


@settings(max_examples=200)
@given(units=st.integers(0, 64), steps=st.lists(st.tuples(st.booleans(), st.integers(0, 63)), max_size=60))
def test_against_a_bitmap(units: int, steps: list[tuple[bool, int]]) -> None:
    room = Extents(units)
    taken: dict[int, int] = {}
    for allocate, number in steps:
        used = {unit for start, length in taken.items() for unit in range(start, start + length)}
        if allocate:
            wanted = number % 12 + 1
            start = room.allocate(wanted)
            free = "".join(" " if unit in used else "." for unit in range(units))
            if start is None:
                assert "." * wanted not in free, "there was a hole that large"
                continue
            assert not used & set(range(start, start + wanted)), "given twice"
            assert 0 <= start <= units - wanted
            taken[start] = wanted
        elif taken:
            start = sorted(taken)[number % len(taken)]
            room.free(start, taken.pop(start))
        assert room.free_units + sum(taken.values()) == units
    again = Extents.around(units, list(taken.items()))
    assert again.free_units == room.free_units
    assert again._length == room._length
    for start, length in taken.items():
        room.free(start, length)
    assert room.free_units == units
    assert units == 0 or room.allocate(units) == 0


def test_the_smallest_hole_that_fits_is_taken() -> None:
    room = Extents.around(20, [(3, 1), (9, 1), (12, 1)])  # holes of 3, 5, 2, 7
    assert room.allocate(2) == 10
    assert room.allocate(3) == 0
    assert room.allocate(4) == 4
    assert room.allocate(8) is None


def test_a_fresh_span_fills_front_to_back() -> None:
    room = Extents(10)
    assert [room.allocate(2) for _ in range(6)] == [0, 2, 4, 6, 8, None]
