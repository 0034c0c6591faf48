"""Single-flight: of several that miss the same thing at the same time, one computes and the others wait for it.

A claim is a name that at most one holder has at a time: among the threads of a process, among the processes that use a
directory (a lock on one byte of a file: it ends with its holder, however that dies), and among the machines that use a
server (an entry with a token that runs out unless it is renewed). Nobody waits longer than they said, and a place that
fails is left out: then two may compute, which costs time and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvkeep.breaker import Breakers
from kvkeep.errors import StoreError

CLAIM_SECONDS = 3.0
"""How long a claim on a server outlives its holder."""

LINGER_SECONDS = 10.0
"""How long a claim is kept at most after its work is done, until what was made can be seen by others."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.05
LOOK_BACK = 1024
"""Blocks before the first missing one at which somebody may still be writing."""

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux

Lock = Callable[[], None]
"""Gives a lock back."""


class Ledger(Protocol):
    """What a server has to offer: :class:`kvkeep.values.index.Index` does. All raise ``StoreError``."""

    def add(self, name: bytes, body: bytes, life: float) -> bool: ...
    def renew(self, name: bytes, body: bytes, life: float) -> bool: ...
    def release(self, name: bytes, body: bytes) -> bool: ...
    def contains_any(self, names: Sequence[bytes]) -> bool: ...


class Locks(ABC):
    """A place where names can be locked. A place that is out of order raises :class:`StoreError`."""

    @abstractmethod
    def lock(self, name: bytes) -> Lock | None:
        """Lock ``name``, or None if somebody else has. Does not wait."""

    @abstractmethod
    def locked(self, names: Sequence[bytes]) -> bool:
        """Has anybody locked one of these?"""


class FileLocks(Locks):
    """Among the processes that use ``path``: one file, in which a name is a byte."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lock(self, name: bytes) -> Lock | None:
        # A descriptor for each claim: the lock belongs to it, and ends when its last copy is closed.
        descriptor = self._open()
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(name, fcntl.F_WRLCK))
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, (BlockingIOError, PermissionError)):
                return None
            raise StoreError(f"{self._path}: {error.strerror}") from error

        def unlock() -> None:
            with suppress(OSError):  # first by name: a forked child may have a copy of the descriptor
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(name, fcntl.F_UNLCK))
            os.close(descriptor)

        return unlock

    def locked(self, names: Sequence[bytes]) -> bool:
        descriptor = self._open()
        try:
            for name in names:
                question = _lock(name, fcntl.F_WRLCK)
                answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
                if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                    return True
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        return False

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error


def _lock(name: bytes, kind: int) -> bytes:
    byte = int.from_bytes(name[:8], "little") >> 2  # two names at one byte wait for each other: one in 2^62
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


class ServerLocks(Locks):
    """Among the machines that use a server. Claims are renewed by the :class:`Flight` that holds them."""

    def __init__(self, ledger: Ledger, seconds: float = CLAIM_SECONDS, *, breakers: Breakers | None = None) -> None:
        """``breakers``: the server's, if it has any. While one is open nobody waits for the server to take a claim."""
        self._ledger = ledger
        self.seconds = seconds
        self._breakers = breakers
        self._held: dict[bytes, bytes] = {}

    def lock(self, name: bytes) -> Lock | None:
        entry, token = _entry_of(name), secrets.token_bytes(16)
        with self._asking(writes=True):
            if not self._ledger.add(entry, token, self.seconds):
                return None
        self._held[entry] = token

        def unlock() -> None:
            self._held.pop(entry, None)
            with suppress(StoreError), self._asking(writes=True):  # else it runs out by itself
                self._ledger.release(entry, token)

        return unlock

    def locked(self, names: Sequence[bytes]) -> bool:
        with self._asking():
            return self._ledger.contains_any([_entry_of(name) for name in names])

    @contextmanager
    def _asking(self, *, writes: bool = False) -> Iterator[None]:
        breakers = self._breakers
        if breakers is None:
            yield
            return
        if not (breakers.written if writes else breakers.medium.closed):
            raise StoreError("the server is left alone", cause="unavailable")
        try:
            yield
        except StoreError as error:
            breakers.failed("a claim", error)
            raise

    @property
    def idle(self) -> bool:
        return not self._held

    def renew(self) -> None:
        for entry, token in list(self._held.items()):
            with suppress(StoreError):
                self._ledger.renew(entry, token, self.seconds)

    def forget(self) -> None:
        """What is held is somebody else's: the parent's, in a forked child."""
        self._held = {}


def _entry_of(name: bytes) -> bytes:
    return hashlib.sha256(b"kvkeep claim 1" + name).digest()


@dataclass(eq=False)
class Claim:
    """A name that is ours until :meth:`Flight.release`."""

    name: bytes
    locks: list[Lock] = field(default_factory=list)
    done: float = 0.0


