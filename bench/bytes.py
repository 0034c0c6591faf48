"""GB/s of the data path: kvkeep's tiers against memcpy, plain O_DIRECT files, safetensors, torch.save and diskcache.

Blocks of SmolLM2-135M in float32 (16 tokens, 737 KB), 400 of them (295 MB). "Cold" drops the page cache first
(needs root; skipped, and said so, without).
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import diskcache
import numpy as np
import safetensors.numpy
import torch

import kvkeep
from bench.report import best_of, console, show

LAYOUT = kvkeep.KVLayout.uniform(
    kvkeep.ModelIdentity(weights="bench", kv_dtype="float32"),
    num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32",
)  # fmt: skip
COUNT = 400
REPEATS = 5


class Rows:
    """Source and sink over one array, a block a row."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def read(self, index: int, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, np.uint8), self.rows[index])

    def write(self, index: int, payload: memoryview) -> None:
        np.copyto(self.rows[index], np.frombuffer(payload, np.uint8))


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def main() -> None:
    rng = np.random.default_rng(0)
    nbytes = LAYOUT.block_nbytes
    rows = rng.standard_normal((COUNT, nbytes // 4), dtype=np.float32).view(np.uint8)
    out = np.ones_like(rows)
    tokens = np.arange(COUNT * LAYOUT.block_tokens)
    folder = Path(tempfile.mkdtemp(prefix="kvkeep-bench-", dir=Path.home()))
    cold = drop_page_cache()
    if not cold:
        console.print("the page cache cannot be dropped here (needs root): cold rows are left out")
    table: list[list[str]] = []
    base: dict[str, float] = {}

    def row(group: str, name: str, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
        least, median = best_of(REPEATS, work, before)
        rate = rows.nbytes / 1e9 / least
        base.setdefault(group, rate)
        table.append([group, name, f"{rate:.2f}", f"{rows.nbytes / 1e9 / median:.2f}", f"{rate / base[group]:.2f}"])

    def load(cache: kvkeep.KVCache) -> None:
        with cache.lease(cache.match(tokens)) as lease:
            assert cache.load(lease, Rows(out)) == len(tokens)

    try:
        row(
            "memory load",
            "memcpy, a block at a time",
            lambda: [np.copyto(o, r) for o, r in zip(out, rows, strict=True)],
        )
        row("memory load", "memcpy, all at once", lambda: np.copyto(out, rows))
        with kvkeep.open(memory="1GiB") as root:
            cache = root.bind(LAYOUT)
            cache.save(tokens, Rows(rows))
            row("memory load", "kvkeep", lambda: load(cache))

        direct = DirectFile(folder / "direct", rows)
        row("disk write", "O_DIRECT, preallocated", direct.write)
        row("disk write", "kvkeep slabs", *writer(folder / "write", rows))
        if cold:
            row("disk load, cold", "O_DIRECT", direct.read)
            with kvkeep.open(folder / "kvkeep", memory=0, disk="1GiB", codec="raw") as root:
                root.bind(LAYOUT).save(tokens, Rows(rows))
            caches: list[kvkeep.KVCache] = []

            def reopen() -> None:
                for opened in caches:
                    opened.close()
                caches[:] = [kvkeep.open(folder / "kvkeep", memory="1MiB", disk="1GiB", codec="raw").bind(LAYOUT)]
                drop_page_cache()

            row("disk load, cold", "kvkeep slabs", lambda: load(caches[0]), reopen)
            names = [f"b{at}" for at in range(COUNT)]
            safetensors.numpy.save_file(dict(zip(names, rows, strict=True)), folder / "all.safetensors")

            def safe() -> None:
                for at, tensor in enumerate(safetensors.numpy.load_file(folder / "all.safetensors").values()):
                    np.copyto(out[at], tensor)

            row("disk load, cold", "safetensors, one file", safe, drop_page_cache)
            torch.save(torch.from_numpy(rows), folder / "all.pt")
            row("disk load, cold", "torch.save, one file", lambda: torch.load(folder / "all.pt"), drop_page_cache)
            with diskcache.Cache(folder / "diskcache", size_limit=4 << 30) as other:
                for at in range(COUNT):
                    other[at] = rows[at].tobytes()
                row("disk load, cold", "diskcache", lambda: [other[at] for at in range(COUNT)], drop_page_cache)
            caches[0].close()
            # Without a memory tier, so that what is read goes through the page cache and stays there.
            caches[:] = [kvkeep.open(folder / "kvkeep", memory=0, disk="1GiB", codec="raw").bind(LAYOUT)]
            load(caches[0])
            row("disk load, warm", "memcpy, all at once", lambda: np.copyto(out, rows))
            row("disk load, warm", "kvkeep slabs", lambda: load(caches[0]))
            row("disk load, warm", "safetensors, one file", safe)
            caches[0].close()
    finally:
        shutil.rmtree(folder)
    title = f"{COUNT} blocks of {nbytes >> 10} KiB; GB/s"
    show("bytes", title, ["what", "how", "best", "median", "× the first"], table)


class DirectFile:
    """The same bytes in one preallocated file, moved with O_DIRECT, a block at a time."""

    def __init__(self, path: Path, rows: np.ndarray) -> None:
        self._count, nbytes = rows.shape
        self._slot = -(-nbytes // 4096) * 4096
        self._buffer = mmap.mmap(-1, self._slot)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, self._slot * self._count)

    def write(self) -> None:
        for at in range(self._count):
            os.pwritev(self._fd, [self._buffer], at * self._slot)

    def read(self) -> None:
        for at in range(self._count):
            os.preadv(self._fd, [self._buffer], at * self._slot)


def writer(path: Path, rows: np.ndarray) -> tuple[Callable[[], None], Callable[[], None]]:
    """Write all blocks to a disk store, sealed as a tier does; and how to empty it again."""
    from kvkeep import frame
    from kvkeep.stores.disk import DiskStore

    store = DiskStore(path, capacity=1 << 30)
    keys = kvkeep.block_keys(LAYOUT, np.arange(COUNT * LAYOUT.block_tokens))

    def write() -> None:
        for start in range(0, COUNT, 8):
            items = []
            for key, row in zip(keys[start : start + 8], rows[start : start + 8], strict=True):
                head = frame.pack(key, LAYOUT.fingerprint, "raw", row.nbytes, row.nbytes)
                frame.seal(head, row.data)
                items.append((key, [bytes(head), row.data]))
            assert store.put_many(items) == len(items)

    def empty() -> None:
        for key in keys:
            store.delete(key)

    return write, empty
