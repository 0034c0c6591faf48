"""The index of a directory: a SQLite file that any number of processes share.

Time is the wall clock, which all processes of a machine have in common and a restart does not reset; an entry written
in the future, as seen after the clock was set back, is missing. A file that SQLite calls damaged is replaced by an
empty one. At most ``capacity`` bytes: the oldest entries make room.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from kvkeep.errors import StoreError
from kvkeep.stores.disk import make_directory
from kvkeep.values.index import Found, Index, Item, Usage

T = TypeVar("T")

FILE = "values.sqlite"
BESIDE = ("", "-journal", "-wal", "-shm")
"""The file's own name ends in the first, what SQLite keeps beside it in the others."""
PAGE_NBYTES = 4096
MIN_PAGES = 24
BUSY_SECONDS = 0.5
CUT_SECONDS = 10.0
"""Between attempts to cut the log where a reader stays."""
IN_LIST = 500
"""Names in one question."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  name BLOB PRIMARY KEY, body BLOB NOT NULL, born REAL NOT NULL, until REAL, grp BLOB, nbytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_group ON entries (grp) WHERE grp IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_end ON entries (until) WHERE until IS NOT NULL;
"""

Work: TypeAlias = Callable[[sqlite3.Connection, float], T]
"""What to do in a transaction, at that time."""

_abandoned: list[sqlite3.Connection] = []
"""Connections of a parent process: closing one here would take the parent's locks away."""


