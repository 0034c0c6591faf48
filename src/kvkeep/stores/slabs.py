"""Slabs: preallocated files of pages, each with an index log beside it.

A log record has 64 bytes: op, page, bytes, stamp (milliseconds), key, xxh3-64 of all that. A log ends at its first
record that does not check.

Where there is a tier of memory above, what the page cache does not hold of one's own slabs is read past it
(``O_DIRECT``), straight into the reader's memory: a third of the processor's time, no fresh pages for the system to
find, nothing pushed out. What it holds is known from ``cachestat`` (Linux 6.5).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from kvkeep.buffers import PAGE
from kvkeep.keys import BlockKey
from kvkeep.stores.extents import Extents

PUT, DELETE, HEAD = 1, 2, 3
HEAD_KEY = BlockKey(b"kvkeep slab log, version 1".ljust(32, b"\0"))
RECORD = struct.Struct("<B3xII4xQ32s8s")
IOV_MAX = 512  # half of Linux's limit
DIRECT_NBYTES = 256 << 10
"""Runs from here on are worth asking whether the page cache has them."""
_CACHESTAT = 451  # the call's number on every architecture; neither Python nor most C libraries have a name for it

Location = tuple["Slab", int, int]
"""Slab, first page, bytes."""

Record = tuple[int, int, int, BlockKey]
"""Op, first page, bytes, key."""


class Slab:
    """One data file and its log, as this process sees them."""

    def __init__(self, number: int, data_fd: int, nbytes: int, *, owned: bool, direct: bool) -> None:
        """``direct``: read past the page cache what it does not hold, if the system can."""
        self.number = number
        self.data_fd = data_fd
        self.nbytes = nbytes
        self.owned = owned
        self.log_fd = -1
        self.log_at = 0  # bytes of the log that have been replayed
        self.live: dict[BlockKey, Location] = {}  # what its log says; the tuples are shared with the store's index
        self.room = Extents(0)
        self.busy = 0  # reads and writes under way: its files stay open
        self._direct_fds: list[int] = []  # the data file once more, for reading past the page cache; made when needed
        self.direct = direct and hasattr(os, "O_DIRECT")

    def close(self) -> None:
        for fd in (self.data_fd, self.log_fd, *self._direct_fds):
            if fd >= 0:
                os.close(fd)
        self.data_fd = self.log_fd = -1
        self._direct_fds = []

    def reopened(self, data_fd: int) -> None:
        """Use this descriptor for the data from now on."""
        for fd in (self.data_fd, *self._direct_fds):
            os.close(fd)
        self.data_fd, self._direct_fds = data_fd, []

    # Data

    def is_file(self, file: os.stat_result | None) -> bool:
        """Is this the data file that is open here?"""
        return file is not None and os.path.samestat(file, os.fstat(self.data_fd))

    @property
    def past_cache(self) -> bool:
        """Others' slabs are read through the page cache, which those who share a directory share, too."""
        return self.direct and self.owned

    def read(self, offset: int, out: memoryview) -> None:
        """Fill ``out``, page-aligned and whole pages, from ``offset`` on. What lies behind the end of a file that was
        cut is zeros: stale bytes of a pool must not pass for content."""
        got = self._read_directly(offset, out) if self.past_cache and len(out) >= DIRECT_NBYTES else 0
        while got < len(out):
            count = os.preadv(self.data_fd, [out[got:]], offset + got)
            if count == 0:
                out[got:] = bytes(len(out) - got)
                return
            got += count

    def _read_directly(self, offset: int, out: memoryview) -> int:
        """Bytes that were read past the page cache; the others are the caller's to read."""
        got = 0
        try:
            if cached_nbytes(self.data_fd, offset, len(out)) * 2 < len(out):
                fd = self._direct_fds[0] if self._direct_fds else self._open_direct_fd()
                while got < len(out) and (count := os.preadv(fd, [out[got:]], offset + got) // PAGE * PAGE):
                    got += count
        except OSError:  # a system or a medium that cannot, or that reads badly either way
            self.direct = False
        return got

    def _open_direct_fd(self) -> int:
        self._direct_fds.append(os.open(f"/proc/self/fd/{self.data_fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
        return self._direct_fds[0]  # two threads at once have made two

    def write(self, views: list[memoryview], offset: int) -> None:
        """All of ``views`` one after the other."""
        while views:
            written = os.pwritev(self.data_fd, views[:IOV_MAX], offset)
            if written <= 0:
                raise OSError("nothing was written")
            offset += written
            while views and written >= len(views[0]):
                written -= len(views[0])
                views = views[1:]
            if written:
                views = [views[0][written:], *views[1:]]

    # Log

    def records(self, start: int = 0) -> Iterator[tuple[int, int, int, int, BlockKey]]:
        """Op, page, bytes, stamp and key of each record from ``start`` on, up to the first that does not check; no
        more of the log than one can be long: who can write to it may have made it so."""
        if self.log_fd < 0:
            return
        size = min(os.fstat(self.log_fd).st_size, footprint(self.nbytes) - self.nbytes)
        data = memoryview(os.pread(self.log_fd, size - start, start) if size > start else b"")
        digest = xxhash.xxh3_64_digest
        whole = data[: len(data) // RECORD.size * RECORD.size]
        for at, (op, page, nbytes, stamp, key, check) in enumerate(RECORD.iter_unpack(whole)):
            if digest(whole[at * RECORD.size : (at + 1) * RECORD.size - 8]) != check:
                return
            yield op, page, nbytes, stamp, key

    def log_is_long(self, more: int = 0) -> bool:
        """Is it mostly history?"""
        return self.log_at > RECORD.size * (2 * len(self.live) + more + 256)

    def append_log(self, records: Sequence[Record], stamp: int) -> None:
        data = b"".join(pack_record(op, page, nbytes, stamp, key) for op, page, nbytes, key in records)
        written = os.pwrite(self.log_fd, data, self.log_at)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes of the log were written")
        self.log_at += written

    def rewrite_log(self, path: Path, live: dict[BlockKey, Location], now: int) -> None:
        """What is ``live``, without its history, in a new file that replaces the old one at once."""
        stamps = {key: stamp for op, _, _, stamp, key in self.records() if op == PUT}
        lines = [pack_record(HEAD, 0, 0, now, HEAD_KEY)]
        lines += [pack_record(PUT, page, n, stamps.get(key, now), key) for key, (_, page, n) in live.items()]
        data = b"".join(lines)
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.pwrite(fd, data, 0) != len(data):
                raise OSError("the log was not written whole")
            os.rename(temporary, path)
        except OSError:
            os.close(fd)
            temporary.unlink(missing_ok=True)
            raise
        if self.log_fd >= 0:
            os.close(self.log_fd)
        self.log_fd, self.log_at = fd, len(data)


def default_slab_nbytes(capacity: int) -> int:
    """A sixteenth of the budget, 4 to 256 MiB; in a small budget, what fits twice."""
    wanted = min(max(capacity // 16, 4 << 20), 256 << 20)
    if footprint(wanted) > capacity // 2:
        wanted = (capacity // 2 - (80 << 10)) * 15 // 16
    return max(wanted // PAGE * PAGE, PAGE)


def footprint(nbytes: int) -> int:
    """Bytes that a slab of ``nbytes`` takes at most: data, and its log twice over (while it is being rewritten)."""
    return nbytes + nbytes // 16 + (72 << 10)


def pages_of(nbytes: int) -> int:
    """Pages that a value takes: at least one, so that every value has a place of its own."""
    return (nbytes + PAGE - 1) // PAGE or 1


def pack_record(op: int, page: int, nbytes: int, stamp: int, key: BlockKey) -> bytes:
    body = RECORD.pack(op, page, nbytes, stamp, key, b"")[:-8]
    return body + xxhash.xxh3_64_digest(body)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def cached_nbytes(fd: int, offset: int, nbytes: int) -> int:
    """How much of a file's part the page cache holds. Raises ``OSError`` where the system does not tell."""
    part = (ctypes.c_uint64 * 2)(offset, nbytes)
    pages = (ctypes.c_uint64 * 5)()  # cached, dirty, being written, evicted, evicted recently
    if _libc().syscall(_CACHESTAT, fd, ctypes.byref(part), ctypes.byref(pages), 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    return pages[0] * mmap.PAGESIZE


def read_places(places: Sequence[Location | None], buffer: memoryview) -> list[memoryview | None]:
    """The values, in ``buffer``: what lies side by side is read at once."""
    views: list[memoryview | None] = []
    runs: list[tuple[Slab, int, int, int]] = []  # slab, offset in the file, offset in the buffer, bytes
    at = 0
    for place in places:
        if place is None:
            views.append(None)
            continue
        slab, page, nbytes = place
        length = pages_of(nbytes) * PAGE
        views.append(buffer[at : at + nbytes].toreadonly())
        if runs and runs[-1][0] is slab and runs[-1][1] + runs[-1][3] == page * PAGE:
            _, start, where, before = runs[-1]
            runs[-1] = (slab, start, where, before + length)
        else:
            runs.append((slab, page * PAGE, at, length))
        at += length
    for slab, start, where, length in runs:
        slab.read(start, buffer[where : where + length])
    return views
