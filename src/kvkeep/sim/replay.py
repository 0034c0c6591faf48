"""Policies × capacities over traces, in as many processes as asked for."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeep import registry
from kvkeep.admission import write_rule
from kvkeep.errors import ConfigError
from kvkeep.policies.base import EvictionPolicy
from kvkeep.sim import ceilings, cost
from kvkeep.sim.capacity import parse_capacity
from kvkeep.sim.owner import Owner
from kvkeep.sim.tiers import TierSpec, columns, parse_tiers
from kvkeep.sim.tiers import run as run_tiers
from kvkeep.trace import Trace, read_all

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]
"""Called with how many replays are done, how many there are, and what was done last."""

CEILINGS = ("opt", "unlimited")
BASE = "lru"
TIER_POLICIES = tuple(name for name in ("lru", "hazard") if name in registry.BUILTIN["policies"])
NO_GAP = 0.005
"""Half a point between base and optimum is not worth a share."""
CAPACITIES = "0.5%,1%,2%,5%,10%,20%,50%"
WRITE_RULES = "all,predicted,seen-twice"


@dataclass(frozen=True, slots=True)
class Task:
    """One replay: of one tier, or of ``tiers`` with a write ``rule``."""

    trace: int
    policy: str
    capacity: int
    label: str
    attention_tokens: float
    tiers: tuple[TierSpec, ...] = ()
    rule: str = ""
    keep_hits: bool = False
    """Put the hit blocks of each request, by tier, into the row."""


def rows(
    traces: Trace | str | Path | Iterable[Trace | str | Path],
    policies: str | Iterable[str] = "",
    capacities: str | Iterable[str | int] | None = None,
    *,
    tiers: str = "",
    write_rules: str | Iterable[str] = "",
    token_nbytes: float = 0,
    attention_tokens: float = cost.ATTENTION_TOKENS,
    block_tokens: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[Row]:
    """One dict a trace, policy and capacity, LRU and the ceilings always among them.

    ``traces``: paths or :class:`Trace` objects. ``policies``: names, ``"all"`` (the default), or a list;
    ``capacities`` likewise, :data:`CAPACITIES` by default. ``tiers`` as :func:`~kvkeep.sim.tiers.parse_tiers` reads it,
    in place of ``capacities``: one row a policy and write rule (:data:`WRITE_RULES`), for ``lru`` and ``hazard`` unless
    policies are named. ``jobs`` above 1 starts that many processes (spawned: a script
    that calls this needs ``if __name__ == "__main__":``). Raises :class:`ConfigError`.
    """
    given = [traces] if isinstance(traces, (Trace, str, Path)) else list(traces)
    loaded: list[Trace] = []
    for item in given:
        loaded += [item] if isinstance(item, Trace) else read_all([item], block_tokens=block_tokens)
    loaded = _told_apart(loaded)
    if tiers and capacities is not None:
        raise ConfigError("tiers have capacities of their own (memory=1%,disk=10%): leave capacities out")
    if write_rules and not tiers:
        raise ConfigError("write rules are for several tiers: name those too (memory=1%,disk=10%)")
    if tiers:
        chosen, rules = policy_names(policies or TIER_POLICIES), _names(write_rules or WRITE_RULES)
        for rule in rules:
            write_rule(rule)
        tasks = [
            task
            for number, trace in enumerate(loaded)
            for task in _tier_tasks(number, trace, chosen, tiers, rules, token_nbytes, attention_tokens)
        ]
    else:
        wanted = CAPACITIES if capacities is None else capacities
        tasks = tasks_of(loaded, policies, wanted, token_nbytes=token_nbytes, attention_tokens=attention_tokens)
    return perform(loaded, tasks, jobs, progress)


def _told_apart(traces: Sequence[Trace]) -> list[Trace]:
    """The same, the second of a name called "name #2", …: rows belong together by it."""
    count: Counter[str] = Counter()
    named = []
    for trace in traces:
        count[trace.name] += 1
        again = count[trace.name]
        named.append(replace(trace, name=f"{trace.name} #{again}") if again > 1 else trace)
    return named


def tasks_of(
    traces: Sequence[Trace],
    policies: str | Iterable[str],
    capacities: str | Iterable[str | int],
    *,
    token_nbytes: float = 0,
    attention_tokens: float = cost.ATTENTION_TOKENS,
) -> list[Task]:
    """Replays of one tier: every policy at every capacity."""
    wanted = _listed(capacities)
    chosen = policy_names(policies or "all")
    return [
        Task(number, policy, capacity, label, attention_tokens)
        for number, trace in enumerate(traces)
        for policy in chosen
        for label, capacity in _labelled(policy, wanted, trace, token_nbytes)
    ]


def perform(
    traces: Sequence[Trace], tasks: Sequence[Task], jobs: int = 1, progress: Progress | None = None
) -> list[Row]:
    """Do the replays; rows in the order of ``tasks``."""
    done: dict[Task, Row] = {}
    for task, row in _run(traces, tasks, jobs):
        done[task] = row
        if progress is not None:
            progress(len(done), len(tasks), f"{task.policy} {task.rule or 'at ' + task.label}")
    found = [done[task] for task in tasks]
    _compare(found)
    return found


def replay(*args: Any, **kwargs: Any) -> pd.DataFrame:
    """:func:`rows` as a DataFrame. Needs the extra ``pandas``."""
    frame([])  # before the work, not after it: is pandas there?
    return frame(rows(*args, **kwargs))


def frame(found: Sequence[Row]) -> pd.DataFrame:
    """Rows as a DataFrame."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError("a DataFrame needs pandas: pip install 'kvkeep[pandas]'") from error
    return pd.DataFrame(found)


