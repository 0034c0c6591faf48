"""A circuit breaker: a medium that failed is left alone until a probe in the background finds it well again.

Closed: the medium is spoken to. Open: everything is a miss at once, nobody waits. The probe comes from the thread of
:class:`kvkeep.writing.Writer`, after a pause that doubles while the medium keeps failing. Each change of state
is one line in the log ``kvkeep`` and a counter.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvkeep.errors import WRITES_ONLY, NodeError, StoreError
from kvkeep.events import Observer

log = logging.getLogger("kvkeep")

PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


class Breaker:
    """``on_open`` is called when the breaker opens: somebody has to see to it that :meth:`probe` is called."""

    def __init__(self, name: str, observer: Observer) -> None:
        self.on_open: Callable[[], None] | None = None
        self.outages = 0  # that are over
        self._name = name
        self._observer = observer
        self._lock = threading.Lock()
        self._open = False
        self._pause = PAUSE_SECONDS
        self._probe_at = 0.0
        self._closed_at = 0.0

    @property
    def closed(self) -> bool:
        return not self._open

    def failed(self, operation: str, error: StoreError) -> None:
        """The medium did not do as told: open, unless it was one node of several, which is left alone by itself."""
        self._observer.event("store_error", tier=self._name, cause=error.cause)
        if isinstance(error, NodeError):
            return
        now = time.monotonic()
        with self._lock:
            if self._open:
                return
            # A medium that answers the probe and fails again at work is asked less and less often.
            flaps = now - self._closed_at < 2 * self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS) if flaps else PAUSE_SECONDS
            self._probe_at = now + self._pause
            self._open = True
        log.warning("tier %s: %s failed (%s), so it is left alone until it is well: %s",
                    self._name, operation, error.cause, error)  # fmt: skip
        if self.on_open is not None:
            self.on_open()

    def probe(self, ping: Callable[[], None]) -> None:
        """Close if the medium answers. Does nothing while closed or before the pause is over."""
        if not self._open or time.monotonic() < self._probe_at:
            return
        try:
            ping()
        except StoreError:
            with self._lock:
                self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
                self._probe_at = time.monotonic() + self._pause
            return
        with self._lock:
            self._open = False
            self.outages += 1
            self._closed_at = time.monotonic()
        self._observer.event("restored", tier=self._name)
        log.warning("tier %s: is back", self._name)


class Breakers:
    """Of a medium that is still read while it is full or read-only: ``writes`` is then open alone."""

    def __init__(self, name: str, observer: Observer) -> None:
        self.medium = Breaker(name, observer)
        self.writes = Breaker(f"{name} (writes)", observer)

    def watch(self, on_open: Callable[[], None]) -> None:
        """Call ``on_open`` whenever one opens: somebody has to probe it then."""
        self.medium.on_open = self.writes.on_open = on_open

    @property
    def outages(self) -> int:
        """How many are over."""
        return self.medium.outages + self.writes.outages

    @property
    def written(self) -> bool:
        """May it be written to?"""
        return self.medium.closed and self.writes.closed

    def failed(self, operation: str, error: StoreError) -> None:
        """A write or a deletion did, or a claim."""
        (self.writes if error.cause in WRITES_ONLY else self.medium).failed(operation, error)

    def probe(self, ping: Callable[[], None], ping_writes: Callable[[], None]) -> None:
        self.medium.probe(ping)
        self.writes.probe(ping_writes)
