"""The plain key-value face: any bytes, arrays, frames and scalars under names of the caller's, with TTL and tags.

``form`` (and ``frames``, for pandas) say how a value becomes bytes and back, without pickle, ``padding`` which bytes of
an array are none of it; ``index`` is where a name says which bytes are its own now, in memory, in a directory
(``sqlite``) or on a server (``redis``, ``memcached``); ``store`` joins them with the tiers; ``functions`` gives a
function its name, by its ``parts`` and their ``code``; ``face`` is what a cache shows of all this and ``report`` its
figures as a frame.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep import labels
from kvkeep.events import Observer
from kvkeep.tiered import TieredStore

if TYPE_CHECKING:
    from kvkeep.values.store import Values

CLAIMS_FILE = "claims.lock"
SHARE = 64
"""The index of a directory or of memory may take one part in so many of the tier's bytes."""

MIN_NBYTES, MAX_NBYTES = 128 << 10, 64 << 20


INDEXES = {
    "kvkeep.stores.redis": "kvkeep.values.redis:RedisIndex",
    "kvkeep.stores.memcached": "kvkeep.values.memcached:MemcachedIndex",
}
"""A store's module, and the index on the same medium. Beside other servers an index is local."""


def open_values(tiers: TieredStore, *, namespace: bytes, observer: Observer, directory: Path | None) -> Values:
    """The index lies where most can see it: on the server if there is one, else in the directory, else in memory."""
    from kvkeep.breaker import Breakers
    from kvkeep.flight import FileLocks, Flight, Locks, ServerLocks
    from kvkeep.values.index import Index, MemoryIndex
    from kvkeep.values.store import Values, layout_of

    # A directory's index lies within the disk's budget, however large memory is.
    homes = [tier for tier in tiers.tiers if not tier.trusted and tier.owned] or tiers.tiers
    capacity = max(tier.store.capacity or 0 for tier in homes) // SHARE
    capacity = min(max(capacity, MIN_NBYTES), MAX_NBYTES)
    locks: list[Locks] = [] if directory is None else [FileLocks(directory / CLAIMS_FILE)]
    last = tiers.tiers[-1].store
    breakers = Breakers("index", observer)
    index: Index
    if type(last).__module__ in INDEXES:
        module, _, name = INDEXES[type(last).__module__].partition(":")
        index = getattr(import_module(module), name)(last)
        locks.append(ServerLocks(index, breakers=breakers))
    elif directory is not None:
        from kvkeep.values.sqlite import SqliteIndex

        index = SqliteIndex(directory, capacity=capacity)
    else:
        index = MemoryIndex(capacity)
    if directory is not None:
        labels.note(directory, layout_of(1, namespace), "values", tiers.cipher)
    flight = Flight(locks, written=lambda: tiers.writer.flush(0))
    return Values(tiers, index, flight, breakers, namespace=namespace, observer=observer)
