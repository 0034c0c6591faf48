"""One connection to a Redis or Valkey server, which redis-py has opened, and RESP2 on its socket.

redis-py connects, encrypts, authenticates and discovers; it is not asked to move values, for three reasons that
``bench/remote.py`` and the failure tests hold:

- It hands out ``bytes``, so every value is copied once more, and it packs a frame's header and payload into one.
- Its timeout is for each ``recv``: a server that drips has no deadline. Here a whole exchange has one.
- A connection whose reply was cut or unexpected is out of step with its questions. Here it is never used again.

Any surprise raises :class:`~kvkeep.errors.StoreError`; whoever holds the wire closes it then.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import StoreError

if TYPE_CHECKING:
    from redis.connection import AbstractConnection

BUFFER_NBYTES = 64 << 10
"""Replies are received here. The start of a value lands here too and is copied on: a few percent of it."""

IOV_MAX = 512
"""Buffers a system call, below Linux' 1024."""

_CAUSES = {
    b"OOM": ("full", "it is out of memory and its maxmemory-policy evicts nothing"),
    b"READONLY": ("readonly", "it is a read-only replica"),
    b"NOREPLICAS": ("readonly", "it has too few replicas to accept a write"),
    b"MISCONF": ("readonly", "it refuses writes because it cannot save its data to disk"),
    b"NOAUTH": ("auth", "it asks for a password"),
    b"WRONGPASS": ("auth", "wrong user or password"),
    b"NOPERM": ("auth", "this user may not use a command or key that kvkeep needs (docs/remote.md lists them)"),
    b"LOADING": ("unreachable", "it is still loading its data"),
    b"MASTERDOWN": ("unreachable", "a replica without its master"),
    b"CLUSTERDOWN": ("unreachable", "the cluster is down"),
    b"BUSY": ("unreachable", "it is busy with a script"),
    b"TRYAGAIN": ("unreachable", "slots are being moved"),
    b"MOVED": ("error", "it is a node of a cluster: say redis+cluster://"),
    b"ASK": ("error", "it is a node of a cluster: say redis+cluster://"),
}


_ONE_LINE = (b"+", b":", b"-")


class Redirect(NamedTuple):
    """This key is not here: ask there, for good (MOVED) or this once (ASK)."""

    host: str
    port: int
    asking: bool


