"""Plain values beside blocks: matrices, search results, features, a price: python examples/values.py [URL or FOLDER].

With the URL of a Redis or Valkey server, what one process computed every other one finds; run it twice to see that.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd

import kvkeep

A = np.arange(12.0).reshape(3, 4)
B = np.arange(12.0).reshape(4, 3) / 10
computed: list[str] = []  # what was not found


def open_cache(where: str | None) -> kvkeep.KVCache:
    return kvkeep.open(where, memory="64MiB", disk="128MiB")


def matrices(cache: kvkeep.KVCache) -> None:
    """Whole results by the content of their arguments, and a product element by element."""

    @cache.memoize(tags=["matrices"])
    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        computed.append("A × B")
        return a @ b

    @cache.memoize(tags=["matrices"])
    def sum_and_difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        computed.append("A + B, A - B")
        return a + b, a - b

    @cache.memoize(tags=["matrices"])
    def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        computed.append("X W + b")
        return x @ w + b

    for _ in range(2):  # the second time, all three are found
        c = product(A, B)
        total, difference = sum_and_difference(A, B.T)
        y = linear(A, B, np.ones(3))
    assert np.array_equal(c, A @ B)
    assert np.array_equal(total + difference, 2 * A)
    assert np.array_equal(y, A @ B + 1)

    # Element by element: keys are tuples, all are fetched in one round trip, and only what is missing is computed.
    cells = [("C", i, j) for i in range(3) for j in range(3)]
    known = dict(zip(cells, cache.get_values(cells), strict=True))
    missing = {(name, i, j): float(A[i] @ B[:, j]) for (name, i, j), value in known.items() if value is None}
    if missing:
        computed.append(f"{len(missing)} elements")
        cache.set_values(missing)
    again = np.array(cache.get_values(cells)).reshape(3, 3)
    print("C[1] =", np.round(again[1], 2), "largest error", np.abs(again - c).max())


def search(cache: kvkeep.KVCache, query: str) -> pd.DataFrame:
    """Results of a search, for a minute; somebody who asks meanwhile waits for the first one's."""

    def look() -> pd.DataFrame:
        computed.append(f"search {query!r}")
        return pd.DataFrame({"title": ["Rivers of Europe", "The Danube"], "score": [0.92, 0.88]}, index=[17, 4])

    return cache.get_or_compute(("search", query), look, ttl=60, tags=["search"])


def recommend(cache: kvkeep.KVCache, user: int) -> int:
    """Features of a user for a recommender, until the user does something."""

    def features() -> dict[str, object]:
        computed.append(f"features of {user}")
        rng = np.random.default_rng(user)
        return {"vector": rng.standard_normal(16).astype(np.float32), "country": "DE", "seen": [3, 5, 8]}

    known = cache.get_or_compute(("features", user), features, tags=["features", f"user {user}"])
    items = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    scores = items @ known["vector"]
    scores[known["seen"]] = -np.inf
    return int(scores.argmax())


def price(cache: kvkeep.KVCache, symbol: str, ticks: list[float]) -> float:
    """A live price: at most a second old, and for another second the old one while somebody fetches the new one."""

    def fetch() -> float:
        computed.append(f"price of {symbol}")
        return ticks.pop(0)

    return cache.get_or_compute(("price", symbol), fetch, ttl=1.0, stale=1.0)


def main(where: str | None) -> None:
    with open_cache(where) as cache:
        matrices(cache)
        for _ in range(2):
            print("search:", search(cache, "rivers")["title"].tolist())
        print("recommended:", recommend(cache, 7), recommend(cache, 7))
        cache.invalidate("user 7")  # user 7 has seen another film
        print("after invalidate:", recommend(cache, 7))
        ticks = [101.5, 102.25]
        first, second = price(cache, "ACME", ticks), price(cache, "ACME", ticks)
        time.sleep(1.05)
        third = price(cache, "ACME", ticks)
        print("price:", first, second, third)
        cache.set_value("again", A @ B)
        print("equal to A × B:", len(cache.keys_of(A @ B)), "keys, stored once")
        print("computed:", ", ".join(computed))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
