"""What the commands know of a cache directory: its path, what lies in it, and whose it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from kvkeep.cli.secrets import Secrets
    from kvkeep.crypt import Cipher
    from kvkeep.frame import Header
    from kvkeep.keys import BlockKey
    from kvkeep.stores.base import Store
    from kvkeep.stores.disk import DiskStore

Place = Annotated[
    str | None,
    typer.Argument(
        metavar="[DIR|URL]",
        help="The cache's directory, or the address of a server, as in redis://host:6379/0. "
        "Default: the directory that the file KVKEEP_CONFIG names, else ~/.cache/kvkeep.",
        show_default=False,
    ),
]

READ_NBYTES = 64 << 20
"""Bytes of frames that a command reads at once."""


def fail(message: str) -> NoReturn:
    """Say what is wrong and end with status 2: the command could not do its work."""
    Console(stderr=True).print(message, style="red", markup=False, highlight=False)
    raise typer.Exit(2)


def resolve(directory: Path | None) -> Path:
    """The directory that the user means; it has to be there."""
    from kvkeep import config
    from kvkeep.errors import ConfigError

    if directory is None:
        try:
            directory = config.load().dir
        except ConfigError as error:
            fail(str(error))
    directory = directory.expanduser()
    if not directory.is_dir():
        fail(f"there is no cache at {directory}")
    return directory


def open_store(directory: Path, *, write: bool = False, clock: Callable[[], float] = time.time) -> DiskStore:
    """The directory's blocks. ``write`` adopts the slabs that no process holds; nothing is evicted or made smaller."""
    from kvkeep.errors import StoreError
    from kvkeep.stores.disk import MIN_CAPACITY, DiskStore

    try:
        store = DiskStore(directory, capacity=0, read_only=True)
        if not write:
            return store
        room = store.nbytes_on_disk
        store.close()
        # At least what is there, so that opening it does not shrink it. Another process may grow it meanwhile: twice.
        return DiskStore(directory, capacity=max(2 * room, MIN_CAPACITY), clock=clock)
    except StoreError as error:
        fail(str(error))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a command works on. ``name`` may be shown: an address holds no password there. ``directory`` is None for a
    server."""

    name: str
    store: Store
    directory: Path | None = None


@contextmanager
def opened(place: str | None, *, write: bool = False, clock: Callable[[], float] = time.time) -> Iterator[Kept]:
    """A directory as :func:`open_store` opens it, or a server. A medium that fails ends the command with a message."""
    from kvkeep.errors import ConfigError, StoreError
    from kvkeep.stores import url

    try:
        if place is not None and url.is_url(place):
            kept = Kept(url.shown(place), url.open_store(place))
            kept.store.ping()
        else:
            if place and "@" in place and not Path(place).exists():  # it may hold a password: not repeated
                fail("there is no such directory; the address of a server has :// in it, as in redis://host:6379/0")
            directory = resolve(Path(place) if place else None)
            kept = Kept(str(directory), open_store(directory, write=write, clock=clock), directory)
        try:
            yield kept
        finally:
            kept.store.close()
    except (ConfigError, StoreError) as error:
        fail(str(error))


def models(directory: Path | None, cipher: Cipher | None = None) -> dict[bytes, dict[str, Any]]:
    """Layout fingerprint → what ``KVCache.bind`` noted about it. A label only: what cannot be read is left out, and a
    server has none. Values of no tenant are known without it; those of a tenant have a layout of their own."""
    from kvkeep import labels
    from kvkeep.values.store import layout_of

    known: dict[bytes, dict[str, Any]] = {layout_of(1, b"").fingerprint: {"description": "values"}}
    return known if directory is None else known | labels.read(directory, cipher)


@dataclass(frozen=True, slots=True)
class Found:
    """One block as it lies on the disk. ``cause`` is empty for a whole frame, else a word of ``frame.CAUSES``; it is
    ``locked`` for one whose key or namespace is not at hand, which is no damage."""

    key: BlockKey
    nbytes: int
    layout: bytes
    cause: str
    stamp: float
    tenant: bytes = b""
    encrypted: bool = False

    @property
    def damaged(self) -> bool:
        return self.cause not in ("", "locked")


def scan(store: Store, *, whole: bool, secrets: Secrets | None = None) -> list[Found]:
    """Every block, read batch by batch. ``whole`` checks the seals too, else the headers only; with the ``secrets``
    of an encrypted cache, what is not encrypted is ``plain``.

    What another process evicts meanwhile is left out: it is gone, not damaged. The check is made twice, since a slot
    may be overwritten between the look at the index and the read.
    """
    stamps = store.stamps()
    items = sorted(store.items(), key=lambda item: stamps.get(item[0], 0.0))
    found: list[Found] = []
    while items:
        batch: list[tuple[BlockKey, int]] = []
        total = 0
        while items and (not batch or total + items[-1][1] <= READ_NBYTES):
            batch.append(items.pop())
            total += batch[-1][1]
        first = _examine(store, batch, stamps, whole, secrets)
        suspects = {block.key for block in first if block.cause}
        again = _examine(store, [item for item in batch if item[0] in suspects], stamps, whole, secrets)
        found += [block for block in first if not block.cause] + again
    return found


def _examine(
    store: Store,
    batch: list[tuple[BlockKey, int]],
    stamps: dict[BlockKey, float],
    whole: bool,
    secrets: Secrets | None,
) -> list[Found]:
    from kvkeep.errors import FrameError

    found = []
    with store.read([key for key, _ in batch]) as values:
        for (key, nbytes), value in zip(batch, values, strict=True):
            if value is None:
                continue
            header, cause = None, ""
            try:
                header = _header(key, value)
                if whole:
                    _check(header, value, secrets)
            except FrameError as error:
                cause = error.cause
            stamp = stamps.get(key, 0.0)
            if header is None:
                found.append(Found(key, nbytes, b"", cause, stamp))
            else:
                found.append(Found(key, nbytes, header.layout, cause, stamp, header.tenant, header.encrypted))
    return found


def _header(key: BlockKey, value: memoryview) -> Header:
    from kvkeep import frame

    header, _ = frame.parse(value)
    frame.check(header, key, header.layout)
    return header


def _check(header: Header, value: memoryview, secrets: Secrets | None) -> None:
    """Raise :class:`FrameError` unless all bytes of the frame are what was written."""
    from kvkeep import frame
    from kvkeep.errors import FrameError

    if secrets is None or secrets.cipher is None:
        frame.verify(value)
    elif not header.encrypted:
        raise FrameError("plain", "not encrypted")
    elif not secrets.opens(header):
        raise FrameError("locked", "no key for it")
    else:
        room = memoryview(bytearray(header.payload_nbytes - frame.TAG_NBYTES))
        secrets.cipher.decrypt(value, secrets.namespaces[header.tenant], room)


def label(layout: bytes, known: dict[bytes, dict[str, Any]]) -> str:
    """What a person calls the model of this layout."""
    facts = known.get(layout)
    return str(facts.get("description", "")) if facts else "unknown"


def plural(count: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
