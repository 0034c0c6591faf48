"""A hit of ``memoize`` and ``get_value`` whose value is an array of 1 MB: from memory, a directory, Redis.

Beside each the least that it can cost: copying the array into memory of its own; a GET of as many bytes by redis-py.
Wall time of one call, µs. Goals (issue 4): from memory at most 100 µs, from Redis at most 1.3 of the raw GET.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kvkeep
from bench.report import best_of, show
from kvkeep.stores.redis import connect
from kvkeep.testing.servers import redis_server
from kvkeep.values.functions import Identity
from kvkeep.values.store import pack_key

REPEATS = 300
ARRAY = np.random.default_rng(0).standard_normal(1 << 17)  # 1 MiB
ROUNDS = 3
DISTINCT = 100


def made(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(1 << 17)


def of_array(array: np.ndarray) -> np.ndarray:
    return array + 1


def main() -> None:
    rows: list[list[str]] = []

    def row(place: str, what: str, work: Callable[[], object], before: Callable[[], object], base: float) -> float:
        for _ in range(10):
            before()
            work()
        least, median = min(best_of(REPEATS // ROUNDS, work, before) for _ in range(ROUNDS))
        ratio = f"{median * 1e6 / base:.2f}" if base else "1.00"
        rows.append([place, what, f"{least * 1e6:.0f}", f"{median * 1e6:.0f}", ratio])
        return median * 1e6

    def nothing() -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        for place, where in (("memory", None), ("directory", Path(folder))):
            copy = row(place, "copy of the array", ARRAY.copy, nothing, 0)
            with kvkeep.open(where, memory="64MiB", disk="256MiB") as cache:
                hit = cache.memoize(made)
                hit(3)
                cache.set_value("a", ARRAY)
                row(place, "memoize, small argument", lambda hit=hit: hit(3), nothing, copy)
                row(place, "get_value", lambda cache=cache: cache.get_value("a"), nothing, copy)
                for name, trusted in (("memoize, argument of 1 MB", False), ("the same, trusted", True)):
                    hit = cache.memoize(trusted=trusted)(of_array)
                    hit(ARRAY)
                    row(place, name, lambda hit=hit: hit(ARRAY), nothing, copy)

    with redis_server(maxmemory="1gb") as server:
        for place, url in (("Redis, unix socket", server.unix_url), ("Redis, TCP", server.url)):
            client = connect(url, 5.0)
            for number in range(DISTINCT):
                client.set(f"raw {number}", made(number).tobytes())
            numbers = itertools.cycle(range(DISTINCT))

            def get(client: Any = client, numbers: Iterator[int] = numbers) -> object:
                return client.get(f"raw {next(numbers)}")

            raw = row(place, "raw GET by redis-py", get, nothing, 0)
            patient = url + "?lookup_timeout=5&load_timeout=5"
            with kvkeep.open(patient, memory="512MiB") as cache:
                hit = cache.memoize(made)
                for number in range(DISTINCT):
                    hit(number)
                cache.flush()

                def call(hit: Callable[..., object] = hit, numbers: Iterator[int] = numbers) -> object:
                    return hit(next(numbers))

                row(place, "memoize, value in memory", call, nothing, raw)
                row(place, "a small value", small(cache), nothing, raw)
            # Each value is asked for once by each cache: nothing comes from memory. A raw GET of as many bytes beside
            # each hit, so that a busy moment is unfair to neither: the ratio is the median of those of the pairs.
            pairs: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                with kvkeep.open(patient, memory="512MiB") as cache:
                    hit = cache.memoize(made)
                    cache.get_value("warm")
                    for number in range(DISTINCT):
                        times = [0.0, 0.0]
                        for which in (0, 1) if number % 2 else (1, 0):
                            begin = time.perf_counter()
                            hit(number) if which else get()
                            times[which] = (time.perf_counter() - begin) * 1e6
                        pairs.append((times[0], times[1]))
                    assert cache.counters.count("load", tier="remote") == DISTINCT
            ratio = statistics.median(ours / raw for raw, ours in pairs)
            for what, at, shown in (
                ("raw GET beside it", 0, "1.00"),
                ("memoize, value on the server", 1, f"{ratio:.2f}"),
            ):
                samples = [pair[at] for pair in pairs]
                rows.append([place, what, f"{min(samples):.0f}", f"{statistics.median(samples):.0f}", shown])
            client.close()
    show("values", "Values of 1 MiB, µs a hit", ["where", "what", "min", "median", "ratio"], rows)


def small(cache: kvkeep.KVCache) -> Callable[[], object]:
    cache.set_value("small", 1.5)
    return lambda: cache.get_value("small")


def parts() -> None:
    """Where the time of a hit goes: ``python -c 'from bench.values import parts; parts()'``."""
    with kvkeep.open(memory="64MiB") as cache:
        cache.set_value("a", ARRAY)
        values, identity = cache.values, Identity(made)
        name = values.name(pack_key("a"))
        rows = [
            ["key of a call", *_us(lambda: identity.key((3,), {}))],
            ["name of a key", *_us(lambda: values.name(pack_key("a")))],
            ["look up", *_us(lambda: values.look_up([name]))],
            ["index", *_us(lambda: values.index.get_many([name]))],
            ["copy", *_us(ARRAY.copy)],
        ]
    show("values-parts", "Parts of a hit, µs", ["part", "min", "median"], rows)


def _us(work: Callable[[], object]) -> list[str]:
    return [f"{seconds * 1e6:.1f}" for seconds in best_of(REPEATS, work)]
