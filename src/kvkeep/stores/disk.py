"""Disk: slabs, which are preallocated files with an index log beside each.

One directory serves any number of processes without a daemon. A slab has one writer at a time (``flock`` on its data
file) and any number of readers, who tail its log. A process that needs room makes a new slab while the budget allows,
else adopts one that nobody holds, else evicts from its own. The budget holds because files are only made under the
directory's lock, after adding up what is there, whoever made it.

Order of a write: data, then the log record. A reader that meets a slot which was overwritten meanwhile finds another
frame in it, or a broken seal: frames are verified by the caller, so that is a miss. Nothing is fsynced: after a power
cut a torn block is a miss as well.

Slabs, their logs and what is read from them: :mod:`~kvkeep.stores.slabs`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvkeep.buffers import PAGE, Buffer, BufferPool, as_bytes, nbytes_of
from kvkeep.errors import ConfigError, StoreError, StoreFullError, ValueTooLargeError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Item, Owner, Store
from kvkeep.stores.extents import Extents
from kvkeep.stores.slabs import (
    DELETE,
    PUT,
    RECORD,
    Location,
    Record,
    Slab,
    default_slab_nbytes,
    footprint,
    pages_of,
    read_places,
)

_NAME = re.compile(r"slab-(\d{6})\.data")
LAST_NUMBER = 999_999
_ZEROS = bytes(PAGE)
MAX_RUN = 128
"""Values that are placed side by side and written at once."""
MIN_CAPACITY = 256 << 10
LOCK_SECONDS = 10.0
GROW_LOCK_SECONDS = 0.2
"""Of waiting for the directory's lock with this store's own lock held: requests may wait for that one."""

CAUSES = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EFBIG: "full",
          errno.EROFS: "readonly", errno.EACCES: "readonly", errno.EPERM: "readonly"}  # fmt: skip
"""Of a write's failure, where what is there can still be read."""

log = logging.getLogger("kvkeep")