class Flight:
    """``outer`` are the places beyond this process, asked in order; ``written`` tells whether what this process has
    made can be seen by others, so that a claim is not given back before."""

    def __init__(self, outer: Sequence[Locks] = (), *, written: Callable[[], bool] = lambda: True) -> None:
        self._outer = list(outer)
        self._written = written
        self._start()
        _open.add(self)

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._held: set[bytes] = set()
        self._lingering: list[Claim] = []
        self._thread: threading.Thread | None = None

    def take(self, name: bytes) -> Claim | None:
        """Claim ``name`` now, or None if somebody else has it."""
        with self._changed:
            if name in self._held:
                return None
            self._held.add(name)
        claim = Claim(name)
        for place in self._outer:
            try:
                lock = place.lock(name)
            except StoreError:
                continue
            if lock is None:
                self.drop(claim)
                return None
            claim.locks.append(lock)
        if any(isinstance(place, ServerLocks) and not place.idle for place in self._outer):
            self._run()
        return claim

    def release(self, claim: Claim) -> None:
        """Give it back: here at once, to others once they can see what was made. See also :meth:`drop`."""
        if claim.locks and not self._written():
            claim.done = time.monotonic()
            with self._changed:
                self._held.discard(claim.name)
                self._lingering.append(claim)
                self._changed.notify_all()
            self._run()
        else:
            self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """Give it back at once: nothing was made."""
        for lock in claim.locks:
            lock()
        claim.locks.clear()
        with self._changed:
            self._held.discard(claim.name)
            self._changed.notify_all()

    def wait(self, name: bytes, seconds: float, ready: Callable[[], bool]) -> Claim | None:
        """Claim ``name`` as soon as it is free. None when ``ready`` says so, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            claim = self.take(name)
            if claim is not None:
                return claim
            left = deadline - time.monotonic()
            if ready() or left <= 0:
                return None
            with self._changed:
                if name not in self._held or not self._outer:
                    self._changed.wait(min(pause, left))
                else:  # a thread of ours has it and will wake us
                    self._changed.wait(min(LONGEST_PAUSE_SECONDS, left))
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)

    @contextmanager
    def prefix(self, keys: Sequence[bytes], locate: Callable[[], int], seconds: float) -> Iterator[bool]:
        """Is what is missing of ``keys`` ours to compute? Waits up to ``seconds`` while somebody else is at it.

        ``locate`` says how many of ``keys`` are there, from the front. The claim is on the first missing one, which
        all who share a prefix miss; who finds a part of it looks whether somebody is still writing the rest.
        """
        deadline = time.monotonic() + seconds
        claim = None
        here = locate()
        while here < len(keys):
            name = self._claimed(keys[max(0, here - LOOK_BACK) : here]) or keys[here]
            claim = self.wait(name, deadline - time.monotonic(), lambda: locate() == len(keys))
            now = locate()
            if claim is None or (name == keys[here] and now == here):
                break
            self.drop(claim)  # the other one is done: look again
            claim = None
            here = now
        try:
            yield claim is not None
        finally:
            if claim is not None:
                self.release(claim)

    def _claimed(self, names: Sequence[bytes]) -> bytes | None:
        """One of ``names`` that somebody holds."""
        if not names:
            return None
        with self._changed:
            for name in names:
                if name in self._held:
                    return name
        for place in self._outer:
            with suppress(StoreError):
                if place.locked(names):
                    return next((name for name in names if place.locked([name])), None)
        return None

    def _run(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="kvkeep-claims", daemon=True)
                self._thread.start()

    def _keep(self) -> None:
        """The thread: renews what is held on a server, ends what lingers, and goes when there is neither."""
        servers = [place for place in self._outer if isinstance(place, ServerLocks)]
        renew_at = 0.0
        while True:
            with self._changed:
                if not self._lingering and all(place.idle for place in servers):
                    self._thread = None
                    return
                self._changed.wait(0.01 if self._lingering else 0.1)
                lingering = list(self._lingering)
            now = time.monotonic()
            if lingering:
                written = self._written()
                for claim in lingering:
                    if written or now - claim.done > LINGER_SECONDS:
                        with self._changed:
                            self._lingering.remove(claim)
                        for lock in claim.locks:
                            lock()
            if now >= renew_at:
                for place in servers:
                    place.renew()
                renew_at = now + min((place.seconds for place in servers), default=CLAIM_SECONDS) / 3

    def after_fork(self) -> None:
        """In a forked child: what the parent claimed is the parent's."""
        self._start()
        for place in self._outer:
            if isinstance(place, ServerLocks):
                place.forget()


_open: weakref.WeakSet[Flight] = weakref.WeakSet()


def _after_fork() -> None:
    for flight in list(_open):
        flight.after_fork()


os.register_at_fork(after_in_child=_after_fork)