class SqliteIndex(Index):
    """In ``directory``, made when it is used first."""

    def __init__(self, directory: Path, *, capacity: int = 64 << 20, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / FILE
        # The file and the log beside it, which is a quarter of it.
        self._pages = max(capacity * 4 // 5 // PAGE_NBYTES, MIN_PAGES)
        self._clock = clock
        self._closed = False
        self._cut_after = 0.0
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def get_many(self, names: Sequence[bytes]) -> list[Found | None]:
        rows = []
        with self._working() as database:
            for start in range(0, len(names), IN_LIST):
                some = names[start : start + IN_LIST]
                marks = ",".join("?" * len(some))
                question = f"SELECT name, body, born, until FROM entries WHERE name IN ({marks})"
                rows += database.execute(question, some).fetchall()
        now = self._clock()  # afterwards, or what was written meanwhile would be from the future
        found = {
            name: Found(body, None if until is None else until - now)
            for name, body, born, until in rows
            if type(body) is bytes and _lives(born, until, now)
        }
        return [found.get(name) for name in names]

    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        def work(database: sqlite3.Connection, now: float) -> list[bytes]:
            left = [group for item in items for group in _groups_of(database, item.name)]
            for item in items:
                _set(database, item, now)
            return _empty(database, left)

        return self._write(work)

    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        def work(database: sqlite3.Connection, now: float) -> tuple[bool, list[bytes]]:
            there = _body(database, name, now) is not None
            left = _groups_of(database, name)
            database.execute("DELETE FROM entries WHERE name = ?", (name,))
            return there, _empty(database, left)

        return self._write(work)

    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        def work(database: sqlite3.Connection, now: float) -> bool:
            if _body(database, name, now) is not None:
                return False
            _set(database, Item(name, body, life), now)
            return True

        return self._write(work)

    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        def work(database: sqlite3.Connection, now: float) -> bool:
            if _body(database, name, now) != body:
                return False
            database.execute("UPDATE entries SET until = ? WHERE name = ?", (now + life, name))
            return True

        return self._write(work)

    def release(self, name: bytes, body: bytes) -> bool:
        def work(database: sqlite3.Connection, now: float) -> bool:
            if _body(database, name, now) != body:
                return False
            database.execute("DELETE FROM entries WHERE name = ?", (name,))
            return True

        return self._write(work)

    def members(self, group: bytes) -> list[bytes]:
        with self._working() as database:
            return _blobs(database.execute("SELECT name FROM entries WHERE grp = ?", (group,)))

    def names(self) -> list[bytes]:
        with self._working() as database:
            return _blobs(database.execute("SELECT name FROM entries ORDER BY born"))

    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        def work(database: sqlite3.Connection, now: float) -> bool:
            if _body(database, name, now) != old:
                return False
            database.execute("UPDATE entries SET body = ? WHERE name = ?", (new, name))
            return True

        return self._write(work)

    def usage(self) -> Usage:
        with self._working() as database:
            names, nbytes = database.execute(
                "SELECT count(*), ifnull(sum(nbytes), 0) FROM entries WHERE grp IS NOT NULL"
            ).fetchone()
            values, stored = database.execute(
                "SELECT count(*), ifnull(sum(n), 0) FROM "
                "(SELECT max(nbytes) AS n FROM entries WHERE grp IS NOT NULL GROUP BY grp)"
            ).fetchone()
        return Usage(names, nbytes, values, stored)

    def maintain(self) -> list[bytes]:
        self._reopen_if_replaced()
        with self._working() as database:
            over = database.execute("SELECT 1 FROM entries WHERE until <= ? LIMIT 1", (self._clock(),)).fetchone()
        if not over:
            return []

        def work(database: sqlite3.Connection, now: float) -> list[bytes]:
            rows = database.execute("DELETE FROM entries WHERE until <= ? RETURNING grp", (now,)).fetchall()
            return _empty(database, _blobs(rows))

        return self._write(work)

    def clear(self) -> int:
        """Forget everything, and give the file's room back; how many entries there were."""
        with self._working() as database:
            count: int = database.execute("DELETE FROM entries").rowcount
        self.tidy()
        return count

    def tidy(self) -> None:
        with self._working() as database:
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def ping(self) -> None:
        with self._working() as database:
            database.execute("SELECT 1 FROM entries LIMIT 1").fetchone()

    def after_fork(self) -> None:
        if self._connection is not None:
            _abandoned.append(self._connection)
        self._connection = None
        self._lock = threading.RLock()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop()

    @contextmanager
    def _working(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._open()
            except sqlite3.OperationalError as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
                # What is asked is always the same, so it is the file that does not understand it.
                if code == sqlite3.SQLITE_ERROR and not str(error).startswith("cannot"):
                    raise self._damaged(error) from error
                cause = {sqlite3.SQLITE_BUSY: "timeout", sqlite3.SQLITE_FULL: "full",
                         sqlite3.SQLITE_READONLY: "readonly"}.get(code, "error")  # fmt: skip
                raise StoreError(f"{self._path}: {error}", cause=cause) from error
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter in SQLite's own complaint
                raise self._damaged(error) from error
            except OSError as error:
                raise StoreError(f"{self._path}: {error.strerror}") from error

    def _damaged(self, error: Exception) -> StoreError:
        """Make the file anew, the next time; what to raise."""
        self._drop()
        for suffix in BESIDE:
            with suppress(OSError):
                os.unlink(f"{self._path}{suffix}")
        return StoreError(f"{self._path} was damaged and is made anew: {error}", cause="garbage")

    def _write(self, work: Work[T]) -> T:
        """``work`` as one transaction. A full file loses its oldest quarter first."""
        try:
            return self._transaction(work)
        except StoreError as error:
            if error.cause != "full":
                raise

        def make_room(database: sqlite3.Connection, _: float) -> None:
            (count,) = database.execute("SELECT count(*) FROM entries").fetchone()
            oldest = "SELECT name FROM entries ORDER BY born LIMIT ?"
            database.execute(f"DELETE FROM entries WHERE name IN ({oldest})", (max(1, count // 4),))

        self._transaction(make_room)
        return self._transaction(work)

    def _transaction(self, work: Work[T]) -> T:
        with self._working() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                made = work(database, self._clock())
                database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise
            self._cut_log(database)
            return made

    def _cut_log(self, database: sqlite3.Connection) -> None:
        """SQLite starts its log anew only in a moment without readers. Where there are always some it grew to 13 times
        the capacity, so whoever finds it too long waits for them."""
        with suppress(OSError, sqlite3.OperationalError):  # what was written is written
            too_long = os.stat(f"{self._path}-wal").st_size > self._pages // 4 * PAGE_NBYTES
            if too_long and time.monotonic() >= self._cut_after:
                # A reader that does not end, as in a process that was stopped, shall not hold up every write.
                self._cut_after = time.monotonic() + CUT_SECONDS
                ((busy, _, _),) = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                if not busy:
                    self._cut_after = 0.0

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError("this index is closed", cause="closed")
        if self._connection is None:
            self._make()
            database = sqlite3.connect(
                self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
            self._connection = database
            self._file = _identity(self._path)
        return self._connection

    def _make(self) -> None:
        """The file, 0600, if it is not there. SQLite follows links, waits for a pipe's writer, and would make the file
        for everybody to read."""
        make_directory(self._path.parent)
        for suffix in BESIDE:
            there = _status(Path(f"{self._path}{suffix}"))
            if there is not None and not (stat.S_ISREG(there.st_mode) and there.st_uid == os.geteuid()):
                raise StoreError(f"{self._path}{suffix} is no file of this user")
        status = _status(self._path)
        if status is None:
            # Made beside its place: closing the file itself would give up the locks of this process' connections to it.
            made = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.new")
            made.unlink(missing_ok=True)
            os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            with suppress(FileExistsError):
                os.link(made, self._path)
            made.unlink()
        elif status.st_mode & 0o077:
            self._path.chmod(0o600)

    def _prepare(self, database: sqlite3.Connection) -> None:
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                for order in (
                    f"PRAGMA page_size = {PAGE_NBYTES}",
                    "PRAGMA trusted_schema = OFF",
                    "PRAGMA journal_mode = WAL",
                    "PRAGMA synchronous = OFF",
                    f"PRAGMA max_page_count = {self._pages}",
                    f"PRAGMA wal_autocheckpoint = {max(self._pages // 5, 8)}",
                    f"PRAGMA journal_size_limit = {self._pages // 4 * PAGE_NBYTES}",
                ):
                    database.execute(order).fetchall()
                database.executescript(_SCHEMA)
                return
            except sqlite3.OperationalError as error:
                # Several that make the file at once: SQLite does not wait for the change to WAL.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.005)

    def _reopen_if_replaced(self) -> None:
        """Another process may have found the file damaged."""
        with self._lock:
            if self._connection is not None and _identity(self._path) != self._file:
                self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    status = _status(path)
    return None if status is None else (status.st_dev, status.st_ino)


def _lives(born: Any, until: Any, now: float) -> bool:
    return type(born) is float and born <= now and (until is None or (type(until) is float and until > now))


def _body(database: sqlite3.Connection, name: bytes, now: float) -> Any:
    row = database.execute("SELECT body, born, until FROM entries WHERE name = ?", (name,)).fetchone()
    return row[0] if row is not None and _lives(row[1], row[2], now) else None


def _set(database: sqlite3.Connection, item: Item, now: float) -> None:
    database.execute(
        "INSERT OR REPLACE INTO entries (name, body, born, until, grp, nbytes) VALUES (?, ?, ?, ?, ?, ?)",
        (item.name, item.body, now, None if item.life is None else now + item.life, item.group, item.nbytes),
    )


def _groups_of(database: sqlite3.Connection, name: bytes) -> list[bytes]:
    return _blobs(database.execute("SELECT grp FROM entries WHERE name = ?", (name,)))


def _blobs(rows: Iterable[tuple[Any]]) -> list[bytes]:
    """The one column of ``rows``, without what damage has made another type."""
    return [blob for (blob,) in rows if type(blob) is bytes]


def _empty(database: sqlite3.Connection, groups: Sequence[bytes]) -> list[bytes]:
    question = "SELECT 1 FROM entries WHERE grp = ? LIMIT 1"
    return [group for group in set(groups) if database.execute(question, (group,)).fetchone() is None]
