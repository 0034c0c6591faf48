"""How much memory and disk a trace deserves, under which policy and write rule.

Curves first: each policy replayed alone at a few capacities. Tiers are inclusive, so what the slowest holds decides
what is found at all, and what the fastest holds how quickly: every pair of capacities can be judged from the curves.
The best pair is then replayed as it would run, once for each write rule, and only those figures are reported.

Worth is GPU time: a found prefix saves its prefill and costs its load. A trace stands for every hour of a month. Its
cache begins empty, so the figures are a little low.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from kvkeep.admission import RULES
from kvkeep.errors import ConfigError
from kvkeep.sim.models import ModelSize
from kvkeep.sim.replay import BASE, TIER_POLICIES, Progress, Row, Task, perform, tasks_of
from kvkeep.sim.tiers import TierSpec
from kvkeep.trace import Trace

GIB = 1 << 30
MONTH_SECONDS = 730 * 3600.0
SHARES = ("0.5%", "1%", "2%", "5%", "10%", "20%", "50%", "100%")
STEPS = 60
"""Capacities that are judged between the smallest and the largest of the curve."""
CLOSE = 0.98
"""Of two write rules that the disk endures, one that finds this share of the other's hits and writes less is better."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a GiB are a month's, the GPU's is an hour's. ``disk_fills``: how often a day the disk may be written
    full (its DWPD)."""

    memory: float = 3.0
    disk: float = 0.08
    gpu: float = 2.0
    disk_fills: float = math.inf


@dataclass(frozen=True, slots=True)
class Speeds:
    """``flops``: what a prefill really gets, a second. Bandwidths in bytes a second, from a tier into the engine."""

    flops: float = 200e12
    memory: float = 20e9
    disk: float = 4e9

    def prefill(self, tokens: float, model: ModelSize) -> float:
        """Seconds for the first ``tokens`` of a prompt."""
        return (model.token_flops * tokens + model.pair_flops * tokens * tokens) / self.flops

    def load(self, memory_tokens: float, disk_tokens: float, model: ModelSize) -> float:
        """Seconds to bring that many tokens into the engine."""
        return model.token_nbytes * (memory_tokens / self.memory + disk_tokens / self.disk)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one write rule gives at the recommended sizes. Times in seconds, a request; ``p95`` over the requests."""

    write_rule: str
    token_hit_ratio: float
    memory_hit_ratio: float
    disk_hit_ratio: float
    compute_saved: float
    ttft: float
    ttft_p95: float
    ttft_without: float
    ttft_without_p95: float
    disk_written_bytes_a_day: float
    disk_fills_a_day: float
    worth_a_month: float

    @property
    def ttft_saved(self) -> float:
        return self.ttft_without - self.ttft


@dataclass(frozen=True, slots=True)
class NextGiB:
    """What one GiB more would buy: points of the token-hit ratio, mean TTFT in seconds, worth and cost a month."""

    token_hit_ratio: float
    ttft_saved: float
    worth_a_month: float
    cost_a_month: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """``outcomes``: of every write rule that was tried, ``chosen`` among them. ``ceiling``: an unlimited cache's."""

    trace: str
    model: str
    memory_bytes: int
    disk_bytes: int
    policy: str
    chosen: Outcome
    outcomes: tuple[Outcome, ...]
    ceiling: float
    lru_hit_ratio: float
    cost_a_month: float
    net_a_month: float
    next_memory: NextGiB
    next_disk: NextGiB

    def row(self) -> Row:
        """Flat where it can be, for JSON."""
        row = asdict(self)
        del row["chosen"]
        return {**row, **asdict(self.chosen), "ttft_saved": self.chosen.ttft_saved}


