"""What encryption costs: loads of the same blocks, plain and encrypted, by turns in the same run.

Blocks of SmolLM2-135M in float32 (16 tokens, 737 KB), 200 of them (147 MB), from disk and from a Redis on this machine,
into memory that has been touched; stored raw, and lossless as is the default (random values: what a codec's decoding
costs, not what it saves). "Cold" drops the page cache first (needs root; left out, and said so, without).
A load from a server or a cold disk waits for its medium; a load from the page cache does not, and shows all.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import xxhash

import kvkeep
from bench.bytes import LAYOUT, Rows, drop_page_cache
from bench.report import best_of, console, show
from kvkeep.testing.servers import redis_server

COUNT = 200
ROUNDS = 11
KEY = bytes(range(32))
PATIENT = "load_timeout=10&lookup_timeout=2"


def main() -> None:
    rows = np.random.default_rng(0).standard_normal((COUNT, LAYOUT.block_nbytes // 4), np.float32).view(np.uint8)
    out = np.ones_like(rows)
    tokens = np.arange(COUNT * LAYOUT.block_tokens)
    table = [*primitives(rows[0].data)]

    def load(cache: kvkeep.KVCache) -> None:
        with cache.lease(cache.match(tokens)) as lease:
            assert cache.load(lease, Rows(out)) == len(tokens)

    def compare(what: str, caches: list[kvkeep.KVCache], before: Callable[[], object] = lambda: None) -> None:
        """Plain and encrypted by turns, so that both meet the same neighbours on the machine."""
        seconds: list[list[float]] = [[] for _ in caches]
        for cache in caches:
            out[:] = 0
            load(cache)
            assert np.array_equal(out, rows)
        for _ in range(ROUNDS):
            for cache, times in zip(caches, seconds, strict=True):
                before()
                start = time.perf_counter()
                load(cache)
                times.append(time.perf_counter() - start)
        least, median = ([pick(times) for times in seconds] for pick in (min, statistics.median))
        for at, how in enumerate(("plain", "encrypted")):
            rates = [f"{rows.nbytes / 1e9 / figures[at]:.2f}" for figures in (least, median)]
            ratios = [f"{figures[at] / figures[0]:.2f}" for figures in (least, median)]
            table.append([what, how, *rates, *ratios])

    def filled(stack: ExitStack, place: str, codec: str, encryption: Callable[[], bytes] | None) -> kvkeep.KVCache:
        """Saved, then opened anew with next to no memory: every load comes from below."""
        disk = "1GiB" if "://" not in place else 0
        with kvkeep.open(place, memory="1GiB", disk=disk, codec=codec, encryption=encryption) as root:
            assert root.bind(LAYOUT).save(tokens, Rows(rows)) == COUNT
            assert root.flush(60)
        return stack.enter_context(
            kvkeep.open(place, memory="1MiB", disk=disk, codec=codec, encryption=encryption)
        ).bind(LAYOUT)

    home = Path(tempfile.mkdtemp(prefix="kvkeep-bench-", dir=Path.home()))
    try:
        cold = drop_page_cache()
        if not cold:
            console.print("the page cache cannot be dropped here (needs root): the cold rows are left out")
        for codec in ("raw", "lossless"):
            with ExitStack() as stack:
                both = [
                    filled(stack, str(home / f"{codec}{number}"), codec, encryption)
                    for number, encryption in enumerate((None, lambda: KEY))
                ]
                if cold:
                    compare(f"{codec}, disk, cold", both, drop_page_cache)
                compare(f"{codec}, disk, warm", both)
        with ExitStack() as stack:
            server = stack.enter_context(redis_server(maxmemory="2gb"))
            for codec in ("raw", "lossless"):
                for transport, url in (("unix", server.unix_url), ("tcp", server.url)):
                    both = [
                        filled(stack, f"{url}?prefix={codec}{transport}{number}&{PATIENT}", codec, encryption)
                        for number, encryption in enumerate((None, lambda: KEY))
                    ]
                    compare(f"{codec}, Redis, {transport}", both)
    finally:
        shutil.rmtree(home)
    title = f"{COUNT} blocks of {LAYOUT.block_nbytes >> 10} KiB; GB/s; time against plain, {os.cpu_count()} cores"
    show("crypt", title, ["what", "how", "best", "median", "× best", "× median"], table)


def primitives(block: memoryview) -> list[list[str]]:
    """What a block's bytes cost in the processor's cache."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    aead, nonce, room = AESGCM(KEY), bytes(12), bytearray(len(block) + 16)
    out = bytearray(len(block))
    aead.encrypt_into(nonce, block, None, room)
    works: dict[str, Callable[[], object]] = {
        "xxh3-128": lambda: xxhash.xxh3_128_digest(block),
        "AES-256-GCM encrypt": lambda: aead.encrypt_into(nonce, block, None, room),
        "AES-256-GCM decrypt": lambda: aead.decrypt_into(nonce, room, None, out),
    }
    lines = []
    for name, work in works.items():
        least, median = best_of(50, work)
        lines.append(["one block", name, *(f"{len(block) / 1e9 / seconds:.2f}" for seconds in (least, median)), "", ""])
    return lines
