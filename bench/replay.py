"""What a replay costs, and what a policy costs a cache: seconds a trace, µs a block access, bytes a block.

Ratios against LRU in the same run. Process time, so that neighbours on the machine count less.
"""

from __future__ import annotations

import gc
import hashlib
import mmap
import multiprocessing
import time
from pathlib import Path

from bench.report import show
from kvkeep import registry
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.sim.replay import hits_of
from kvkeep.trace import read

CHAT = Path("tests/traces/mooncake_conversation_trace.jsonl.gz")
RESIDENT = 1_000_000
ACCESSES = 200_000
PROMPT_BLOCKS = 20


def main() -> None:
    names = [name for name in registry.names("policies") if name != "unlimited"]
    names.insert(0, names.pop(names.index("lru")))
    names.append("leaf-lru")
    _replays(names)
    _production(names)


def _replays(names: list[str]) -> None:
    begin = time.process_time()
    trace = read(CHAT)
    reading = time.process_time() - begin
    capacity = trace.unique_blocks // 50
    rows, base = [], 0.0
    for name in names:
        times = []
        for _ in range(3 if name in ("lru", "hazard") else 1):
            policy: EvictionPolicy = registry.lookup("policies", name)(capacity)
            begin = time.process_time()
            hits_of(trace, policy, capacity)
            times.append(time.process_time() - begin)
        least = min(times)
        base = base or least
        rows.append([name, f"{least:.2f}", f"{least * 1e6 / trace.accesses:.2f}", f"{least / base:.2f}"])
    rows.append(["reading the file", f"{reading:.2f}", "", f"{reading / base:.2f}"])
    show(
        "replay",
        f"replay of the chat trace at 2% ({trace.accesses:,} block accesses), one core",
        ["policy", "seconds", "µs an access", "× LRU"],
        rows,
    )


def _production(names: list[str]) -> None:
    rows, base = [], 0.0
    for name in names:
        # A process each: memory that an earlier policy gave back would be counted as this one's.
        with multiprocessing.get_context("spawn").Pool(1) as process:
            cost, nbytes = process.apply(_in_production, [name])
        base = base or cost
        rows.append([name, f"{cost:.2f}", f"{cost / base:.2f}", f"{nbytes:.0f}"])
    show(
        "replay-production",
        f"{RESIDENT:,} resident blocks, half of the accesses hits, half of them new blocks that evict",
        ["policy", "µs an access", "× LRU", "bytes a block"],
        rows,
    )


def _in_production(name: str) -> tuple[float, float]:
    """µs an access, bytes a resident block. Prompts of 20 blocks; every second one extends what is resident, the other
    is new and evicts."""
    keys = [BlockKey(hashlib.sha256(number.to_bytes(8, "little")).digest()) for number in range(RESIDENT + ACCESSES)]
    resident = dict.fromkeys(keys[:RESIDENT])
    gc.collect()
    before = _resident_nbytes()
    policy: EvictionPolicy = registry.lookup("policies", name)(RESIDENT)
    for first in range(0, RESIDENT, PROMPT_BLOCKS):
        for key, access in _prompt(keys, first, first * 0.001, 0):
            policy.insert(key, 1, access)
    nbytes = (_resident_nbytes() - before) / RESIDENT
    fresh, done = RESIDENT, 0
    seconds = 0.0
    while done < ACCESSES:
        now = 1000.0 + done * 0.001
        first = (done * 7919) % (RESIDENT // PROMPT_BLOCKS) * PROMPT_BLOCKS
        found = _prompt(keys, first, now, PROMPT_BLOCKS)
        found = [(key, access) for key, access in found if key in resident]
        new = _prompt(keys, fresh, now, 0)
        gone: list[BlockKey] = []
        begin = time.process_time()
        for key, access in found:
            policy.touch(key, access)
        for key, access in new:
            if not policy.admit(key, 1, access):
                break
            out = policy.victim(_anything)
            assert out is not None
            policy.remove(out, evicted=True)
            policy.insert(key, 1, access)
            gone.append(out)
        seconds += time.process_time() - begin
        for (key, _), out in zip(new, gone, strict=False):
            del resident[out]
            resident[key] = None
        fresh += PROMPT_BLOCKS
        done += len(found) + len(new)
    return seconds * 1e6 / done, nbytes


def _prompt(keys: list[BlockKey], first: int, now: float, hits: int) -> list[tuple[BlockKey, Access]]:
    return [
        (keys[first + at], Access(now, at, PROMPT_BLOCKS, hits, keys[first + at - 1] if at else None))
        for at in range(PROMPT_BLOCKS)
    ]


def _resident_nbytes() -> int:
    """Memory that this process has now. (tracemalloc counts more exactly, and makes this ten times as slow.)"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _anything(_: BlockKey) -> bool:
    return True