def policy_names(policies: str | Iterable[str] = "all") -> list[str]:
    """Checked names, the base first and the ceilings last. ``"all"``: every registered one."""
    names: list[str] = []
    for name in _names(policies):
        if name == "all":
            names += [known for known in registry.names("policies") if known not in CEILINGS]
        elif name not in CEILINGS:
            registry.lookup("policies", name)
            names.append(name)
    return [BASE, *dict.fromkeys(name for name in names if name != BASE), *CEILINGS]


def _names(names: str | Iterable[str]) -> list[str]:
    found = _listed(names)
    for name in found:
        if not isinstance(name, str):
            raise ConfigError(f"{name!r} is no name")
    return [name.strip() for name in found]


def _listed(given: str | Iterable[Any]) -> list[Any]:
    """What is given as a list, or as a text with commas."""
    if not isinstance(given, Iterable):
        raise ConfigError(f"a list is expected, or a text with commas, not {given!r}")
    return given.split(",") if isinstance(given, str) else list(given)


def hits_of(trace: Trace, policy: EvictionPolicy, capacity: int) -> tuple[list[int], Owner]:
    """Hit blocks of each request under ``policy``."""
    owner = Owner(policy, capacity)
    hits: list[int] = []
    for request in trace.requests:
        found = 0 if request.start else owner.prefix(request.keys)
        hits.append(found)
        owner.serve(request, found)
    return hits, owner


def _labelled(policy: str, capacities: Iterable[str | int], trace: Trace, token_nbytes: float) -> list[tuple[str, int]]:
    """Labels and blocks, smallest first."""
    pairs = {parse_capacity(text, trace, token_nbytes=token_nbytes): str(text).strip() for text in capacities}
    if not pairs:
        raise ConfigError("no capacity is given")
    if policy == "unlimited":
        return [("all", trace.unique_blocks)]
    return [(label, capacity) for capacity, label in sorted(pairs.items())]


def _tier_tasks(
    number: int,
    trace: Trace,
    policies: Iterable[str],
    tiers: str,
    rules: Iterable[str],
    token_nbytes: float,
    attention_tokens: float,
) -> Iterator[Task]:
    specs = tuple(parse_tiers(tiers, trace, token_nbytes=token_nbytes))
    total = sum(spec.capacity for spec in specs)
    for policy in policies:
        if policy == "unlimited":
            yield Task(number, policy, trace.unique_blocks, "all", attention_tokens)
        elif policy == "opt":
            yield Task(number, policy, total, tiers, attention_tokens)
        else:
            for rule in rules:
                yield Task(number, policy, total, tiers, attention_tokens, specs, rule)


