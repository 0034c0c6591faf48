"""The figures of real traces, and the rules of the replay on small ones."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvkeep import sim
from kvkeep.errors import ConfigError
from kvkeep.keys import BlockKey
from kvkeep.policies.lru import LRU
from kvkeep.sim import ceilings
from kvkeep.sim.replay import Row, _begin, hits_of, policy_names
from kvkeep.trace import Request, Trace, read

TRACES = Path(__file__).parents[1] / "traces"


@pytest.fixture(scope="module")
def chat() -> Trace:
    return read(TRACES / "mooncake_conversation_trace.jsonl.gz")


@pytest.fixture(scope="module")
def agent() -> Trace:
    return read(TRACES / "agent_iso_A_256.jsonl.gz")


def trace_of(*prompts: str) -> Trace:
    """One letter a block, chained: equal prefixes are equal blocks. A second between requests, 4 tokens a block."""
    keys = [tuple(BlockKey(prompt[: end + 1].encode()) for end in range(len(prompt))) for prompt in prompts]
    return Trace("letters", 4, [Request(float(at), key, 4 * len(key) + 1) for at, key in enumerate(keys)])


def hit_ratios(rows: Sequence[Row], policy: str) -> dict[str, float]:
    return {row["capacity"]: row["token_hit_ratio"] for row in rows if row["policy"] == policy}


def test_chat_has_the_published_figures(chat: Trace) -> None:
    rows = sim.rows(chat, "lru,fifo,lfu,sieve", ["1%", "5%", "10%"])
    assert chat.num_prompts == 12_031
    assert chat.accesses == 276_491
    assert hit_ratios(rows, "lru") == pytest.approx({"1%": 0.053, "5%": 0.198, "10%": 0.282}, abs=0.001)
    assert hit_ratios(rows, "opt") == pytest.approx({"1%": 0.245, "5%": 0.373, "10%": 0.373}, abs=0.001)
    assert hit_ratios(rows, "unlimited") == pytest.approx({"all": 0.373}, abs=0.001)
    fifo, lfu, sieve = (hit_ratios(rows, policy) for policy in ("fifo", "lfu", "sieve"))
    assert (fifo["5%"], fifo["10%"]) == pytest.approx((0.177, 0.253), abs=0.001)
    assert (lfu["5%"], lfu["10%"]) == pytest.approx((0.126, 0.191), abs=0.003)
    assert (sieve["5%"], sieve["10%"]) == pytest.approx((0.126, 0.191), abs=0.003)


def test_agents_have_the_published_figures(agent: Trace) -> None:
    rows = sim.rows(agent, "lru", ["1%"])
    assert hit_ratios(rows, "lru") == pytest.approx({"1%": 0.301}, abs=0.001)
    assert hit_ratios(rows, "opt") == pytest.approx({"1%": 0.600}, abs=0.001)
    assert hit_ratios(rows, "unlimited") == pytest.approx({"all": 0.957}, abs=0.001)


def test_hits_are_consecutive_prefixes() -> None:
    trace = trace_of("abcd", "abxy", "abcd", "zzzz")
    hits, owner = hits_of(trace, LRU(100), 100)
    assert hits == [0, 2, 4, 0]
    assert (owner.stored, owner.evicted) == (10, 0)
    row = sim.rows(trace, "lru", [100])[0]
    assert row["token_hit_ratio"] == pytest.approx(6 * 4 / (4 * 17))
    assert row["block_hit_ratio"] == pytest.approx(6 / 16)


def test_lru_gives_up_leaves_first() -> None:
    hits, _ = hits_of(trace_of("abcd", "xy", "abcd"), LRU(4), 4)
    assert hits == [0, 0, 2]


def test_a_prompt_longer_than_the_cache_keeps_its_front() -> None:
    hits, owner = hits_of(trace_of("abcdefgh", "abcdefgh"), LRU(3), 3)
    assert hits == [0, 3]
    assert len(owner.resident) == len(owner.policy) == 3


@pytest.mark.parametrize("capacity", [0, 1, 2, 5, 100])
def test_never_over_capacity(capacity: int) -> None:
    trace = trace_of(*("".join(word) for word in itertools.product("abc", repeat=4)), "abca", "cab")
    for policy in ("lru", "fifo", "lfu", "sieve"):
        row = next(row for row in sim.rows(trace, policy, [capacity]) if row["policy"] == policy)
        assert row["stored_blocks"] - row["evicted_blocks"] <= capacity


def test_saves_of_decoded_blocks_are_kept_but_not_counted() -> None:
    prompt, answer, following = trace_of("ab", "abcd", "abcde").requests
    saved = Request(answer.now, answer.keys, 0, start=2)
    trace = Trace("turns", 4, [prompt, saved, following])
    assert hits_of(trace, LRU(9), 9)[0] == [0, 0, 4]
    assert list(ceilings.optimum(trace, 9, ceilings.next_uses(trace))) == [0, 0, 4]
    assert list(ceilings.unlimited(trace)) == [0, 0, 4]
    assert trace.num_prompts == 2
    assert trace.accesses == 7


def test_no_policy_beats_the_optimum_and_the_optimum_is_exact() -> None:
    """Against exhaustive search over what to keep after each request."""
    trace = trace_of("ab", "ac", "ab", "d", "ad", "ac", "abe", "d", "ab")

    def best(number: int, resident: frozenset[BlockKey], capacity: int) -> int:
        if number == len(trace.requests):
            return 0
        keys = trace.requests[number].keys
        hits = len(list(itertools.takewhile(resident.__contains__, keys)))
        pool = sorted(resident | set(keys))
        kept = itertools.combinations(pool, min(capacity, len(pool)))
        return hits + max(best(number + 1, frozenset(choice), capacity) for choice in kept)

    for capacity in (1, 2, 3):
        found = sum(ceilings.optimum(trace, capacity, ceilings.next_uses(trace)))
        assert found == best(0, frozenset(), capacity)
        assert found >= sum(hits_of(trace, LRU(capacity), capacity)[0])


def test_rows_compare_with_lru_and_the_optimum() -> None:
    trace = trace_of(*"aabcbcabcab")
    rows = {row["policy"]: row for row in sim.rows(trace, ["fifo"], [2])}
    assert list(rows) == ["lru", "fifo", "opt", "unlimited"]
    assert rows["lru"]["gap_closed"] == 0
    assert rows["opt"]["gap_closed"] == 1
    gap = rows["opt"]["token_hit_ratio"] - rows["lru"]["token_hit_ratio"]
    assert rows["fifo"]["gap_closed"] == pytest.approx(
        (rows["fifo"]["token_hit_ratio"] - rows["lru"]["token_hit_ratio"]) / gap
    )


def test_compute_saved_weighs_long_prefixes_more() -> None:
    row = sim.rows(trace_of("abcd", "abcd"), "lru", [9], attention_tokens=1.0)[0]
    assert row["compute_saved"] == pytest.approx((16 + 16**2) / (2 * (17 + 17**2)))


def test_processes_give_the_same_rows(chat: Trace) -> None:
    short = Trace(chat.name, chat.block_tokens, chat.requests[:500])
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, label: str) -> None:
        seen.append((done, total))

    alone = sim.rows(short, "lru,sieve", ["1%", "20%"])
    together = sim.rows(short, "lru,sieve", ["1%", "20%"], jobs=2, progress=progress)
    for row in alone + together:
        del row["seconds"]
    assert alone == together
    assert seen == [(done, 7) for done in range(1, 8)]


def test_a_process_that_starts_too_late_for_any_work_says_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    late = context.Process(target=_begin, args=(str(tmp_path / "deleted meanwhile"),))
    late.start()
    late.join(60)
    assert late.exitcode == 0


def test_a_data_frame() -> None:
    frame = sim.replay(trace_of("ab", "ab"), "fifo", [1, 4])
    assert list(frame["policy"]) == ["lru", "lru", "fifo", "fifo", "opt", "opt", "unlimited"]
    assert frame.set_index(["policy", "capacity_blocks"]).loc[("fifo", 4), "token_hit_ratio"] == pytest.approx(8 / 18)


def test_capacities() -> None:
    trace = Trace("t", 16, trace_of("abcdefghij", "abcdefghik").requests, block_nbytes=2048)
    assert trace.unique_blocks == 11
    assert [sim.parse_capacity(text, trace) for text in ("50%", "0%", "0.1%", "100%", "7", 7)] == [5, 0, 1, 11, 7, 7]
    assert sim.parse_capacity("8KiB", trace) == 4
    assert sim.parse_capacity("8KiB", trace, token_nbytes=64) == 8
    for wrong in ("101%", "-1%", "x%", "abc", "-5", -5, "", "1.5", 5.5, None, True):
        with pytest.raises(ConfigError):
            sim.parse_capacity(wrong, trace)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bytes a token"):
        sim.parse_capacity("8KiB", trace_of("a"))


def test_lists_and_texts_with_commas() -> None:
    trace = trace_of("abcd", "abcd")
    assert [row["capacity"] for row in sim.rows(trace, "lru", "50%, 3")][:2] == ["50%", "3"]
    for capacities in (5, [5.5], [None], [True], 1.5):
        with pytest.raises(ConfigError):
            sim.rows(trace, "lru", capacities)  # type: ignore[arg-type]
    for policies in (5, [5]):
        with pytest.raises(ConfigError):
            sim.rows(trace, policies)  # type: ignore[arg-type]


def test_policy_names() -> None:
    assert policy_names("sieve, fifo,lru,opt") == ["lru", "sieve", "fifo", "opt", "unlimited"]
    assert {"lru", "fifo", "lfu", "sieve", "opt"} <= set(policy_names())
    with pytest.raises(ConfigError, match="did you mean 'sieve'"):
        policy_names("seive")
