"""One connection to a Redis or Valkey server, which redis-py has opened, and RESP2 on its socket.

redis-py connects, encrypts, authenticates and discovers; it is not asked to move values, for three reasons that
``bench/remote.py`` and the failure tests hold:

- It hands out ``bytes``, so every value is copied once more, and it packs a frame's header and payload into one.
- Its timeout is for each ``recv``: a server that drips has no deadline. Here a whole exchange has one.
- A connection whose reply was cut or unexpected is out of step with its questions. Here it is never used again.

Any surprise raises :class:`~kvkeep.errors.StoreError`; whoever holds the wire closes it then.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import StoreError

BUFFER_NBYTES = 64 << 10
"""Replies of one line are received here."""

LINE_NBYTES = 512
"""The longest line, and what is received at once where a value follows: its start is copied on."""

GRACE_SECONDS = 0.001

IOV_MAX = 512
"""Buffers a system call, below Linux' 1024."""

_TIMEVAL = struct.Struct("@ll")

_MAY_NOT = "this user may not use a command or key that kvkeep needs (docs/remote.md lists them)"

_CAUSES = {
    b"OOM": ("full", "it is out of memory and evicts nothing: see to its maxmemory and maxmemory-policy"),
    b"READONLY": ("readonly", "it is a read-only replica"),
    b"NOREPLICAS": ("readonly", "it has too few replicas to accept a write"),
    b"MISCONF": ("readonly", "it refuses writes because it cannot save its data to disk"),
    b"NOAUTH": ("auth", "it asks for a password"),
    b"WRONGPASS": ("auth", "wrong user or password"),
    b"NOPERM": ("auth", _MAY_NOT),
    b"The": ("auth", _MAY_NOT),  # "The user executing the script can't run this command or subcommand": Redis
    b"ACL": ("auth", _MAY_NOT),  # "ACL failure in script": Valkey
    b"LOADING": ("unreachable", "it is still loading its data"),
    b"MASTERDOWN": ("unreachable", "a replica without its master"),
    b"CLUSTERDOWN": ("unreachable", "the cluster is down"),
    b"BUSY": ("unreachable", "it is busy with a script"),
    b"TRYAGAIN": ("unreachable", "slots are being moved"),
    b"Protocol": ("error", "it does not take values of this size: CONFIG SET proto-max-bulk-len 512mb"),
    b"DB": ("error", "it has no database of that number"),
    b"unknown": ("error", "it does not know a command that is needed: is it what the address says it is?"),
}


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
    name, _, rest = line[1:].partition(b" ")
    known = rest.split(b" ", 1)[0] if name == b"ERR" else name
    cause, meaning = _CAUSES.get(known, ("error", f"it answered {name[:20].decode('ascii', 'replace')!r}"))
    return StoreError(f"the server refused: {meaning}", cause=cause)


def garbage(line: bytes) -> StoreError:
    return StoreError(f"an answer that is none: {line[:20]!r}", cause="garbage")