def _run(traces: Sequence[Trace], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Row]]:
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        worker = Worker(traces)
        yield from ((task, worker.run(task)) for task in tasks)
        return
    # Spawned, not forked: whoever calls may have threads (a progress bar's, a cache's, torch's). The traces travel in
    # a file: as arguments they would fill a pipe that nobody reads if a process dies at its start.
    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile(prefix="kvkeep-traces-") as file:
        pickle.dump(list(traces), file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(file.name,)) as pool:
            futures = {pool.submit(_task, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise ConfigError(
                    "a replay's process ended early: memory is short, or a script that calls this with jobs above 1 "
                    'has no if __name__ == "__main__": around it'
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class Worker:
    """The traces, and what all capacities of one share."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.traces = traces
        self._uses: dict[int, list[list[int]]] = {}

    def run(self, task: Task) -> Row:
        trace = self.traces[task.trace]
        begin = time.process_time()
        more: Row = {}
        if task.tiers:
            by_tier, tiers = run_tiers(trace, task.tiers, task.policy, task.rule)
            hits = [sum(found) for found in by_tier]
            more = {"write_rule": task.rule, **columns(trace, task.tiers, by_tier, tiers)}
            if task.keep_hits:
                more["hits"] = by_tier
        elif task.policy == "unlimited":
            hits = list(ceilings.unlimited(trace))
        elif task.policy == "opt":
            if task.trace not in self._uses:
                self._uses = {task.trace: ceilings.next_uses(trace)}
            hits = list(ceilings.optimum(trace, task.capacity, self._uses[task.trace]))
        else:
            hits, owner = hits_of(trace, registry.lookup("policies", task.policy)(task.capacity), task.capacity)
            more = {"stored_blocks": owner.stored, "evicted_blocks": owner.evicted}
        seconds = time.process_time() - begin
        return {
            "trace": trace.name,
            "policy": task.policy,
            "capacity": task.label,
            "capacity_blocks": task.capacity,
            "capacity_share": task.capacity / (trace.unique_blocks or 1),
            "block_tokens": trace.block_tokens,
            "requests": trace.num_prompts,
            "prompt_tokens": trace.num_tokens,
            **ratios(trace, hits, task.attention_tokens),
            **more,
            "seconds": round(seconds, 3),
        }


def ratios(trace: Trace, hits: Sequence[int], attention_tokens: float = cost.ATTENTION_TOKENS) -> Row:
    """Shares of the trace's tokens, full blocks and prefill compute that ``hits`` (blocks of each request) save."""
    tokens, saved, whole = 0, 0.0, 0.0
    for request, blocks in zip(trace.requests, hits, strict=True):
        hit = blocks * trace.block_tokens
        tokens += hit
        saved += cost.prefill(hit, attention_tokens)
        whole += cost.prefill(request.num_tokens, attention_tokens)
    return {
        "token_hit_ratio": tokens / (trace.num_tokens or 1),
        "block_hit_ratio": sum(hits) / (trace.accesses or 1),
        "compute_saved": saved / (whole or 1.0),
        "hit_tokens": tokens,
    }


def _compare(found: list[Row]) -> None:
    """Add how far each row lies between the base and the optimum of its trace and capacity."""
    base: dict[tuple[str, int], float] = {}
    best: dict[tuple[str, int], float] = {}
    for row in found:
        at = row["trace"], row["capacity_blocks"]
        if row["policy"] == BASE and row.get("write_rule", "all") == "all":
            base[at] = row["token_hit_ratio"]
        elif row["policy"] == "opt":
            best[at] = row["token_hit_ratio"]
    for row in found:
        at = row["trace"], row["capacity_blocks"]
        low, high = base.get(at, 0.0), best.get(at, 0.0)
        known = at in base and high - low >= NO_GAP
        row["gap_closed"] = (row["token_hit_ratio"] - low) / (high - low) if known else None


_path = ""
_worker: Worker | None = None


def _begin(path: str) -> None:
    global _path
    _path = path


def _task(task: Task) -> Row:
    """Reads the traces for the first task: a process that starts so late that none is left finds no file any more."""
    global _worker
    if _worker is None:
        with open(_path, "rb") as file:
            _worker = Worker(pickle.load(file))
    return _worker.run(task)
