"""Hit ratios agree with libCacheSim's (https://libcachesim.com) on plain object traces, to a tenth of a point.

Left out are three that differ from it on purpose. LFU-DA: libCacheSim adds the cache's age to a block's count at each
hit, the paper only to its rank; for blocks of one size LFU-DA is GDSF, so it is held to libCacheSim's GDSF. W-TinyLFU:
libCacheSim does not count hits in the window. LeCaR: libCacheSim draws its expert at random, so only to a point.
"""

from __future__ import annotations

import random
from functools import cache

import libcachesim
import pytest

from kvkeep import registry
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access
from kvkeep.testing.policies import key

TWINS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "lfuda": "GDSF",
    "clock": "Clock",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "2q": "TwoQ",
    "arc": "ARC",
    "lirs": "LIRS",
    "gdsf": "GDSF",
    "lecar": "LeCaR",
}
STORES_FIRST = {"gdsf", "lfuda"}
"""libCacheSim makes room after it has stored the new block, as GDSF's paper does, so that it may be the victim."""
TOLERANCE = {"lecar": 0.01}
LENGTH = 20_000


@cache
def stream(name: str) -> tuple[int, ...]:
    chance = random.Random(name)
    weights = [1 / rank**0.9 for rank in range(1, 4001)]
    if name == "zipf":
        return tuple(chance.choices(range(4000), weights, k=LENGTH))
    hot = iter(chance.choices(range(300), weights[:300], k=LENGTH))
    looped, stream = 0, []
    for number in range(LENGTH):  # what is hot, what is read over and over, what is read once
        luck = chance.random()
        if luck < 0.4:
            stream.append(next(hot))
        elif luck < 0.7:
            stream.append(1000 + looped % 1500)
            looped += 1
        else:
            stream.append(10_000 + number)
    return tuple(stream)


def hit_ratio(name: str, numbers: tuple[int, ...], capacity: int) -> float:
    policy = registry.lookup("policies", name)(capacity)
    resident: set[BlockKey] = set()
    hits = 0
    for now, block in enumerate(map(key, numbers)):
        access = Access(float(now))
        if block in resident:
            hits += 1
            policy.touch(block, access)
            continue
        assert policy.admit(block, 1, access)
        if name in STORES_FIRST:
            policy.insert(block, 1, access)
            resident.add(block)
        while len(resident) + (block not in resident) > capacity:
            victim = policy.victim(lambda _: True)
            policy.remove(victim, evicted=True)
            resident.remove(victim)
            if victim == block:
                break
        else:
            if block not in resident:
                policy.insert(block, 1, access)
                resident.add(block)
    return hits / len(numbers)


def libcachesim_hit_ratio(name: str, numbers: tuple[int, ...], capacity: int) -> float:
    simulated = getattr(libcachesim, name)(cache_size=capacity, hashpower=16)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = 0
    for number in numbers:
        request.obj_id = number + 1
        hits += simulated.get(request)
    return hits / len(numbers)


@pytest.mark.parametrize("trace", ["zipf", "mixed"])
@pytest.mark.parametrize("capacity", [100, 800])
@pytest.mark.parametrize("name", TWINS)
def test_hit_ratio(name: str, capacity: int, trace: str) -> None:
    numbers = stream(trace)
    ours, theirs = hit_ratio(name, numbers, capacity), libcachesim_hit_ratio(TWINS[name], numbers, capacity)
    assert ours == pytest.approx(theirs, abs=TOLERANCE.get(name, 0.001))
