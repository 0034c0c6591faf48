"""Events: what is counted adds up, from many threads, whatever is left unnamed."""

from __future__ import annotations

import threading

from kvkeep.events import EVENTS, Counters, Observers


def test_every_event_has_a_meaning() -> None:
    assert all(name.isidentifier() and meaning for name, meaning in EVENTS.items())


def test_counts_and_bytes() -> None:
    counters = Counters()
    counters.event("put", nbytes=100, tier="memory")
    counters.event("put", 3, nbytes=900, tier="disk")
    counters.event("dropped", tier="disk", cause="queue")
    counters.event("dropped", 2, tier="disk", cause="full")
    assert counters.count("put") == 4
    assert counters.count("put", tier="disk") == 3
    assert counters.nbytes("put") == 1000
    assert counters.nbytes("put", tier="memory") == 100
    assert counters.count("dropped", cause="full") == 2
    assert counters.count("dropped", tier="memory") == 0
    assert counters.count("never") == counters.nbytes("dropped") == 0


def test_rows_are_sorted_and_complete() -> None:
    counters = Counters()
    counters.event("put", tier="memory", nbytes=5)
    counters.event("corrupt", tier="disk", cause="checksum")
    assert counters.rows() == [
        {"event": "corrupt", "tier": "disk", "cause": "checksum", "count": 1, "nbytes": 0},
        {"event": "put", "tier": "memory", "cause": "", "count": 1, "nbytes": 5},
    ]


def test_threads_lose_nothing() -> None:
    counters = Counters()

    def work(tier: str) -> None:
        for _ in range(2000):
            counters.event("load", 2, nbytes=3, tier=tier)

    threads = [threading.Thread(target=work, args=(f"tier {number % 2}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        counters.count("load")
        counters.rows()
    for thread in threads:
        thread.join()
    assert counters.count("load") == 24_000
    assert counters.nbytes("load", tier="tier 1") == 18_000


def test_several_observers_as_one() -> None:
    first, second = Counters(), Counters()
    Observers(first, Observers(), second).event("evict", 4, nbytes=7, tier="disk", cause="capacity")
    for counters in (first, second):
        assert counters.rows() == [
            {"event": "evict", "tier": "disk", "cause": "capacity", "count": 4, "nbytes": 7},
        ]
