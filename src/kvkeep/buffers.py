"""Buffers, and memory that has been touched already.

Fresh pages cost more than the copy into them (0.8 GB/s against 12 GB/s on the machines measured), so nothing on the
hot path allocates: it borrows from a :class:`BufferPool` or writes into an arena.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

Buffer = bytes | bytearray | memoryview
"""What may be handed to ``put``: anything C-contiguous with the buffer protocol."""

PAGE = 4096
HUGE_PAGE = 2 << 20
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; Python's mmap module has no name for it


def as_bytes(buffer: Buffer) -> memoryview:
    """The bytes of ``buffer`` as a flat view, without a copy. Raises ``TypeError`` where that needs one."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    return view.cast("B")


def nbytes_of(parts: Sequence[Buffer]) -> int:
    """Bytes of a scattered value."""
    return sum(memoryview(part).nbytes for part in parts)


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """The next multiple of ``unit``."""
    return -(-nbytes // unit) * unit


def anonymous(nbytes: int) -> memoryview:
    """Private, page-aligned memory, not yet touched.

    In huge pages where the system has them: touching 2 MiB then costs one fault, not 512 (a quarter of the time).
    """
    region = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE_PAGE and _HUGE is not None:
        with suppress(OSError):  # a kernel without them
            region.madvise(_HUGE)
    return memoryview(region)[:nbytes]


def populate(region: mmap.mmap | memoryview, start: int, nbytes: int) -> bool:
    """Fault pages in without changing them; ``start`` is a multiple of :data:`PAGE`. False where the kernel cannot."""
    anchor = ctypes.c_char.from_buffer(region)
    try:
        return populate_at(ctypes.addressof(anchor) + start, nbytes)
    finally:
        del anchor


def populate_at(address: int, nbytes: int) -> bool:
    """The same for the pages on which ``nbytes`` from ``address`` on lie; the caller keeps them alive.

    Through ctypes, which, unlike mmap.madvise, lets other threads run; and a huge page at a time, since other threads
    that map memory, and then all that meet a fresh page, wait for each call (4 ms each where the host has to find
    pages: in calls of 16 MiB loads from a server missed their deadlines).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    end = address + nbytes
    address -= address % PAGE
    return all(
        libc.madvise(start, min(HUGE_PAGE, end - start), _POPULATE_WRITE) == 0
        for start in range(address, end, HUGE_PAGE)
    )


class BufferPool:
    """Page-aligned buffers that come back warm.

    At most ``limit`` bytes are kept for the next borrower; what exceeds that is given back to the system. Thread-safe.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        self._limit = limit
        self._free: dict[int, list[memoryview]] = {}
        self._kept = 0
        self._lock = threading.Lock()
        _pools.add(self)

    def after_fork(self) -> None:
        """In a forked child: a thread that held the lock does not exist there."""
        self._lock = threading.Lock()
        self._free = {}
        self._kept = 0

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[memoryview]:
        """``nbytes`` writable bytes of undefined content, until the block ends. Do not keep the view."""
        size = _size_class(nbytes)
        with self._lock:
            shelf = self._free.get(size)
            whole = shelf.pop() if shelf else None
            if whole is not None:
                self._kept -= size
        if whole is None:
            whole = anonymous(size)
        try:
            yield whole[:nbytes]
        finally:
            with self._lock:
                if self._kept + size <= self._limit:
                    self._free.setdefault(size, []).append(whole)
                    self._kept += size


_pools: weakref.WeakSet[BufferPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _size_class(nbytes: int) -> int:
    """Sizes are rounded to a power of two above 64 KiB, so that one buffer serves neighbours in size."""
    size = 64 << 10
    while size < nbytes:
        size <<= 1
    return size
