"""kvkeep's own recording: what a cache was asked, written while it works. Hashes, sizes and times, nothing else.

JSON, one line each::

    {"kvkeep": "trace 1", "start": 1732434000.5}               a process begins; counting of requests begins at 0
    {"layout": 0, "block_tokens": 16, "block_nbytes": 589824}  a model's blocks
    {"t": 3.25, "l": 0, "n": 100, "h": 4, "k": "…"}            a lookup: seconds after start, tokens of the prompt, hits
    {"t": 4.5, "l": 0, "n": 132, "h": 6, "r": 0, "p": 6, "k": "…"}
    {"t": 5.0, "l": 0, "s": 1, "r": 1, "p": 8, "k": "…"}       a save of what no lookup had: decoded tokens

``k`` holds the first 8 bytes of each block's key in hex. Keys are chained, so a prefix that an earlier line of the
same process had is not written again: the first ``p`` blocks are those of request ``r``. Who does not know the
namespace cannot test a guessed prompt against a key; without a namespace, anybody who knows the model can.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.keys import BlockKey
from kvkeep.stores.disk import make_directory
from kvkeep.trace.base import Request, Trace

Layout = tuple[int, int]
"""Tokens and bytes of a block."""

log = logging.getLogger("kvkeep")

FORMAT = "trace 1"
KEY_NBYTES = 8
KNOWN_BLOCKS = 1 << 17
"""Blocks remembered, twice, so as to be written once: 30 MB."""


class Recorder:
    """Appends to ``path``. Thread-safe. A second process (a fork too) writes beside it, to ``path.<its id>``.

    A line is one ``write``, so what is written is whole. At ``limit`` bytes, or when the file cannot be written, the
    recording ends with one line in the log; the cache goes on. Raises :class:`ConfigError` if the file cannot be
    opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, limit: int = 1 << 30) -> None:
        self.path = Path(path).expanduser()
        self._limit = limit
        self._lock = threading.Lock()
        self._forked = False
        try:
            self._part: _Part | None = _Part(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: a trace cannot be written there: {error}") from error
        _recorders.add(self)

    def lookup(
        self,
        keys: Sequence[BlockKey],
        *,
        num_tokens: int,
        hit_blocks: int,
        block_tokens: int,
        block_nbytes: int,
        now: float,
    ) -> None:
        """A prompt of ``num_tokens`` was looked up; ``keys`` are those of its full blocks."""
        self._record(keys, (block_tokens, block_nbytes), now, {"n": num_tokens, "h": hit_blocks})

    def save(self, keys: Sequence[BlockKey], *, block_tokens: int, block_nbytes: int, now: float) -> None:
        """Blocks were saved; written down only if no lookup had the last of them."""
        self._record(keys, (block_tokens, block_nbytes), now, {"s": 1})

    def close(self) -> None:
        with self._lock:
            self._end()

    def after_fork(self) -> None:
        """In a forked child: the file is the parent's, and whoever held the lock is not here."""
        self._lock = threading.Lock()
        self._forked = self._forked or self._part is not None
        self._end()

    def _record(self, keys: Sequence[BlockKey], layout: Layout, now: float, facts: dict[str, int]) -> None:
        with self._lock:
            try:
                if self._forked:
                    self._forked = False
                    self._part = _Part(self.path)
                part = self._part
                if part is not None and not part.record(keys, layout, now, facts, self._limit):
                    log.warning("the trace %s has reached its limit of %d bytes and ends here", self.path, self._limit)
                    self._end()
            except OSError as error:
                log.warning("the trace %s ends here, the cache goes on: %s", self.path, error)
                self._end()

    def _end(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.close()


class _Part:
    """What one process writes: the open file, and what is in it already. Any method may raise ``OSError``."""

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            file = os.open(path.with_name(f"{path.name}.{os.getpid()}"), flags, 0o600)
        self._file = file
        self._size = os.fstat(file).st_size
        self._start: float | None = None
        self._layouts: dict[Layout, int] = {}
        self._count = 0
        self._young: dict[bytes, int] = {}  # block → a request that has it
        self._old: dict[bytes, int] = {}

    def record(self, keys: Sequence[BlockKey], layout: Layout, now: float, facts: dict[str, int], limit: int) -> bool:
        """Write one request; False if that would be more than ``limit`` bytes."""
        tails = [key[:KEY_NBYTES] for key in keys]
        known = len(keys)
        while known and (request := self._known(tails[known - 1])) is None:
            known -= 1
        if "s" in facts and known == len(keys):
            return True
        lines: list[dict[str, Any]] = []
        if self._start is None:
            self._start = now
            lines.append({"kvkeep": FORMAT, "start": round(now, 4)})
        number = self._layouts.get(layout)
        if number is None:
            number = self._layouts[layout] = len(self._layouts)
            lines.append({"layout": number, "block_tokens": layout[0], "block_nbytes": layout[1]})
        prefix = {"r": request, "p": known} if known else {}
        suffix = b"".join(tails[known:]).hex()
        lines.append({"t": round(now - self._start, 4), "l": number, **facts, **prefix, "k": suffix})
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        if self._size + len(data) > limit:
            return False
        self._write(data)
        for tail in tails[known:]:
            self._young[tail] = self._count
        self._count += 1
        if len(self._young) > KNOWN_BLOCKS:
            self._young, self._old = {}, self._young
        return True

    def close(self) -> None:
        os.close(self._file)

    def _known(self, tail: bytes) -> int | None:
        found = self._young.get(tail)
        return self._old.get(tail) if found is None else found

    def _write(self, data: bytes) -> None:
        written = os.write(self._file, data)
        if written < len(data):  # a full disk: half a line would make the file unreadable
            os.ftruncate(self._file, self._size)
            raise OSError(f"only {written} of {len(data)} bytes could be written")
        self._size += written


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _after_fork() -> None:
    for recorder in list(_recorders):
        recorder.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def matches(line: dict[str, Any]) -> bool:
    """Does a recording begin like this?"""
    return "kvkeep" in line


def parse(name: str, lines: Iterable[tuple[int, dict[str, Any]]]) -> list[Trace]:
    """One trace for each size of blocks. Raises :class:`ConfigError` that begins with ``line N``."""
    layouts: dict[int, Layout] = {}
    chains: list[tuple[BlockKey, ...]] = []
    requests: dict[Layout, list[Request]] = {}
    start = 0.0
    for number, line in lines:
        try:
            if "kvkeep" in line:
                if line["kvkeep"] != FORMAT:
                    raise ConfigError(f"line {number}: a recording of format {line['kvkeep']!r}; this reads {FORMAT!r}")
                start, layouts, chains = float(line["start"]), {}, []
            elif "layout" in line:
                layouts[line["layout"]] = (int(line["block_tokens"]), int(line["block_nbytes"]))
            else:
                data, known = bytes.fromhex(line["k"]), int(line.get("p", 0))
                fresh = (BlockKey(data[at : at + KEY_NBYTES]) for at in range(0, len(data), KEY_NBYTES))
                chain = (*(chains[line["r"]][:known] if known else ()), *fresh)
                if known < 0 or len(chain) != known + len(data) / KEY_NBYTES:
                    raise ConfigError(f"line {number}: its blocks are not whole")
                chains.append(chain)
                now = start + line["t"]
                if not math.isfinite(now):
                    raise ConfigError(f"line {number}: {now} is no time")
                request = Request(now, chain, int(line.get("n", 0)), 0, known if "s" in line else 0)
                requests.setdefault(layouts[line["l"]], []).append(request)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"line {number}: no line of a kvkeep recording: {error!r}") from error
    many = len(requests) > 1
    return [
        Trace(f"{name} ({tokens} tokens, {nbytes} bytes a block)" if many else name, tokens, found, nbytes)
        for (tokens, nbytes), found in requests.items()
    ]
