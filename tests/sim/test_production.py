"""What a replay promises is what a cache does: the same requests through real tiers, hit for hit."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvkeep
from kvkeep.policies.lru import LRU
from kvkeep.sim.replay import hits_of
from kvkeep.sim.tiers import TierSpec, run
from kvkeep.trace import Trace, read

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
