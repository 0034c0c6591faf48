"""What happened, for vLLM's log and its ``/metrics``.

Every event of :data:`kvkeep.events.EVENTS` is a counter ``vllm:kvkeep_<event>_total`` with labels ``tier`` and
``cause``, and, where bytes moved, ``vllm:kvkeep_<event>_bytes_total``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvkeep.events import EVENTS, Counters

_SEPARATOR = "|"


class KVKeepStats(KVConnectorStats):
    """``data``: "event|tier|cause" → [count, bytes], since the last time."""

    data: dict[str, list[int]]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVKeepStats:
        for name, (count, nbytes) in other.data.items():
            mine = self.data.get(name, (0, 0))
            self.data[name] = [mine[0] + count, mine[1] + nbytes]
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name.rstrip(_SEPARATOR).replace(_SEPARATOR, " "): count for name, (count, _) in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class Since:
    """What ``counters`` counted since the last :meth:`take`."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seen: dict[str, tuple[int, int]] = {}

    def take(self) -> KVKeepStats | None:
        data: dict[str, list[int]] = {}
        for row in self._counters.rows():
            name = _SEPARATOR.join((str(row["event"]), str(row["tier"]), str(row["cause"])))
            now = (int(row["count"]), int(row["nbytes"]))
            before = self._seen.get(name, (0, 0))
            if now != before:
                data[name] = [now[0] - before[0], now[1] - before[1]]
                self._seen[name] = now
        return KVKeepStats(data=data) if data else None


class KVKeepMetrics(KVConnectorPromMetrics):
    """The same as Prometheus counters."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        labels = [*labelnames, "tier", "cause"]
        self._counts = {kind: make(f"vllm:kvkeep_{kind}", f"kvkeep: {text}", labels) for kind, text in EVENTS.items()}
        self._nbytes = {
            kind: make(f"vllm:kvkeep_{kind}_bytes", f"kvkeep, in bytes: {text}", labels)
            for kind, text in EVENTS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, (count, nbytes) in transfer_stats_data.items():
            kind, tier, cause = name.split(_SEPARATOR)
            for counter, amount in ((self._counts.get(kind), count), (self._nbytes.get(kind), nbytes)):
                if counter is not None and amount > 0:
                    counter.labels(*engine, tier, cause).inc(amount)