class Wire:
    """A connection. One exchange at a time, within the deadline given to :meth:`begin`.

    A plain socket blocks, and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO): a value is then received by one
    system call, where Python's own timeouts poll before each of many.
    """

    def __init__(self, connection: Any) -> None:
        """``connection``: redis-py's, connected."""
        self.asking = b""
        """What has to stand before each further command of a question: ASKING, of a slot that is changing hands."""
        self._deadline = 0.0
        self._grace = False
        self._connection = connection
        self._socket = connection._sock  # redis-py has no public name for it, and has had this one since 2009
        self._encrypted = isinstance(self._socket, ssl.SSLSocket)
        if not self._encrypted:
            self._socket.settimeout(None)
        self._buffer = memoryview(bytearray(BUFFER_NBYTES))
        self._start = self._end = 0
        self._tail = memoryview(bytearray(2))
        self._armed = 0.0

    @property
    def clean(self) -> bool:
        """Is nothing waiting on this idle connection? An answer nobody asked for, or the end, makes it useless."""
        if self._encrypted:  # a session ticket is no answer, but the end is the end
            poll = select.poll()
            poll.register(self._socket, select.POLLRDHUP)
            return not poll.poll(0)
        try:
            self._socket.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def begin(self, deadline: float) -> None:
        """An exchange that ends by ``deadline`` (of ``time.monotonic``)."""
        self._deadline = deadline
        self._grace = True

    def extend(self, seconds: float) -> None:
        """More time, as more bytes are on their way."""
        self._deadline += seconds

    def send(self, buffers: Sequence[Buffer]) -> None:
        """All of ``buffers``, without joining them."""
        rest = [as_bytes(buffer) for buffer in buffers]
        while rest:
            if self._encrypted:
                self._call(self._socket.sendall, rest.pop(0))
                continue
            try:
                sent = self._call(self._socket.sendmsg, rest[:IOV_MAX])
            except StoreError as error:
                raise self._last_words() or error from None
            at = 0
            while at < len(rest) and sent >= len(rest[at]):
                sent -= len(rest[at])
                at += 1
            rest = rest[at:]
            if sent:
                rest[0] = rest[0][sent:]

    def _last_words(self) -> StoreError | None:
        """Why a server that takes no more has hung up, if it said so."""
        try:
            line = self._socket.recv(LINE_NBYTES, socket.MSG_DONTWAIT).partition(b"\r\n")[0]
        except OSError:
            return None
        return refusal(line) if line[:1] == b"-" else None

    def lines(self, count: int) -> list[bytes]:
        """The next ``count`` replies, of one line each."""
        found: list[bytes] = []
        while len(found) < count:
            chunk = bytes(self._buffer[self._start : self._end])
            cut = chunk.rfind(b"\r\n")
            if cut < 0:
                if len(chunk) == BUFFER_NBYTES:
                    raise garbage(chunk)
                self._receive(BUFFER_NBYTES)
                continue
            found += chunk[:cut].split(b"\r\n", count - len(found))
            self._start += cut + 2
            if len(found) > count:
                raise garbage(found[count])
        for line in set(found):
            if line[:1] not in (b"+", b":", b"-") and line != b"$-1":
                raise garbage(line)
        return found

    def outcomes(self, count: int) -> Sequence[bytes | Redirect]:
        """:meth:`lines`, of which none is an error that has to be raised."""
        found = self.lines(count)
        return [outcome(line) for line in found] if any(line[:1] == b"-" for line in set(found)) else found

    def bulk(self, room: Callable[[int], memoryview], largest: int, rate: float) -> memoryview | bytes | None:
        """The next reply: a value, received into ``room(nbytes)``, None where there is none, or an error's line.

        The deadline is extended by the value's size at ``rate`` bytes a second.
        """
        line = self.line()
        if line[:1] == b"-":
            return line
        if line[:1] != b"$" or not line[1:].removeprefix(b"-").isdigit():
            raise garbage(line)
        nbytes = int(line[1:])
        if nbytes == -1:
            return None
        if not 0 <= nbytes <= largest:
            raise garbage(line)
        self.extend(nbytes / rate)
        return self.value(room(nbytes)[:nbytes])

    def value(self, out: memoryview) -> memoryview:
        """Receive a value of ``len(out)`` bytes, and the line's end behind it."""
        nbytes = len(out)
        here = min(nbytes, self._end - self._start)
        out[:here] = self._buffer[self._start : self._start + here]
        self._start += here
        end = min(2, self._end - self._start)
        self._tail[:end] = self._buffer[self._start : self._start + end]
        self._start += end
        missing = [out[here:nbytes], self._tail[end:]]
        while missing[1]:
            got = self._receive_into(missing)
            here = min(got, len(missing[0]))
            missing = [missing[0][here:], missing[1][got - here :]]
        if bytes(self._tail) != b"\r\n":
            raise garbage(bytes(self._tail))
        return out

    def close(self) -> None:
        self._connection.disconnect()

    def line(self) -> bytes:
        """The next line, without its end."""
        while True:
            chunk = bytes(self._buffer[self._start : min(self._end, self._start + LINE_NBYTES)])
            cut = chunk.find(b"\r\n")
            if cut >= 0:
                self._start += cut + 2
                return chunk[:cut]
            if len(chunk) == LINE_NBYTES:
                raise garbage(chunk)
            self._receive(LINE_NBYTES)

    def _receive(self, most: int) -> None:
        """More bytes into the buffer, behind those that have not been used: as many as there are, up to ``most``."""
        if self._start:
            rest = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, len(rest)
            self._buffer[: len(rest)] = rest
        got: int = self._call(self._socket.recv_into, self._buffer[self._end : self._end + most])
        if got == 0:
            raise _ended()
        self._end += got

    def _receive_into(self, places: list[memoryview]) -> int:
        """Until ``places`` are full, or less where the kernel has had enough."""
        if self._encrypted:
            got: int = self._call(self._socket.recv_into, places[0] or places[1])
        else:
            got = self._call(self._socket.recvmsg_into, places, 0, socket.MSG_WAITALL)[0]
        if got == 0:
            raise _ended()
        return got

    def _call(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """One system call, within what is left of the time."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                if not self._grace:
                    raise StoreError("no answer in time", cause="timeout")
                # Once: on a busy machine it may be us who slept, and the answer is there.
                self._grace = False
                left = GRACE_SECONDS
            try:
                if self._encrypted:
                    self._socket.settimeout(left)
                elif not 0.9 * left <= self._armed <= 1.1 * left:  # near enough: this, too, is a system call
                    self._arm(left)
                return operation(*arguments)
            except (TimeoutError, BlockingIOError):  # of the kernel's clock: is ours over, too?
                continue
            except OSError as error:
                raise StoreError(f"the connection broke: {error.strerror or error}", cause="unreachable") from None

    def _arm(self, seconds: float) -> None:
        timeval = _TIMEVAL.pack(int(seconds), max(1, int(seconds % 1 * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._armed = seconds


def _ended() -> StoreError:
    return StoreError("the server closed the connection", cause="unreachable")
