"""What grows with the number of blocks, and what must not: match, start-up, bytes of index."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

import kvkeep
from bench.report import best_of, show
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access
from kvkeep.policies.lru import LRU
from kvkeep.stores.disk import DiskStore

LAYOUT = kvkeep.KVLayout.uniform(
    kvkeep.ModelIdentity(weights="bench", kv_dtype="float32"),
    num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=16,
)  # fmt: skip
PROMPT = np.arange(16 * 200)


class Zeros:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = bytes(len(out))


def key(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(number.to_bytes(8, "little")).digest())


def main() -> None:
    rows = []
    base = 0.0
    with kvkeep.open(memory="2GiB") as root:
        cache = root.bind(LAYOUT)
        cache.save(PROMPT, Zeros())
        stored = 200
        store = root.store.tiers[0].store
        for goal in (200, 1_000, 10_000, 100_000, 1_000_000):
            for number in range(stored, goal):
                store.put(key(number), [b"x" * 700])
            stored = goal
            least, median = best_of(50, lambda: cache.match(PROMPT))
            base = base or least
            micro = [f"{least * 1e6 / 200:.2f}", f"{median * 1e6 / 200:.2f}"]
            rows.append([f"match, {goal:,} blocks stored", *micro, f"{least / base:.2f}"])
    show("match", "match of 200 blocks: µs a block (hashing included)", ["", "best", "median", "× the first"], rows)

    folder = Path(tempfile.mkdtemp(prefix="kvkeep-bench-", dir=Path.home()))
    try:
        store = DiskStore(folder, capacity=1 << 30)
        store.put_many([(key(number), [b"x" * 3000]) for number in range(50_000)])
        store.close()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            store = DiskStore(folder, capacity=1 << 30)
            seconds.append(time.perf_counter() - start)
            store.close()
        tracemalloc.start()
        store = DiskStore(folder, capacity=1 << 30)
        policy = LRU(1 << 30)
        index = tracemalloc.get_traced_memory()[0]
        for number in range(50_000):
            policy.insert(key(number), 3000, Access(0.0))
        both = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        store.close()
        show(
            "start", "50,000 blocks on disk", ["", "figure"],
            [
                ["start-up, best of 5 (s)", f"{min(seconds):.3f}"],
                ["index in memory (bytes a block)", f"{index / 50_000:.0f}"],
                ["LRU, key included (bytes a block)", f"{(both - index) / 50_000:.0f}"],
                ["index on disk (bytes a block)", "64"],
            ],
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