def size(
    trace: Trace,
    model: ModelSize,
    prices: Prices | None = None,
    speeds: Speeds | None = None,
    *,
    target: float | None = None,
    policies: Iterable[str] = (),
    max_memory: int | None = None,
    max_disk: int | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Recommendation:
    """The sizes of the best net worth, or the cheapest that reach the token-hit ratio ``target``.

    ``policies``: default LRU and hazard. ``max_memory`` and ``max_disk`` in bytes; ``max_disk`` 0: memory only. A disk
    that no write rule spares enough (``prices.disk_fills``) gives way to a larger one, or to none. Raises
    :class:`ConfigError`, also if no cache can reach the target.
    """
    prices, speeds = prices or Prices(), speeds or Speeds()
    if not trace.unique_blocks:
        raise ConfigError(f"{trace.name}: no prompt in it has a full block, so there is nothing to keep")
    names = list(policies) or list(TIER_POLICIES)
    tasks = tasks_of([trace], names, SHARES, attention_tokens=model.attention_tokens)
    done, total = 0, len(tasks) + len(RULES)

    def step(more: int, _: int, label: str) -> None:
        if progress is not None:
            progress(done + more, total, label)

    rows = perform([trace], tasks, jobs, step)
    done = len(tasks)
    judge = _Judge(trace, model, prices, speeds, rows)
    limits = (math.inf if most is None else most for most in (max_memory, max_disk))
    candidates = judge.candidates(list(dict.fromkeys((*names, BASE))), *limits)
    while True:
        best = judge.best(candidates, target)
        specs = [TierSpec("memory", best.memory, "")]
        if best.disk:
            specs.append(TierSpec("disk", best.disk, ""))
        final = [
            Task(0, best.policy, best.memory, "", model.attention_tokens, tuple(specs), rule, keep_hits=True)
            for rule in (RULES if best.disk else ["all"])
        ]
        total = done + len(final)
        verified = perform([trace], final, jobs, step)
        done = total
        outcomes = tuple(judge.outcome(row, best) for row in verified)
        wanted = [one for one in outcomes if target is None or one.token_hit_ratio >= target] or outcomes
        able = [one for one in wanted if not best.disk or one.disk_fills_a_day <= prices.disk_fills]
        if able:
            break
        candidates = judge.sparing(candidates, best, min(one.disk_written_bytes_a_day for one in wanted))
    chosen = _choose(able, target)
    cost = judge.cost(best)
    return Recommendation(
        trace=trace.name,
        model=model.name,
        memory_bytes=round(best.memory * judge.block_nbytes),
        disk_bytes=round(best.disk * judge.block_nbytes),
        policy=best.policy,
        chosen=chosen,
        outcomes=outcomes,
        ceiling=next(row["token_hit_ratio"] for row in rows if row["policy"] == "unlimited"),
        lru_hit_ratio=judge.hit_ratio(BASE, max(best.memory, best.disk)),
        cost_a_month=cost,
        net_a_month=chosen.worth_a_month - cost,
        next_memory=judge.next_gib(best, memory=True),
        next_disk=judge.next_gib(best, memory=False),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    policy: str
    memory: int
    disk: int


class _Judge:
    """Curves, prices and speeds: what a pair of capacities is worth."""

    def __init__(self, trace: Trace, model: ModelSize, prices: Prices, speeds: Speeds, rows: Sequence[Row]) -> None:
        self._trace, self._model, self._prices, self._speeds = trace, model, prices, speeds
        self.block_nbytes = trace.block_tokens * model.token_nbytes
        self._prefill = sum(speeds.prefill(request.num_tokens, model) for request in trace.requests)
        self._months = MONTH_SECONDS / max(trace.seconds, 1.0)
        self._curves: dict[str, list[tuple[int, float, float]]] = {}
        for row in rows:
            point = row["capacity_blocks"], row["token_hit_ratio"], row["compute_saved"]
            self._curves.setdefault(row["policy"], [(0, 0.0, 0.0)]).append(point)

    def hit_ratio(self, policy: str, blocks: float) -> float:
        return self._between(policy, blocks)[0]

    def candidates(self, policies: Iterable[str], max_memory: float, max_disk: float) -> list[_Candidate]:
        """What there is to choose from. Limits in bytes."""
        found = [
            _Candidate(policy, memory, disk)
            for policy in policies
            for memory, disk in itertools.product(self._steps(), [0, *self._steps()])
            if (memory < disk or not disk)
            and memory * self.block_nbytes <= max_memory
            and disk * self.block_nbytes <= max_disk
        ]
        if not found:
            raise ConfigError("these limits leave no room for a cache")
        return found

    def sparing(self, candidates: Sequence[_Candidate], tried: _Candidate, written: float) -> list[_Candidate]:
        """Those with a larger disk than ``tried`` had, which endures ``written`` bytes a day or is the largest (fewer
        are written to a larger one), and those without a disk."""
        endured = self._prices.disk_fills * self.block_nbytes
        largest = max(one.disk for one in candidates)
        return [
            one
            for one in candidates
            if not one.disk or (one.disk > tried.disk and (one.disk == largest or one.disk * endured >= written))
        ]

    def best(self, candidates: Sequence[_Candidate], target: float | None) -> _Candidate:
        if target is None:
            return max(candidates, key=self.net)
        hits = {one: self.hit_ratio(one.policy, max(one.memory, one.disk)) for one in candidates}
        most = max(hits.values())
        if target > most:
            raise ConfigError(
                f"a token-hit ratio of {target:g} is out of reach within these limits: at most {most:.3f}"
            )
        # A margin for what curves and several tiers differ in.
        reach = [one for one in candidates if hits[one] >= min(target + 0.002, most)]
        return min(reach, key=lambda one: (self.cost(one), -self.net(one)))

    def cost(self, candidate: _Candidate) -> float:
        """Of memory and disk, a month."""
        gib = self.block_nbytes / GIB
        return gib * (candidate.memory * self._prices.memory + candidate.disk * self._prices.disk)

    def net(self, candidate: _Candidate) -> float:
        return self._worth(candidate)[1] - self.cost(candidate)

    def next_gib(self, candidate: _Candidate, *, memory: bool) -> NextGiB:
        more = GIB / self.block_nbytes
        grown = candidate.memory + more * memory, candidate.disk + more * (not memory)
        before, after = self._at(candidate.policy, candidate.memory, candidate.disk), self._at(candidate.policy, *grown)
        price = self._prices.memory if memory else self._prices.disk
        requests = max(self._trace.num_prompts, 1)
        return NextGiB(
            after[0] - before[0], (after[1] - before[1]) / requests, self._money(after[1] - before[1]), price
        )

    def outcome(self, row: Row, candidate: _Candidate) -> Outcome:
        """From a replay: times of each request."""
        trace, model, speeds = self._trace, self._model, self._speeds
        without, taken, saved = [], [], 0.0
        for request, found in zip(trace.requests, row.pop("hits"), strict=True):
            if request.start:
                continue
            memory, disk = (trace.block_tokens * blocks for blocks in (*found, 0)[:2])
            whole = speeds.prefill(request.num_tokens, model)
            rest = whole - speeds.prefill(memory + disk, model) + speeds.load(memory, disk, model)
            # An engine that would load longer than compute computes.
            without.append(whole)
            taken.append(min(rest, whole))
            saved += whole - taken[-1]
        written = row.get("disk_written_blocks", 0) * self.block_nbytes * 86400 / max(trace.seconds, 1.0)
        return Outcome(
            write_rule=row["write_rule"],
            token_hit_ratio=row["token_hit_ratio"],
            memory_hit_ratio=row["memory_hit_ratio"],
            disk_hit_ratio=row.get("disk_hit_ratio", 0.0),
            compute_saved=row["compute_saved"],
            ttft=sum(taken) / len(taken),
            ttft_p95=sorted(taken)[int(0.95 * (len(taken) - 1))],
            ttft_without=sum(without) / len(without),
            ttft_without_p95=sorted(without)[int(0.95 * (len(without) - 1))],
            disk_written_bytes_a_day=written,
            disk_fills_a_day=written / (candidate.disk * self.block_nbytes) if candidate.disk else 0.0,
            worth_a_month=self._money(saved),
        )

    def _worth(self, candidate: _Candidate) -> tuple[float, float]:
        hit, seconds = self._at(candidate.policy, candidate.memory, candidate.disk)
        return hit, self._money(seconds)

    def _at(self, policy: str, memory: float, disk: float) -> tuple[float, float]:
        """Token-hit ratio, and GPU seconds saved over the trace."""
        near = self._between(policy, memory)[0]
        hit, saved = self._between(policy, max(memory, disk))
        tokens = self._trace.num_tokens
        load = self._speeds.load(near * tokens, (hit - near) * tokens, self._model)
        return hit, max(0.0, saved * self._prefill - load)

    def _money(self, gpu_seconds: float) -> float:
        return gpu_seconds / 3600 * self._prices.gpu * self._months

    def _between(self, policy: str, blocks: float) -> tuple[float, float]:
        """Token-hit ratio and compute saved at ``blocks``: straight lines between what was replayed."""
        curve = self._curves[policy]
        at = bisect_left(curve, (blocks, -1.0, -1.0))
        if at == len(curve):
            return curve[-1][1:]
        if at == 0:
            return curve[0][1:]
        (left, *low), (right, *high) = curve[at - 1], curve[at]
        share = (blocks - left) / (right - left)
        hit, saved = (a + share * (b - a) for a, b in zip(low, high, strict=True))
        return hit, saved

    def _steps(self) -> list[int]:
        least = max(1, min(self._curves[BASE][1][0], math.ceil(GIB / self.block_nbytes)))
        most = self._trace.unique_blocks
        return sorted({round(least * (most / least) ** (step / STEPS)) for step in range(STEPS + 1)})


def _choose(able: Sequence[Outcome], target: float | None) -> Outcome:
    """What finds most: of nearly equal ones the one that writes least."""
    most = max(one.token_hit_ratio for one in able)
    least = CLOSE * most if target is None else max(CLOSE * most, min(target, most))
    return min((one for one in able if one.token_hit_ratio >= least), key=lambda one: one.disk_written_bytes_a_day)
