"""What a replay promises is what a cache does: the same requests through real tiers, hit for hit."""

from __future__ import annotations

import gc
import hashlib
import heapq
import random
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvkeep
from blocks import LAYOUT
from kvkeep import registry
from kvkeep.frame import HEADER_NBYTES
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.policies.hazard import Hazard
from kvkeep.policies.lru import LRU
from kvkeep.sim.owner import Owner, accesses_of
from kvkeep.sim.replay import hits_of
from kvkeep.sim.tiers import TierSpec, run
from kvkeep.stores.memory import UNIT
from kvkeep.trace import Request, Trace, read

TRACES = Path(__file__).parents[1] / "traces"


class Nothing:
    """A model whose blocks hold nothing in particular."""

    def read(self, index: int, out: memoryview) -> None:
        out[:] = bytes(len(out))

    def write(self, index: int, payload: memoryview) -> None:
        pass


@pytest.fixture(scope="module")
def agents() -> Trace:
    """The first calls, one token a block."""
    whole = read(TRACES / "agent_iso_A_256.jsonl.gz")
    return Trace("agents", 1, whole.requests[:400])


def serve(cache: kvkeep.KVCache, trace: Trace) -> list[int]:
    """Hit blocks of each request."""
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="uint8")
    layout = kvkeep.KVLayout.uniform(identity, num_layers=1, num_kv_heads=1, head_dim=32, dtype="uint8", block_tokens=1)
    bound = cache.bind(layout)
    tokens: dict[bytes, int] = {}
    hits = []
    for request in trace.requests:
        prompt = [tokens.setdefault(key, len(tokens)) for key in request.keys]
        match = bound.match(prompt)
        with bound.lease(match) as lease:
            assert bound.load(lease, Nothing()) == match.num_tokens
        bound.save(prompt, Nothing(), start=match.num_tokens)
        assert cache.flush(10)
        hits.append(match.num_blocks)
    return hits


def test_memory_alone(agents: Trace) -> None:
    with kvkeep.open(memory="200KiB", policy="lru") as cache:
        hits = serve(cache, agents)
        blocks = cache.stats().tiers[0].blocks  # it is full: the smallest change of a block's size would show here
    promised, _ = hits_of(agents, LRU(blocks), blocks)
    assert sum(hits) > 3000
    assert hits == promised


@pytest.mark.parametrize("rule", ["all", "seen-twice"])
def test_memory_and_disk(agents: Trace, tmp_path: Path, rule: str) -> None:
    with kvkeep.open(tmp_path, memory="640KiB", disk="32MiB", policy="lru", write_rule=rule) as cache:
        hits = serve(cache, agents)
        memory, disk = (tier.blocks for tier in cache.stats().tiers)
        assert not [row for row in cache.stats().events if row["event"] == "dropped"]
        written = sum(
            int(row["count"]) for row in cache.stats().events if row["event"] == "put" and row.get("tier") == "disk"
        )
    promised, tiers = run(agents, [TierSpec("memory", memory, ""), TierSpec("disk", 10**6, "")], "lru", rule)
    assert sum(hits) == pytest.approx(sum(map(sum, promised)), rel=0.01)
    assert disk == written == pytest.approx(tiers.owners[1].stored, rel=0.02)


def tools(requests: int, *, seed: int = 3, kinds: int = 60) -> Trace:
    """Conversations that begin with one of ``kinds`` long instructions; few are long ones."""
    numbers, count = random.Random(seed), 0

    def fresh(blocks: int) -> list[BlockKey]:
        nonlocal count
        count += blocks
        return [BlockKey(hashlib.sha256(b"%d" % at).digest()) for at in range(count - blocks, count)]

    instructions = [fresh(numbers.randint(4, 14)) for _ in range(kinds)]
    popularity = [1 / (rank + 1) for rank in range(kinds)]
    found: list[Request] = []
    later: list[tuple[float, int, list[BlockKey]]] = []
    now = 0.0
    while len(found) < requests:
        now += numbers.expovariate(5)
        while later and later[0][0] <= now:
            at, _, keys = heapq.heappop(later)
            keys = keys + fresh(numbers.randint(1, 4))
            found.append(Request(at, tuple(keys), len(keys) * 16))
            if numbers.random() < 0.6:
                heapq.heappush(later, (at + numbers.lognormvariate(3.5, 0.8), count, keys))
        (beginning,) = numbers.choices(instructions, popularity)
        keys = beginning + fresh(numbers.randint(1, 8))
        found.append(Request(now, tuple(keys), len(keys) * 16))
        if numbers.random() < 0.25:
            heapq.heappush(later, (now + numbers.lognormvariate(3.5, 0.8), count, keys))
    return Trace("tools", 16, found)


