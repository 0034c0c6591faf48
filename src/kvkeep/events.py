"""What happens inside, told to whoever wants to know.

One protocol with one method. An observer is called on the path of a request: it counts, it does not do I/O.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from typing import Protocol

EVENTS: dict[str, str] = {
    "lookup": "match() calls",
    "hit_tokens": "tokens that match() found",
    "miss_tokens": "tokens of full blocks that match() did not find",
    "load": "blocks handed to an engine, by tier",
    "lost": "blocks that a match promised and a load did not find, by cause",
    "save": "blocks taken from an engine",
    "put": "blocks written, by tier",
    "dropped": "writes given up, by tier and cause",
    "evict": "blocks evicted, by tier; with cause expired: older than the tier's ttl",
    "promote": "blocks copied to a faster tier",
    "corrupt": "stored frames that were not what they should be, by tier and cause",
    "store_error": "failures of a medium, by tier and cause",
    "value_hit": "values found, by get_value and its like",
    "value_miss": "values not found, by cause: absent (or too old), stale, invalidated, lost (its bytes), "
    "locked (its key is not given), corrupt",
    "value_set": "values kept",
    "value_shared": "values kept whose bytes were there already, under another key",
    "value_wait": "times that somebody else was computing what was asked for",
    "restored": "times that a medium came back after it had failed, by tier",
}
"""Every event there is, with its meaning; metrics take their help texts from here."""


class Observer(Protocol):
    """Sees every event. ``kind`` is a key of :data:`EVENTS`."""

    def event(self, kind: str, count: int = 1, *, nbytes: int = 0, tier: str = "", cause: str = "") -> None: ...


class Counters:
    """The observer behind ``stats()``: counts and bytes by (kind, tier, cause)."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._nbytes: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        _counters.add(self)

    def after_fork(self) -> None:
        """In a forked child: a thread that held the lock does not exist there."""
        self._lock = threading.Lock()

    def event(self, kind: str, count: int = 1, *, nbytes: int = 0, tier: str = "", cause: str = "") -> None:
        key = (kind, tier, cause)
        with self._lock:
            self._counts[key] += count
            if nbytes:
                self._nbytes[key] += nbytes

    def count(self, kind: str, *, tier: str | None = None, cause: str | None = None) -> int:
        """Sum over all tiers and causes that are not named."""
        return _sum(self._counts, kind, tier, cause)

    def nbytes(self, kind: str, *, tier: str | None = None, cause: str | None = None) -> int:
        """Likewise in bytes."""
        return _sum(self._nbytes, kind, tier, cause)

    def rows(self) -> list[dict[str, str | int]]:
        """One row for each (event, tier, cause) seen."""
        with self._lock:
            counts, nbytes = dict(self._counts), dict(self._nbytes)
        return [
            {"event": kind, "tier": tier, "cause": cause, "count": count, "nbytes": nbytes.get((kind, tier, cause), 0)}
            for (kind, tier, cause), count in sorted(counts.items())
        ]


_counters: weakref.WeakSet[Counters] = weakref.WeakSet()


def _after_fork() -> None:
    for counters in list(_counters):
        counters.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def event(self, kind: str, count: int = 1, *, nbytes: int = 0, tier: str = "", cause: str = "") -> None:
        for observer in self._observers:
            observer.event(kind, count, nbytes=nbytes, tier=tier, cause=cause)


def _sum(counter: Counter[tuple[str, str, str]], kind: str, tier: str | None, cause: str | None) -> int:
    return sum(
        number
        for (k, t, c), number in list(counter.items())
        if k == kind and (tier is None or t == tier) and (cause is None or c == cause)
    )
