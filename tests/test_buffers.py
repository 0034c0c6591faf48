"""Buffers: flat views without copies, and memory that comes back warm."""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.buffers import HUGE_PAGE, PAGE, BufferPool, anonymous, as_bytes, nbytes_of, populate, round_up
from kvkeep.stores import memory


def test_as_bytes_is_flat_and_no_copy() -> None:
    for source in (bytearray(24), np.zeros((2, 3), "<u4"), np.zeros(6, "<f4").data, memoryview(bytearray(24))):
        view = as_bytes(source)  # type: ignore[arg-type]
        assert (view.format, view.ndim, view.nbytes) == ("B", 1, 24)
        view[5] = 77
        assert bytes(source)[5] == 77
    assert as_bytes(b"abc") == b"abc"


def test_as_bytes_refuses_what_needs_a_copy() -> None:
    for source in (memoryview(b"abcdef")[::2], np.zeros((4, 4))[:, :2].data):
        with pytest.raises(TypeError):
            as_bytes(source)


def test_nbytes_of() -> None:
    assert nbytes_of([]) == 0
    assert nbytes_of((b"ab", bytearray(3), np.zeros((2, 2), "<u4").data)) == 21


@given(nbytes=st.integers(0, 1 << 40), unit=st.sampled_from([1, 512, PAGE, 1 << 20]))
def test_round_up(nbytes: int, unit: int) -> None:
    up = round_up(nbytes, unit)
    assert up % unit == 0
    assert nbytes <= up < nbytes + unit


def test_anonymous_memory_is_aligned_and_zero() -> None:
    for nbytes in (0, 1, 4097):
        region = anonymous(nbytes)
        assert len(region) == nbytes
        assert bytes(region) == bytes(nbytes)
        assert nbytes == 0 or np.frombuffer(region, np.uint8).ctypes.data % PAGE == 0


def test_memory_is_touched_in_small_pieces_and_keeps_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    region = mmap.mmap(-1, 4 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    region[PAGE : PAGE + 4] = b"here"
    libc = ctypes.CDLL(None, use_errno=True)
    asked: list[int] = []

    def madvise(start: int, nbytes: int, advice: int) -> int:
        asked.append(nbytes)
        return int(libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice))

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(madvise=madvise))
    if not populate(region, PAGE, 3 * HUGE_PAGE):
        pytest.skip("a kernel before 5.14")
    monkeypatch.undo()
    assert max(asked) <= HUGE_PAGE
    assert sum(asked) == 3 * HUGE_PAGE
    assert _there(region) == [0] + [1] * (3 * HUGE_PAGE // PAGE) + [0] * (HUGE_PAGE // PAGE - 1)
    assert region[PAGE : PAGE + 4] == b"here"


def _there(region: mmap.mmap) -> list[int]:
    """Of each page 1 if it has been touched."""
    there = (ctypes.c_ubyte * (len(region) // PAGE))()
    anchor = ctypes.c_char.from_buffer(region)
    nbytes = ctypes.c_size_t(len(region))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(anchor)), nbytes, there) == 0
    del anchor
    return [page & 1 for page in there]


@pytest.mark.parametrize("prefault", [False, True])
def test_memory_is_taken_ahead_of_its_use_or_all_at_once(prefault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOUCH_AHEAD_NBYTES", 8 << 20)
    if not populate(mmap.mmap(-1, PAGE), 0, PAGE):
        pytest.skip("a kernel before 5.14")
    with closing(memory.MemoryStore(64 << 20, prefault=prefault)) as store:
        while store.maintain():
            pass
        there = _there(store._region)
    touched = len(there) if prefault else (8 << 20) // PAGE
    assert 0 not in there[:touched]
    assert sum(there) <= touched + HUGE_PAGE // PAGE


def test_a_buffer_comes_back() -> None:
    pool = BufferPool()
    with pool.borrow(100_000) as first:
        first[:] = b"x" * len(first)
        address = np.frombuffer(first, np.uint8).ctypes.data
    with pool.borrow(110_000) as second:  # of the same size class
        assert len(second) == 110_000
        assert np.frombuffer(second, np.uint8).ctypes.data == address
    with pytest.raises(ZeroDivisionError), pool.borrow(100_000):
        raise ZeroDivisionError
    with pool.borrow(100_000) as third:
        assert np.frombuffer(third, np.uint8).ctypes.data == address


def test_two_borrowers_never_share() -> None:
    pool = BufferPool()
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(200):
            with pool.borrow(70_000) as buffer:
                buffer[:64] = bytes([mark]) * 64
                if bytes(buffer[:64]) != bytes([mark]) * 64:
                    wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_pool_keeps_no_more_than_its_limit() -> None:
    pool = BufferPool(limit=256 << 10)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(pool.borrow(64 << 10))
    assert pool._kept == 256 << 10
    assert sum(size * len(shelf) for size, shelf in pool._free.items()) == 256 << 10
    with pool.borrow(1 << 20):
        pass
    assert pool._kept == 256 << 10, "larger than the limit: given back to the system"
