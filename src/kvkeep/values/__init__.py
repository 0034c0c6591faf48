"""The plain key-value face: any bytes, arrays, frames and scalars under names of the caller's, with TTL and tags.

``form`` (and ``frames``, for pandas) say how a value becomes bytes and back, without pickle; ``index`` is where a name
says which bytes are its own now, in memory, in a directory (``sqlite``) or on a server (``redis``); ``store`` joins
them with the tiers; ``functions`` gives a function its name; ``face`` is what a cache shows of all this.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvkeep.events import Observer
from kvkeep.tiered import TieredStore

if TYPE_CHECKING:
    from kvkeep.values.store import Values

CLAIMS_FILE = "claims.lock"
SHARE = 64
"""The index of a directory or of memory may take one part in so many of the tier's bytes."""

MIN_NBYTES, MAX_NBYTES = 128 << 10, 64 << 20


def open_values(
    tiers: TieredStore, *, namespace: bytes, observer: Observer, directory: Path | None, remote: str | None
) -> Values:
    """The index lies where most can see it: on the server if there is one, else in the directory, else in memory."""
    from kvkeep.flight import FileLocks, Flight, Locks
    from kvkeep.values.index import Index, MemoryIndex
    from kvkeep.values.store import Values

    locks: list[Locks] = [] if directory is None else [FileLocks(directory / CLAIMS_FILE)]
    capacity = max(tier.store.capacity or 0 for tier in tiers.tiers) // SHARE
    capacity = min(max(capacity, MIN_NBYTES), MAX_NBYTES)
    index: Index
    if directory is not None:
        from kvkeep.values.sqlite import SqliteIndex

        index = SqliteIndex(directory, capacity=capacity)
    else:
        index = MemoryIndex(capacity)
    return Values(tiers, index, Flight(locks, written=lambda: tiers.flush(0)), namespace=namespace, observer=observer)