class DiskStore(Store):
    """A directory of slabs that never takes more than ``capacity`` bytes, logs included.

    ``read_only``: look, never adopt, write or delete (for tools). ``direct``: what is read is kept elsewhere, so it
    does not go through the page cache unless that holds it already. ``clock`` stamps the log.
    Files are made 0600, the directory 0700. Links, and anything that is not a regular file of this user's, are
    ignored (``read_only`` looks at others' too).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int,
        slab_nbytes: int = 0,
        read_only: bool = False,
        direct: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if capacity < MIN_CAPACITY and not read_only:
            raise ConfigError(f"a disk store of {capacity} bytes: capacity is at least {MIN_CAPACITY}")
        self.path = Path(path)
        self.capacity = capacity
        self._slab_nbytes = slab_nbytes or default_slab_nbytes(capacity)
        self._read_only = read_only
        self._direct = direct
        self._clock = clock
        self._open()

    def _open(self) -> None:
        self._pool = BufferPool()
        self._lock = threading.RLock()
        self._slabs: dict[int, Slab] = {}
        self._own: dict[BlockKey, Location] = {}
        self._foreign: dict[BlockKey, Location] = {}
        self._copied: set[BlockKey] = set()  # of those, what several slabs have or had
        self._reading: Counter[tuple[int, int]] = Counter()  # (slab, page) → reads under way in this process
        self._deferred: dict[tuple[int, int], int] = {}  # room of deleted values, free once nobody reads them
        self._owner: Owner | None = None
        self._stamps: dict[BlockKey, int] | None = {}  # only while opening: what is adopted is ordered by age
        self._seen_mtime = -1
        self._next_scan = self._next_growth = 0.0
        self._stunted = False  # growing failed last time
        self._unsaid: StoreError | None = None  # what went wrong in a call that went on without
        self._closed = False
        try:
            if not self._read_only:
                make_directory(self.path)
                if self.path.stat().st_mode & 0o022:
                    log.warning("%s: others may write there; what they leave is ignored, but chmod 700 it", self.path)
            self._scan()
            if not self._read_only:
                self._shrink()
                self._adopt_all()
            ignored = len(self._files()) - len(self._slabs)
            if ignored > 0:
                log.warning("%s: ignores %d files that are no slabs of this user, or empty", self.path, ignored)
        except OSError as error:
            raise StoreError(f"cannot open {self.path}: {error}") from error

    # Questions

    def contains(self, key: BlockKey) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        own, foreign = self._own, self._foreign
        found = [key in own or key in foreign for key in keys]
        if not all(found):
            with self._lock:
                self._check_open()
                self._refresh()
            found = [key in own or key in foreign for key in keys]
        return found

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        with self._lock:
            self._check_open()
            self._refresh()
            merged = {key: at[2] for key, at in self._foreign.items()}
            merged.update((key, at[2]) for key, at in self._own.items())
            return iter(list(merged.items()))

    def stamps(self) -> dict[BlockKey, float]:
        """When each key was written, in seconds, from the logs."""
        stamps: dict[BlockKey, float] = {}
        with self._lock:
            self._refresh()
            for slab in self._slabs.values():
                for op, _, _, stamp, key in slab.records():
                    if op == PUT and key in slab.live:
                        stamps[key] = stamp / 1000
        return stamps

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes that the directory's slabs may take, whoever made them: what the budget bounds."""
        return sum(footprint(file.st_size) for file in self._files().values())

    # Reading

    def get(self, key: BlockKey) -> Buffer | None:
        with self.read([key]) as (value,):
            return None if value is None else bytes(value)

    @contextmanager
    def _holding(self, keys: Sequence[BlockKey]) -> Iterator[list[Location | None]]:
        """Where the values lie. Until the block ends, nobody in this process reuses their room or closes the files."""
        with self._lock:
            self._check_open()
            places = [self._own.get(key) or self._foreign.get(key) for key in keys]
            if None in places:
                self._refresh()
                places = [self._own.get(key) or self._foreign.get(key) for key in keys]
            places = _disjoint(keys, places)
            for place in places:
                if place is not None:
                    place[0].busy += 1
                    self._reading[place[0].number, place[1]] += 1
        try:
            yield places
        finally:
            with self._lock:
                for place in places:
                    if place is not None:
                        self._read_done(place)

    @contextmanager
    def read(self, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
        try:
            with self._holding(keys) as places:
                total = sum(pages_of(place[2]) * PAGE for place in places if place is not None)
                with self._pool.borrow(total) as buffer:
                    yield read_places(places, buffer)
        except OSError as error:
            raise StoreError(f"reading {self.path}: {error}") from error

    def heads(self, keys: Sequence[BlockKey], nbytes: int) -> list[bytes | None]:
        try:
            with self._holding(keys) as places:
                return [
                    None if at is None else os.pread(at[0].data_fd, min(nbytes, at[2]), at[1] * PAGE) for at in places
                ]
        except OSError as error:
            raise StoreError(f"reading {self.path}: {error}") from error

    def prefetch(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            if self._closed:
                return
            runs: list[list[int]] = []
            for place in (self._own.get(key) or self._foreign.get(key) for key in keys):
                if place is None or place[0].past_cache:
                    continue
                slab, page, nbytes = place
                start, length = page * PAGE, pages_of(nbytes) * PAGE
                if runs and runs[-1][0] == slab.data_fd and runs[-1][1] + runs[-1][2] == start:
                    runs[-1][2] += length
                else:
                    runs.append([slab.data_fd, start, length])
        for fd, start, length in runs:
            with suppress(OSError):  # only a hint, also where the file has been closed meanwhile
                os.posix_fadvise(fd, start, length, os.POSIX_FADV_WILLNEED)

    # Writing

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        if self.put_many([(key, parts)]) == 0:
            raise StoreFullError(f"no room in {self.path}")

    def put_many(self, items: Sequence[Item]) -> int:
        if self._read_only:
            raise StoreError(f"{self.path} was opened for reading only")
        done = 0
        while done < len(items):
            if items[done][0] in self._own:  # there already: needs no room
                done += 1
                continue
            placed = self._place(items[done:])
            if not placed:
                return done
            done += self._write(placed, items[done:])
        return done

    def delete(self, key: BlockKey) -> bool:
        with self._lock:
            self._check_open()
            place = self._own.pop(key, None)
            if place is None:
                self._foreign.pop(key, None)  # not ours to delete, but not worth another read
                return False
            self._drop(key, place)
            return True

    def replace(self, key: BlockKey, parts: Sequence[Buffer]) -> bool:
        """The new value comes first where the slabs that are there have room for both: then a kill leaves one of the
        two, or each in a slab of its own, of which the next owner keeps one. The old one is overwritten: it may be
        one that was not encrypted."""
        with self._lock:
            before = self._own.pop(key, None)
            if before is None:
                return False
            placed = []
            try:
                placed = self._place([(key, parts)], grow=False)
                if placed:
                    self._write(placed, [(key, parts)])
            finally:
                after = self._own.setdefault(key, before)
            if after is before:
                return super().replace(key, parts)
            self._drop(key, before)
            slab, page, nbytes = before
            if (slab.number, page) not in self._deferred:
                try:
                    slab.write([memoryview(bytes(nbytes))], page * PAGE)
                except OSError as error:
                    raise self._failure("writing", error) from error
            return True

    def _drop(self, key: BlockKey, place: Location) -> None:
        """Log that ``key`` is not in ``place`` any more, unless the slab's log says so already; give back the room."""
        slab, page, nbytes = place
        if slab.live.get(key) is place:
            del slab.live[key]
            try:
                self._log(slab, [(DELETE, page, nbytes, key)])
            except OSError as error:
                # The room is not given back: a log that still names the key must not point at another's bytes.
                raise self._failure("deleting from", error) from error
        if (slab.number, page) in self._reading:
            self._deferred[slab.number, page] = pages_of(nbytes)
        else:
            slab.room.free(page, pages_of(nbytes))

    def attach(self, owner: Owner) -> None:
        with self._lock:
            self._owner = owner
            owner.gained([(key, place[2]) for key, place in self._own.items()])

    def ping(self) -> None:
        try:
            if not self._read_only:
                make_directory(self.path)
            self._files()
        except OSError as error:
            raise self._failure("looking at", error) from error

    def ping_writes(self) -> None:
        """There is a slab of our own, or one can be made; and a log can be written."""
        with self._lock:
            self._check_open()
            mine = [slab for slab in self._slabs.values() if slab.owned]
            if not mine:
                self._grow()
                return
            slab = min(mine, key=lambda slab: len(slab.live))
            try:
                self._rewrite_log(slab, slab.live)
            except OSError as error:
                raise self._failure("writing", error) from error

    def maintain(self) -> bool:
        """Notice what was removed; hand half of the slabs over when another process has asked for some. Raises
        ``StoreError``, once each time, when slabs of our own were removed or no more can be made."""
        if self._read_only or self._closed:
            return False
        with self._lock:
            with suppress(OSError):  # also a directory that may no longer be read
                if self._mtime() != self._seen_mtime:
                    self._scan()
                self._hand_over()
            unsaid, self._unsaid = self._unsaid, None
        if unsaid is not None:
            raise unsaid
        return False

    def _hand_over(self) -> None:
        want = self.path / "want"
        status = want.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return
        mine = [slab for slab in self._slabs.values() if slab.owned and not slab.busy]
        for slab in mine[: len(mine) // 2]:
            self._release(slab)
        if len(mine) >= 2:
            want.unlink(missing_ok=True)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for slab in self._slabs.values():
                if not slab.busy:
                    slab.close()
            self._own.clear()
            self._foreign.clear()

    def after_fork(self) -> None:
        for slab in self._slabs.values():
            slab.close()  # not unlocked: the lock belongs to the parent, whose copy of the file stays open
        self._open()

    # Placing and writing

    def _place(self, items: Sequence[Item], *, grow: bool = True) -> list[Location]:
        """Where the first of ``items`` go: side by side as many as fit, at least one, or none if there is no room.
        ``grow``: look for another slab before the first of ``items`` are parted from the others."""
        sizes = [nbytes_of(list(parts)) for _, parts in items[:MAX_RUN]]
        pages = [pages_of(size) for size in sizes]
        with self._lock:
            self._check_open()
            largest = max([self._slab_nbytes, *(slab.nbytes for slab in self._slabs.values() if slab.owned)])
            if sizes[0] > largest:
                raise ValueTooLargeError(f"{sizes[0]} bytes do not fit into a slab of {largest}")
            count = len(sizes)
            while True:
                while count:
                    wanted = sum(pages[:count])
                    for slab in self._slabs.values():
                        if slab.owned and (at := slab.room.allocate(wanted)) is not None:
                            places: list[Location] = []
                            for size, units in zip(sizes[:count], pages[:count], strict=True):
                                places.append((slab, at, size))
                                at += units
                            slab.busy += 1
                            return places
                    if grow and count == len(sizes) and self._grow():
                        continue
                    count //= 2
                return []

    def _write(self, places: list[Location], items: Sequence[Item]) -> int:
        slab, first, _ = places[0]
        views: list[memoryview] = []
        for (_, parts), (_, _, nbytes) in zip(items, places, strict=False):
            views += [as_bytes(part) for part in parts]
            views.append(memoryview(_ZEROS)[: pages_of(nbytes) * PAGE - nbytes])
        try:
            slab.write([view for view in views if len(view)], first * PAGE)
            with self._lock:
                fresh = [(key, place) for (key, _), place in zip(items, places, strict=False) if key not in self._own]
                fresh = list(dict(reversed(fresh)).items())[::-1]
                kept = {place[1] for _, place in fresh}
                self._log(slab, [(PUT, place[1], place[2], key) for key, place in fresh])
                for key, place in fresh:
                    self._own[key] = place
                    slab.live[key] = place
                for _, page, nbytes in places:
                    if page not in kept:
                        slab.room.free(page, pages_of(nbytes))
        except OSError as error:
            with self._lock:
                for _, page, nbytes in places:
                    slab.room.free(page, pages_of(nbytes))
            raise self._failure("writing", error) from error
        finally:
            with self._lock:
                self._done(slab)
        return len(places)

    def _log(self, slab: Slab, records: list[Record]) -> None:
        if not records:
            return
        if slab.log_is_long(len(records)):
            self._rewrite_log(slab, slab.live)
        slab.append_log(records, self._now())

    def _rewrite_log(self, slab: Slab, live: dict[BlockKey, Location]) -> None:
        slab.rewrite_log(self._log_path(slab.number), live, self._now())

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _take_log(self, slab: Slab, live: dict[BlockKey, Location]) -> None:
        """Go on writing an adopted log where its last writer stopped; anew if it is damaged, mostly history, or names
        more than is ``live``."""
        whole = slab.log_fd >= 0 and os.fstat(slab.log_fd).st_size == slab.log_at > 0
        if not whole or len(live) < len(slab.live) or slab.log_is_long():
            self._rewrite_log(slab, live)
        else:
            fd = self._open_file(self._log_path(slab.number), os.O_RDWR)
            os.close(slab.log_fd)
            slab.log_fd = fd
        for key in slab.live:
            self._withdraw(slab, key)
        slab.live = live

    # Slabs

    def _log_path(self, number: int) -> Path:
        return self.path / f"slab-{number:06}.log"

    def _data_path(self, number: int) -> Path:
        return self.path / f"slab-{number:06}.data"

    def _open_file(self, path: Path, flags: int) -> int:
        """Open a slab's file. Raises ``OSError`` on anything that this store, or another of the same user, cannot have
        left there: a link, a pipe, another user's file."""
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(fd)
        ours = self._read_only or status.st_uid == os.geteuid()
        if not stat.S_ISREG(status.st_mode) or not ours:
            os.close(fd)
            raise PermissionError(f"{path} is no file of a cache of this user")
        if not self._read_only and flags & os.O_RDWR and status.st_mode & 0o077:
            os.fchmod(fd, 0o600)  # copied here by something that did not keep the mode
        return fd

    def _files(self) -> dict[int, os.stat_result]:
        """The data file of every slab in the directory, by number."""
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # removed by another process since
                        found[int(match[1])] = entry.stat(follow_symlinks=False)
        return dict(sorted(found.items()))

    @contextmanager
    def _directory_lock(self, seconds: float | None = None) -> Iterator[None]:
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:  # its holder is stopped: that must not stop others
                        raise TimeoutError(f"another process holds the lock of {self.path}") from None
                    time.sleep(0.005)
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has a copy of the descriptor
        finally:
            os.close(fd)

    def _grow(self) -> bool:
        """One more slab of our own: a new one within the budget, else one that nobody holds. Who has some asks once a
        second: looking through the directory costs more than evicting a block."""
        owned = any(slab.owned for slab in self._slabs.values())
        if owned and time.monotonic() < self._next_growth:
            return False
        try:
            grown = self._create() or self._adopt_one()
            self._stunted = False
            if grown:
                return True
            if not owned:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
                os.close(os.open(self.path / "want", flags, 0o600))
        except OSError as error:
            failure = self._failure("no room can be made in", error)
            if not owned:
                raise failure from error
            if not self._stunted:
                self._stunted, self._unsaid = True, failure
        self._next_growth = time.monotonic() + 1
        return False

    def _create(self) -> bool:
        nbytes = self._slab_nbytes
        make_directory(self.path)  # it may have been removed
        with self._directory_lock(GROW_LOCK_SECONDS):
            if self.nbytes_on_disk + footprint(nbytes) > (self.capacity or 0):
                return False
            names = [match for name in os.listdir(self.path) if (match := _NAME.fullmatch(name))]
            taken = {int(match[1]) for match in names} | self._slabs.keys()  # by links, pipes and removed files, too
            number = 1 + max(taken, default=-1)
            if number > LAST_NUMBER:
                number = next(free for free in range(LAST_NUMBER) if free not in taken)
            path = self._data_path(number)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.posix_fallocate(fd, 0, nbytes)
                slab = Slab(number, fd, nbytes, owned=True, direct=self._direct)
                slab.room = Extents(nbytes // PAGE)
                self._rewrite_log(slab, slab.live)
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        self._slabs[number] = slab
        return True

    def _adopt_one(self) -> bool:
        if time.monotonic() < self._next_scan:
            return False
        self._next_scan = time.monotonic() + 1
        self._scan()
        return any(self._adopt(slab) for slab in list(self._slabs.values()) if not slab.owned)

    def _adopt_all(self) -> None:
        for slab in list(self._slabs.values()):
            self._adopt(slab)
        order = self._stamps or {}
        self._stamps = None
        self._own = dict(sorted(self._own.items(), key=lambda item: order.get(item[0], 0)))

    def _adopt(self, slab: Slab) -> bool:
        """Become the writer of ``slab`` if nobody is."""
        if slab.owned or slab.busy:
            return False
        try:
            fd = self._open_file(self._data_path(slab.number), os.O_RDWR)
        except OSError:
            return False
        try:
            if os.fstat(fd).st_size < slab.nbytes:
                raise OSError("it has been cut since it was met")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._replay(slab)  # to the end: the last writer is gone
            taken: list[tuple[int, int]] = []
            live: dict[BlockKey, Location] = {}
            for key, place in sorted(slab.live.items(), key=lambda item: item[1][1:]):
                _, page, nbytes = place
                units = pages_of(nbytes)
                if taken and sum(taken[-1]) > page:
                    continue  # two records claim one place, so the log is not to be believed here
                if key in self._own:
                    continue  # two processes wrote it: one copy is enough
                taken.append((page, units))
                live[key] = place
            self._take_log(slab, live)
        except OSError:  # also no room for its log: then it is only read
            os.close(fd)
            return False
        slab.reopened(fd)
        slab.owned = True
        slab.room = Extents.around(slab.nbytes // PAGE, taken)
        self._own.update(live)
        if self._owner is not None:
            self._owner.gained([(key, place[2]) for key, place in live.items()])
        return True

    def _release(self, slab: Slab) -> None:
        """Stop writing to ``slab``; go on reading from it."""
        reading = self._open_file(self._data_path(slab.number), os.O_RDONLY)
        slab.reopened(reading)  # gives up the lock
        slab.owned = False
        self._lose(slab)
        for key, place in slab.live.items():
            self._publish(key, place)

    def _lose(self, slab: Slab) -> None:
        """What lies in ``slab`` is no longer ours to evict."""
        lost = list(slab.live)
        for key in lost:
            del self._own[key]
        if self._owner is not None:
            self._owner.lost(lost)

    def _shrink(self) -> None:
        """Delete slabs that nobody holds until the directory fits the budget: it may have been larger last time."""
        with self._directory_lock():
            total = self.nbytes_on_disk
            for number, file in self._files().items():
                size = file.st_size
                whole = size >= PAGE and size % PAGE == 0
                if total <= (self.capacity or 0) and whole:
                    continue
                try:
                    fd = self._open_file(self._data_path(number), os.O_RDWR)
                except OSError:
                    continue  # gone, or not ours
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._data_path(number).unlink(missing_ok=True)
                    self._log_path(number).unlink(missing_ok=True)
                    total -= footprint(size)
                except BlockingIOError:
                    continue
                finally:
                    os.close(fd)
        self._scan()

    def _scan(self) -> None:
        """Meet the slabs that have come, forget those that have gone."""
        self._seen_mtime = self._mtime()
        files = self._files()
        gone = [slab for slab in self._slabs.values() if not slab.is_file(files.get(slab.number))]
        for slab in gone:
            if slab.busy:
                self._seen_mtime = -1  # not now, but soon
            else:
                self._forget(slab)
        for number, file in files.items():
            size = file.st_size
            if number in self._slabs or size < PAGE:
                continue
            try:
                fd = self._open_file(self._data_path(number), os.O_RDONLY)
            except OSError:
                continue  # gone, or not ours to read: a miss
            slab = self._slabs[number] = Slab(number, fd, size, owned=False, direct=self._direct)
            self._replay(slab)

    def _mtime(self) -> int:
        """When something last came into the directory or went, in nanoseconds; 0 if it is not there."""
        try:
            return os.stat(self.path).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def _forget(self, slab: Slab) -> None:
        """Its file was removed, or another stands in its place."""
        if slab.owned:
            self._lose(slab)
            self._unsaid = StoreError(f"slabs of {self.path} were removed: what was in them is lost, new ones are made")
        for key in slab.live:
            self._withdraw(slab, key)
        slab.close()
        del self._slabs[slab.number]

    def _refresh(self) -> None:
        """See what other processes have written since."""
        with suppress(OSError):
            if self._mtime() != self._seen_mtime:
                self._scan()
        try:
            for slab in self._slabs.values():
                if not slab.owned:
                    self._replay(slab)
        except OSError as error:
            raise StoreError(f"reading the logs of {self.path}: {error}") from error

    def _replay(self, slab: Slab) -> None:
        """Read on in another's log; from the start if it was replaced."""
        if slab.log_fd < 0 or os.fstat(slab.log_fd).st_nlink == 0:
            if slab.log_fd >= 0:
                os.close(slab.log_fd)
                slab.log_fd = -1
            for key in slab.live:
                self._withdraw(slab, key)
            slab.live.clear()
            slab.log_at = 0
            try:
                slab.log_fd = self._open_file(self._log_path(slab.number), os.O_RDONLY)
            except OSError:
                return
        pages = slab.nbytes // PAGE
        met: dict[BlockKey, None] = {}  # only what remains in the end counts: logs are mostly history
        for op, page, nbytes, stamp, key in slab.records(slab.log_at):
            slab.log_at += RECORD.size
            if op == PUT and page + pages_of(nbytes) <= pages:
                slab.live[key] = (slab, page, nbytes)
                if self._stamps is not None:
                    self._stamps[key] = stamp
            elif op == DELETE:
                slab.live.pop(key, None)
            met[key] = None
        for key in met:
            place = slab.live.get(key)
            if place is None:
                self._withdraw(slab, key)
            else:
                self._publish(key, place)

    def _publish(self, key: BlockKey, place: Location) -> None:
        """A slab of another's has ``key``. What was written last is found first."""
        before = self._foreign.get(key)
        if before is not None and before[0] is not place[0]:
            self._copied.add(key)
        self._foreign[key] = place

    def _withdraw(self, slab: Slab, key: BlockKey) -> None:
        """``slab`` has ``key`` no more, or is ours now: where another's has it too, it is found there."""
        if self._foreign.get(key, (None,))[0] is not slab:
            return
        del self._foreign[key]
        if key in self._copied:
            others = (other for other in self._slabs.values() if other is not slab and not other.owned)
            place = next((other.live[key] for other in others if key in other.live), None)
            if place is None:
                self._copied.discard(key)
            else:
                self._foreign[key] = place

    def _read_done(self, place: Location) -> None:
        slab, page, _ = place
        at = (slab.number, page)
        self._reading[at] -= 1
        if not self._reading[at]:
            del self._reading[at]
            units = self._deferred.pop(at, None)
            if units is not None:
                slab.room.free(page, units)
        self._done(slab)

    def _done(self, slab: Slab) -> None:
        slab.busy -= 1
        if self._closed and not slab.busy:
            slab.close()

    def _failure(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"{what} {self.path}: {error}", cause=CAUSES.get(error.errno or 0, "error"))

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the disk store at {self.path} is closed")


def make_directory(path: Path) -> None:
    """For this user alone, and so each parent that it lacks: ``Path.mkdir`` makes those for everybody. One that is
    there stays as it is."""
    if not path.is_dir():
        if path.parent != path:
            make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def _disjoint(keys: Sequence[BlockKey], places: Sequence[Location | None]) -> list[Location | None]:
    """Without those of slabs whose values, read at once, would be more than the slab: their log is not to be believed.
    What is read is then bounded, whatever a log says. A key that is asked for twice counts once."""
    pages: Counter[int] = Counter()
    for place in dict(zip(keys, places, strict=True)).values():
        if place is not None:
            pages[place[0].number] += pages_of(place[2])
    return [None if at is None or pages[at[0].number] > at[0].nbytes // PAGE else at for at in places]