class AsACache(Owner):
    """Touches when a request comes, and stores when its prefill has ended, or piece by piece as that goes on."""

    pieces = 1

    def serve(self, request: Request, hits: int) -> None:
        accesses = accesses_of(request, hits)
        missing = [at for at, key in enumerate(request.keys) if key not in self.resident]
        for key, access in zip(request.keys, accesses, strict=True):
            if key in self.resident:
                self.policy.touch(key, access)
        size = -(-len(missing) // self.pieces) or 1
        for start in range(0, len(missing), size):
            piece = missing[start : start + size]
            later = [access._replace(now=access.now + 1e-3 * (1 + start)) for access in accesses]
            if self.store(request.keys, piece, later) < len(piece):
                return


def share_of_hits(trace: Trace, owner: Owner) -> float:
    hits = 0
    for request in trace.requests:
        found = owner.prefix(request.keys)
        hits += found
        owner.serve(request, found)
    return hits / trace.accesses


@pytest.mark.parametrize(("share", "pieces"), [(0.01, 1), (0.05, 1), (0.05, 3)])
def test_hazard_learns_as_much_from_a_cache_as_from_a_replay(share: float, pieces: int) -> None:
    """A cache touches what is found before it shows what a request extends, and stores what is missing later."""
    whole = read(TRACES / "mooncake_conversation_trace.jsonl.gz")
    trace = Trace("half", whole.block_tokens, whole.requests[:6000])
    capacity = int(share * trace.unique_blocks)
    replayed = sum(hits_of(trace, Hazard(capacity), capacity)[0]) / trace.accesses
    owner = AsACache(Hazard(capacity), capacity)
    owner.pieces = pieces
    assert share_of_hits(trace, owner) == pytest.approx(replayed, abs=0.005)


def tokens_of(keys: Sequence[BlockKey]) -> list[int]:
    return [(int.from_bytes(key[:6], "little") + 7919 * at) % (1 << 31) for key in keys for at in range(16)]


@pytest.mark.parametrize("policy", ["lru", "hazard"])
def test_a_cache_hits_as_often_as_its_replay(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tools(1500)
    capacity = trace.unique_blocks // 40
    replayed = sum(hits_of(trace, registry.lookup("policies", policy)(capacity), capacity)[0]) / trace.accesses
    clock = SimpleNamespace(time=lambda: now, monotonic=time.monotonic)
    monkeypatch.setattr("kvkeep.cache.time", clock)
    room = -(-(LAYOUT.block_nbytes + HEADER_NBYTES) // UNIT) * UNIT
    hits = 0
    with kvkeep.open(memory=capacity * room, policy=policy) as root:
        cache = root.bind(LAYOUT)
        for request in trace.requests:
            now = request.now
            tokens = tokens_of(request.keys)
            match = cache.match(tokens)
            hits += match.num_blocks
            with cache.lease(match) as lease:
                assert cache.load(lease, Nothing()) == match.num_tokens
            now = request.now + 1e-3
            cache.save(tokens, Nothing(), start=match.num_tokens)
    assert hits / trace.accesses == pytest.approx(replayed, abs=0.03)
    assert (
        policy == "lru" or hits / trace.accesses > 0.39
    )  # where LRU, and hazard without shared beginnings, stay below


class Overlapping(Owner):
    """Requests come while others are still being computed, which takes ``seconds`` each."""

    seconds = 1.0

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        super().__init__(policy, capacity)
        self._computed: deque[tuple[float, Request, list[Access]]] = deque()

    def serve(self, request: Request, hits: int) -> None:
        while self._computed and self._computed[0][0] <= request.now:
            at, earlier, accesses = self._computed.popleft()
            missing = [place for place, key in enumerate(earlier.keys) if key not in self.resident]
            if missing:
                self.store(earlier.keys, missing, [access._replace(now=at) for access in accesses])
        accesses = accesses_of(request, hits)
        for key, access in zip(request.keys[:hits], accesses, strict=False):
            if key in self.resident:  # what was stored just now may have taken its place
                self.policy.touch(key, access)
        self._computed.append((request.now + self.seconds, request, accesses))


def test_hazard_learns_from_requests_that_overlap() -> None:
    trace = tools(3000)
    capacity = trace.unique_blocks // 100
    replayed = sum(hits_of(trace, Hazard(capacity), capacity)[0]) / trace.accesses
    policy = Hazard(capacity)
    assert share_of_hits(trace, Overlapping(policy, capacity)) == pytest.approx(replayed, abs=0.03)
    # No leaf is lost sight of: each is where it will be looked for.
    for key, block in policy._blocks.items():
        if key not in policy._children:
            everywhere = [(heap, leaf) for heap, leaves in policy._leaves.items() for leaf in leaves if leaf[-1] == key]
            assert any(leaf[0] == block.turn.number for _, leaf in everywhere)


def test_hazard_remembers_a_bounded_number_of_turns() -> None:
    policy = Hazard(100)
    keys = [BlockKey(bytes([at]) * 32) for at in range(12)]

    def access(now: float, at: int, blocks: int, hits: int) -> Access:
        return Access(now, at, blocks, hits, keys[at - 1] if at else None)

    def turns() -> int:
        gc.collect()
        return sum(type(each).__name__ == "_Turn" for each in gc.get_objects())

    before = turns()
    for at in range(12):  # a prompt, then one that shares ten blocks with it and stays as it is from then on
        policy.insert(keys[at], 1, access(0.0, at, 30, 0))
    policy.remove(keys[11], evicted=True)
    policy.touch(keys[9], access(1.0, 9, 12, 10))
    policy.insert(keys[11], 1, access(2.0, 11, 12, 10)._replace(parent=keys[9]))
    for number in range(3, 120_000):
        policy.touch(keys[9], access(float(number), 9, 10, 10))
    assert turns() - before < 100_000


@pytest.mark.parametrize(("share", "gain"), [(0.01, 0.08), (0.03, 0.05), (0.1, 0.02)])
def test_hazard_keeps_what_many_conversations_begin_with(share: float, gain: float) -> None:
    trace = tools(4000)
    capacity = int(share * trace.unique_blocks)
    ratios = [
        sum(hits_of(trace, registry.lookup("policies", name)(capacity), capacity)[0]) / trace.accesses
        for name in ("lru", "hazard")
    ]
    assert ratios[1] - ratios[0] > gain


def test_hazard_refuses_also_where_the_medium_has_room_for_less_than_its_capacity() -> None:
    """Slots are rounded up, so what blocks take never adds up to the capacity, and yet there is no room."""
    trace = tools(2000)
    capacity = trace.unique_blocks // 100
    stored = []
    for told in (capacity, capacity + capacity // 20):
        owner = hits_of(trace, Hazard(told), capacity)[1]
        stored.append(owner.stored)
    assert stored[0] < trace.accesses // 3
    assert stored[1] == pytest.approx(stored[0], rel=0.02)


def chats(requests: int = 4_000, *, seed: int = 1) -> Trace:
    """Conversations that end at random, whose pauses say nothing about the next one."""
    numbers = random.Random(seed)
    found: list[tuple[float, list[bytes]]] = []
    begins = 0.0
    while len(found) < requests:
        begins += numbers.expovariate(1.5)
        now, prompt = begins, [numbers.randbytes(32) for _ in range(numbers.randint(1, 20))]
        found.append((now, list(prompt)))
        while numbers.random() < 0.5:
            now += numbers.lognormvariate(4, 0.8)
            prompt += [numbers.randbytes(32) for _ in range(numbers.randint(1, 6))]
            found.append((now, list(prompt)))
    found.sort(key=lambda one: one[0])
    return Trace("chats", 1, [Request(now, tuple(map(BlockKey, keys)), len(keys)) for now, keys in found])


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("unit", [0.001, 0.0])
def test_hazard_follows_lru_where_times_say_nothing(unit: float, share: float) -> None:
    """They are in the wrong unit, or there are none. It was up to 43 points below."""
    whole = chats()
    trace = Trace(whole.name, 1, [request._replace(now=request.now * unit) for request in whole.requests])
    capacity = int(share * trace.unique_blocks)
    lru, hazard = (share_of_hits(trace, Owner(policy(capacity), capacity)) for policy in (LRU, Hazard))
    assert hazard > lru - 0.02


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_hazard_follows_lru_where_agents_have_no_times(share: float) -> None:
    whole = read(TRACES / "agent_iso_A_256.jsonl.gz")
    trace = Trace("agents", 1, [request._replace(now=0.0) for request in whole.requests[:1_500]])
    capacity = int(share * trace.unique_blocks)
    lru, hazard = (share_of_hits(trace, Owner(policy(capacity), capacity)) for policy in (LRU, Hazard))
    assert hazard > lru - 0.02