def word(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


def pack(*words: bytes) -> bytes:
    """A command."""
    return b"*%d\r\n%b" % (len(words), b"".join(map(word, words)))


def outcome(line: bytes) -> bytes | Redirect:
    """A reply of one line, if it is not an error that has to be raised."""
    if line[:1] != b"-":
        return line
    if not line.startswith((b"-MOVED ", b"-ASK ")):
        raise refusal(line)
    words = line.split(b" ")
    host, _, port = words[-1].rpartition(b":")
    if len(words) != 3 or not port.isdigit():
        raise garbage(line)
    return Redirect(host.decode("ascii", "replace"), int(port), words[0] == b"-ASK")


def refusal(line: bytes) -> StoreError:
    """What an error reply means. Its text is not repeated: it may name a user, or be anything at all."""
    name = line[1:].split(b" ", 1)[0]
    cause, meaning = _CAUSES.get(name, ("error", f"it answered {name[:20].decode('ascii', 'replace')!r}"))
    return StoreError(f"the server refused: {meaning}", cause=cause)


def garbage(line: bytes) -> StoreError:
    return StoreError(f"an answer that is none: {line[:20]!r}", cause="garbage")


class Wire:
    """A connection. One exchange at a time, within :attr:`deadline` (of ``time.monotonic``)."""

    def __init__(self, connection: AbstractConnection) -> None:
        """``connection`` is connected."""
        self.deadline = 0.0
        self._connection: Any = connection
        self._socket: Any = connection._sock  # redis-py has no public name for it, and has had this one since 2009
        self._encrypted = isinstance(self._socket, ssl.SSLSocket)
        self._buffer = memoryview(bytearray(BUFFER_NBYTES))
        self._start = self._end = 0

    @property
    def clean(self) -> bool:
        """Is nothing waiting on this idle connection? An answer nobody asked for, or the end, makes it useless."""
        if self._encrypted:  # a session ticket is no answer
            return True
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send(self, buffers: Sequence[Buffer]) -> None:
        """All of ``buffers``, without joining them."""
        try:
            if self._encrypted:
                for buffer in buffers:
                    self._limit()
                    self._socket.sendall(buffer)
                return
            rest = [as_bytes(buffer) for buffer in buffers]
            while rest:
                self._limit()
                sent = self._socket.sendmsg(rest[:IOV_MAX])
                at = 0
                while at < len(rest) and sent >= len(rest[at]):
                    sent -= len(rest[at])
                    at += 1
                rest = rest[at:]
                if sent:
                    rest[0] = rest[0][sent:]
        except TimeoutError:
            raise _too_slow() from None
        except OSError as error:
            raise StoreError(f"the connection broke: {error.strerror or error}", cause="unreachable") from None

    def lines(self, count: int) -> list[bytes]:
        """The next ``count`` replies, of one line each."""
        found: list[bytes] = []
        while len(found) < count:
            chunk = bytes(self._buffer[self._start : self._end])
            cut = chunk.rfind(b"\r\n")
            if cut < 0:
                if len(chunk) == BUFFER_NBYTES:
                    raise garbage(chunk)
                self._receive()
                continue
            found += chunk[:cut].split(b"\r\n", count - len(found))
            self._start += cut + 2
            if len(found) > count:
                raise garbage(found[count])
        for line in found:
            if line[:1] not in _ONE_LINE and line != b"$-1":
                raise garbage(line)
        return found

    def bulk(self, room: Callable[[int], memoryview], largest: int, rate: float) -> memoryview | bytes | None:
        """The next reply: a value, received into ``room(nbytes)``, None where there is none, or an error's line.

        The deadline is extended by the value's size at ``rate`` bytes a second.
        """
        line = self._line()
        if line[:1] == b"-":
            return line
        if line[:1] != b"$" or not line[1:].removeprefix(b"-").isdigit():
            raise garbage(line)
        nbytes = int(line[1:])
        if nbytes == -1:
            return None
        if not 0 <= nbytes <= largest:
            raise garbage(line)
        self.deadline += nbytes / rate
        out = room(nbytes)
        here = min(nbytes, self._end - self._start)
        out[:here] = self._buffer[self._start : self._start + here]
        self._start += here
        while here < nbytes:
            here += self._receive_into(out[here:nbytes])
        if self._line():
            raise garbage(b"no end of a value")
        return out[:nbytes]

    def close(self) -> None:
        self._connection.disconnect()

    def _line(self) -> bytes:
        while True:
            chunk = bytes(self._buffer[self._start : min(self._end, self._start + 512)])
            cut = chunk.find(b"\r\n")
            if cut >= 0:
                self._start += cut + 2
                return chunk[:cut]
            if len(chunk) == 512:
                raise garbage(chunk)
            self._receive()

    def _receive(self) -> None:
        """More bytes into the buffer, behind those that have not been used."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == BUFFER_NBYTES:
            rest = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, len(rest)
            self._buffer[: len(rest)] = rest
        self._end += self._receive_into(self._buffer[self._end :])

    def _receive_into(self, out: memoryview) -> int:
        try:
            self._limit()
            nbytes: int = self._socket.recv_into(out)
        except TimeoutError:
            raise _too_slow() from None
        except OSError as error:
            raise StoreError(f"the connection broke: {error.strerror or error}", cause="unreachable") from None
        if nbytes == 0:
            raise StoreError("the server closed the connection", cause="unreachable")
        return nbytes

    def _limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def _too_slow() -> StoreError:
    return StoreError("no answer in time", cause="timeout")
