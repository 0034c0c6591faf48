"""Several tiers: figures of the chat trace, and the flow between tiers on small ones."""

from __future__ import annotations

import pytest

from kvkeep import sim
from kvkeep.errors import ConfigError
from kvkeep.sim.tiers import TierSpec, parse_tiers, run
from kvkeep.trace import Trace

from .test_replay import chat, trace_of

__all__ = ["chat"]  # a fixture


def test_chat_has_the_published_figures(chat: Trace) -> None:
    rows = {row.get("write_rule", row["policy"]): row for row in sim.rows(chat, "lru", tiers="memory=1%,disk=10%")}
    assert {rule: row["memory_hit_ratio"] for rule, row in rows.items() if rule not in ("opt", "unlimited")} == (
        pytest.approx({"all": 0.053, "predicted": 0.053, "seen-twice": 0.053}, abs=0.001)
    )
    together = {rule: rows[rule]["token_hit_ratio"] for rule in ("all", "predicted", "seen-twice")}
    assert together == pytest.approx({"all": 0.288, "predicted": 0.92 * 0.288, "seen-twice": 0.76 * 0.288}, abs=0.01)
    assert rows["all"]["disk_written_blocks"] == pytest.approx(197_000, rel=0.005)
    assert rows["seen-twice"]["disk_written_blocks"] == pytest.approx(44_000, rel=0.02)
    assert rows["predicted"]["disk_written_blocks"] < 121_000
    for row in rows.values():
        if "write_rule" in row:
            assert row["token_hit_ratio"] == pytest.approx(row["memory_hit_ratio"] + row["disk_hit_ratio"])
            assert row["token_hit_ratio"] <= rows["opt"]["token_hit_ratio"] <= rows["unlimited"]["token_hit_ratio"]


def test_blocks_found_below_are_copied_up() -> None:
    trace = trace_of("ab", "cd", "ab", "ab")
    hits, tiers = run(trace, [TierSpec("memory", 2, "2"), TierSpec("disk", 10, "10")], "lru", "all")
    assert hits == [[0, 0], [0, 0], [0, 2], [2, 0]]
    assert [owner.stored for owner in tiers.owners] == [6, 4]


def test_seen_twice_writes_from_memory_what_is_used_again() -> None:
    trace = trace_of("ab", "ab", "cd", "ab")
    hits, tiers = run(trace, [TierSpec("memory", 2, "2"), TierSpec("disk", 10, "10")], "lru", "seen-twice")
    assert hits == [[0, 0], [2, 0], [0, 0], [0, 2]]
    assert tiers.owners[1].stored == 2


def test_a_prefix_may_lie_in_both_tiers() -> None:
    trace = trace_of("abcd", "xy", "abcd")
    hits, _ = run(trace, [TierSpec("memory", 4, "4"), TierSpec("disk", 10, "10")], "lru", "all")
    assert hits[2] == [2, 2]


def test_three_tiers_and_a_policy_of_ones_own() -> None:
    trace = trace_of("ab", "cd", "ef", "ab")
    specs = parse_tiers("gpu=2:fifo, memory=4,disk=50%:sieve", trace)
    assert [(spec.name, spec.capacity, spec.policy) for spec in specs] == [
        ("gpu", 2, "fifo"),
        ("memory", 4, ""),
        ("disk", 3, "sieve"),
    ]
    _, tiers = run(trace, specs, "lru", "all")
    assert [owner.policy.name for owner in tiers.owners] == ["fifo", "lru", "sieve"]
    assert all(len(owner.resident) <= owner.capacity for owner in tiers.owners)


@pytest.mark.parametrize(
    "text", ["memory", "memory=", "=1%", "memory=1%,memory=2%", "memory=x", "memory=1%:nothing", "memory=1%,,disk=2%"]
)
def test_wrong_tiers(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_tiers(text, trace_of("ab"))
