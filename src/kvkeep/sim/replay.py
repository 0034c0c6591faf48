"""Policies × capacities over traces, in as many processes as asked for."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvkeep import registry
from kvkeep.errors import ConfigError
from kvkeep.policies.base import EvictionPolicy
from kvkeep.sim import ceilings, cost
from kvkeep.sim.capacity import parse_capacity
from kvkeep.sim.owner import Owner
from kvkeep.trace import Trace, read

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]
"""Called with how many replays are done, how many there are, and what was done last."""

CEILINGS = ("opt", "unlimited")
BASE = "lru"
NO_GAP = 0.005
"""Half a point between base and optimum is not worth a share."""
CAPACITIES = ("0.5%", "1%", "2%", "5%", "10%", "20%", "50%")


@dataclass(frozen=True, slots=True)
class Task:
    """One replay."""

    trace: int
    policy: str
    capacity: int
    label: str
    attention_tokens: float


def rows(
    traces: Trace | str | Iterable[Trace | str],
    policies: str | Iterable[str] = "all",
    capacities: Iterable[str | int] = CAPACITIES,
    *,
    token_nbytes: float = 0,
    attention_tokens: float = cost.ATTENTION_TOKENS,
    block_tokens: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
) -> list[Row]:
    """One dict a trace, policy and capacity, LRU and the ceilings always among them.

    ``traces``: paths or :class:`Trace` objects. ``jobs`` above 1 starts that many processes (spawned: a script that
    calls this needs ``if __name__ == "__main__":``). Raises :class:`ConfigError`.
    """
    loaded = [
        item if isinstance(item, Trace) else read(item, block_tokens=block_tokens)
        for item in ([traces] if isinstance(traces, (Trace, str)) else traces)
    ]
    chosen = policy_names(policies)
    tasks = [
        Task(number, policy, capacity, label, attention_tokens)
        for number, trace in enumerate(loaded)
        for policy in chosen
        for label, capacity in (_labelled(capacities, trace, token_nbytes) if policy != "unlimited" else [("all", -1)])
    ]
    done: dict[Task, Row] = {}
    for task, row in _run(loaded, tasks, jobs):
        done[task] = row
        if progress is not None:
            progress(len(done), len(tasks), f"{task.policy} at {task.label}")
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
    wanted = policies.split(",") if isinstance(policies, str) else list(policies)
    known = [name for name in registry.names("policies") if name not in CEILINGS]
    names = []
    for name in (name.strip() for name in wanted):
        if name == "all":
            names += known
        elif name not in CEILINGS:
            registry.lookup("policies", name)
            names.append(name)
    return [BASE, *dict.fromkeys(name for name in names if name != BASE), *CEILINGS]


def hits_of(trace: Trace, policy: EvictionPolicy, capacity: int) -> tuple[list[int], Owner]:
    """Hit blocks of each request under ``policy``."""
    owner = Owner(policy, capacity)
    hits: list[int] = []
    for request in trace.requests:
        found = 0 if request.start else owner.prefix(request.keys)
        hits.append(found)
        owner.serve(request, found)
    return hits, owner


def _labelled(capacities: Iterable[str | int], trace: Trace, token_nbytes: float) -> list[tuple[str, int]]:
    pairs = {parse_capacity(text, trace, token_nbytes=token_nbytes): str(text) for text in capacities}
    if not pairs:
        raise ConfigError("no capacity is given")
    return [(label, capacity) for capacity, label in sorted(pairs.items())]


def _run(traces: list[Trace], tasks: list[Task], jobs: int) -> Iterator[tuple[Task, Row]]:
    jobs = min(jobs, len(tasks))
    worker = Worker(traces)
    if jobs <= 1:
        yield from ((task, worker.run(task)) for task in tasks)
        return
    # Spawned, not forked: whoever calls may have threads (a progress bar's, a cache's, torch's).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(worker,)) as pool:
        futures = {pool.submit(_task, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Worker:
    """The traces, and what all capacities of one share."""

    def __init__(self, traces: list[Trace]) -> None:
        self.traces = traces
        self._uses: dict[int, list[list[int]]] = {}

    def run(self, task: Task) -> Row:
        trace = self.traces[task.trace]
        begin = time.perf_counter()
        stored = evicted = None
        capacity = task.capacity
        if task.policy == "unlimited":
            capacity = trace.unique_blocks
            hits = list(ceilings.unlimited(trace))
        elif task.policy == "opt":
            if task.trace not in self._uses:
                self._uses = {task.trace: ceilings.next_uses(trace)}
            hits = list(ceilings.optimum(trace, capacity, self._uses[task.trace]))
        else:
            hits, owner = hits_of(trace, registry.lookup("policies", task.policy)(capacity), capacity)
            stored, evicted = owner.stored, owner.evicted
        seconds = time.perf_counter() - begin
        return {
            "trace": trace.name,
            "policy": task.policy,
            "capacity": task.label,
            "capacity_blocks": capacity,
            "capacity_share": capacity / (trace.unique_blocks or 1),
            "block_tokens": trace.block_tokens,
            "requests": trace.num_prompts,
            **ratios(trace, hits, task.attention_tokens),
            "stored_blocks": stored,
            "evicted_blocks": evicted,
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
    at = {(row["trace"], row["capacity_blocks"], row["policy"]): row["token_hit_ratio"] for row in found}
    for row in found:
        base = at.get((row["trace"], row["capacity_blocks"], BASE))
        best = at.get((row["trace"], row["capacity_blocks"], "opt"))
        row["gap_closed"] = None
        if base is not None and best is not None and best - base >= NO_GAP:
            row["gap_closed"] = (row["token_hit_ratio"] - base) / (best - base)


_worker: Worker


def _begin(worker: Worker) -> None:
    global _worker
    _worker = worker


def _task(task: Task) -> Row:
    return _worker.run(task)
