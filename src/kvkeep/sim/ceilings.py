"""What no policy can beat: the offline optimum, and a cache without bounds.

The optimum is Belady's MIN ("A study of replacement algorithms", 1966) with bypass: of what is resident and what the
request brings, the block whose next use lies farthest in the future goes, and a block that is never used again is not
kept. All blocks of a request are used at one time, so ties are common: the deeper goes first. Since whoever uses a
block uses those before it too, a block's next use is never later than its children's: what is kept is closed under
prefixes, and the optimum for hits of blocks is that for hits of prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from kvkeep.keys import BlockKey
from kvkeep.trace.base import Trace


def unlimited(trace: Trace) -> Iterator[int]:
    """Hit blocks of each request in a cache that keeps all."""
    seen: set[BlockKey] = set()
    for request in trace.requests:
        hits = 0
        if not request.start:
            for key in request.keys:
                if key not in seen:
                    break
                hits += 1
        seen.update(request.keys)
        yield hits


def next_uses(trace: Trace) -> list[list[int]]:
    """For each block of each request the number of the next prompt that has it; -1 for none."""
    later: dict[BlockKey, int] = {}
    uses: list[list[int]] = []
    for number in range(len(trace.requests) - 1, -1, -1):
        request = trace.requests[number]
        uses.append([later.get(key, -1) for key in request.keys])
        if not request.start:
            for key in request.keys:
                later[key] = number
    uses.reverse()
    return uses


def optimum(trace: Trace, capacity: int, uses: list[list[int]]) -> Iterator[int]:
    """Hit blocks of each request; ``uses`` from :func:`next_uses`, which serves all capacities."""
    depth = 1 + max((len(request.keys) for request in trace.requests), default=0)
    resident: dict[BlockKey, int] = {}  # → how bad to keep: next use first, then depth
    worst: list[tuple[int, BlockKey]] = []  # the same, negated, as a heap; entries that no longer hold are skipped
    for request, following in zip(trace.requests, uses, strict=True):
        hits = 0
        if not request.start:
            for key in request.keys:
                if key not in resident:
                    break
                hits += 1
        yield hits
        for at in range(request.start, len(following)):
            key, use = request.keys[at], following[at]
            if use < 0:
                resident.pop(key, None)
                continue
            badness = use * depth + at
            resident[key] = badness
            heappush(worst, (-badness, key))
        while len(resident) > capacity:
            badness, key = heappop(worst)
            if resident.get(key) == -badness:
                del resident[key]
