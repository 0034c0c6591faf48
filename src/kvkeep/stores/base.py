"""The contract of a store: a medium that maps keys to immutable values.

- Values are content-addressed: the first write wins, so there is no update to get wrong.
- ``put`` is atomic, also across a crash: afterwards a key is absent or whole.
- The caller's buffers are never kept.
- Missing is ``None``. A broken medium raises :class:`~kvkeep.errors.StoreError`. Any key may vanish at any time.
- Every method may be called from any thread.
- No tokens, codecs, TTL or statistics in here.

A store of fixed size has a ``capacity`` and raises :class:`~kvkeep.errors.StoreFullError` rather than exceed it:
whoever owns it (:class:`kvkeep.tier.Tier`) evicts and tries again. A store whose medium bounds itself, as a server
does, has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import StoreFullError
from kvkeep.keys import BlockKey

Item = tuple[BlockKey, Sequence[Buffer]]
"""A key and its value in parts, to be stored one after the other."""


class Owner(Protocol):
    """Who evicts from a store: is told which keys it answers for.

    Called by the store from inside its methods, so an owner must not call the store back from here.
    """

    def gained(self, items: Sequence[tuple[BlockKey, int]]) -> None:
        """These keys (with stored bytes) are now the owner's to evict, oldest first."""

    def lost(self, keys: Sequence[BlockKey]) -> None:
        """These are no longer: another process took them over, or the medium lost them."""


class Store(ABC):
    """A medium. Five methods to write; the others have defaults that a medium overrides when it does better."""

    capacity: int | None = None
    """Bytes that this store will never exceed, or ``None`` where the medium bounds itself."""

    @abstractmethod
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        """Store the concatenation of ``parts``; nothing happens if ``key`` is there already.

        Raises ``StoreFullError`` (no room now), ``ValueTooLargeError`` (never) or another ``StoreError``.
        """

    @abstractmethod
    def get(self, key: BlockKey) -> Buffer | None:
        """The value, in memory of its own."""

    @abstractmethod
    def contains(self, key: BlockKey) -> bool:
        """Is it there, as far as one can know without reading it?"""

    @abstractmethod
    def delete(self, key: BlockKey) -> bool:
        """Forget ``key``; was it there, and this store's to delete?"""

    @abstractmethod
    def items(self) -> Iterator[tuple[BlockKey, int]]:
        """Every key with its value's bytes, oldest first where the medium knows. A snapshot: safe against changes."""

    def replace(self, key: BlockKey, parts: Sequence[Buffer]) -> bool:
        """Store the same content in another form, as when it is encrypted anew; was ``key`` there, and this store's to
        delete? Not for a store in use by an owner, whom nobody tells.

        By default the old value goes first, so a kill in between loses it. Raises ``StoreFullError`` if there is no
        room even so: then both are gone.
        """
        if not self.delete(key):
            return False
        self.put(key, parts)
        return True

    def get_into(self, key: BlockKey, out: memoryview) -> int | None:
        """Copy the value to the start of ``out``; its bytes, or ``None`` if missing. Raises ``ValueError`` if
        ``out`` is too small, with nothing written."""
        with self.read([key]) as (value,):
            if value is None:
                return None
            if len(value) > len(out):
                raise ValueError(f"a value of {len(value)} bytes does not fit into {len(out)}")
            out[: len(value)] = value
            return len(value)

    def read(self, keys: Sequence[BlockKey]) -> AbstractContextManager[list[memoryview | None]]:
        """The values of ``keys`` for reading inside the ``with`` block, without a copy where the medium can.

        Do not keep the views: their memory is reused afterwards.
        """
        return _read(self, keys)

    def get_many(self, keys: Sequence[BlockKey]) -> list[Buffer | None]:
        return [self.get(key) for key in keys]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [self.contains(key) for key in keys]

    def put_many(self, items: Sequence[Item]) -> int:
        """Store from the front until there is no room; how many of ``items`` are stored now.

        A medium keeps the values of one call side by side where it can.
        """
        for done, (key, parts) in enumerate(items):
            try:
                self.put(key, parts)
            except StoreFullError:
                return done
        return len(items)

    def heads(self, keys: Sequence[BlockKey], nbytes: int) -> list[bytes | None]:
        """The first ``nbytes`` of each value, or all of a shorter one."""
        with self.read(keys) as values:
            return [None if value is None else bytes(value[:nbytes]) for value in values]

    def prefetch(self, keys: Sequence[BlockKey]) -> None:  # noqa: B027  # a hint: most media ignore it
        """A hint that these will be read soon, in this order. Returns at once."""

    def ping(self) -> None:  # noqa: B027
        """Does the medium answer? Raises ``StoreError`` if not. Asked in the background after it has failed."""

    def ping_writes(self) -> None:  # noqa: B027
        """Can it be written to? Raises ``StoreError`` if not. Asked in the background after only a write has failed."""

    def stamps(self) -> dict[BlockKey, float]:
        """When each value was written, in seconds since 1970, where the medium knows."""
        return {}

    def attach(self, owner: Owner) -> None:
        """Make ``owner`` the one who evicts here, and tell it what is there."""
        owner.gained(list(self.items()))

    def maintain(self) -> bool:
        """Called about once a second from a background thread: housekeeping that must not fall into a request. Is there
        more to do, so that it should be called again soon, though not while somebody loads? Raises ``StoreError`` to
        have a failure counted and logged that the store has got over by itself."""
        return False

    def after_fork(self) -> None:  # noqa: B027
        """Called in a forked child, which has one thread: drop what belongs to the parent and start clean."""

    def close(self) -> None:  # noqa: B027
        """Give back files and connections. Using a closed store raises ``StoreError``."""


@contextmanager
def _read(store: Store, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
    yield [None if value is None else as_bytes(value) for value in store.get_many(keys)]
