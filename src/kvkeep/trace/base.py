"""A trace in memory: requests in the order of time, each the keys of its prompt's full blocks."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from kvkeep.keys import BlockKey


class Request(NamedTuple):
    """``now``: seconds. ``keys``: of the full blocks. ``num_tokens``: of the prompt, the tail without a block included.

    ``start`` above 0 is no prompt but a save that follows one (decoded tokens): only the blocks from ``start`` on are
    stored, nothing is looked up or counted, and ``num_tokens`` is 0.
    """

    now: float
    keys: tuple[BlockKey, ...]
    num_tokens: int
    output_tokens: int = 0
    start: int = 0


@dataclass(frozen=True)
class Trace:
    """``block_nbytes``: bytes of one block where the trace says so, else 0."""

    name: str
    block_tokens: int
    requests: Sequence[Request] = field(repr=False)
    block_nbytes: int = 0

    @cached_property
    def unique_blocks(self) -> int:
        """Different full blocks: a cache of that many never evicts."""
        return len({key for request in self.requests for key in request.keys})

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_tokens for request in self.requests)

    @cached_property
    def num_prompts(self) -> int:
        return sum(1 for request in self.requests if not request.start)

    @cached_property
    def accesses(self) -> int:
        """Full blocks of all prompts."""
        return sum(len(request.keys) for request in self.requests if not request.start)

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].now - self.requests[0].now if self.requests else 0.0


def merge(traces: Iterable[Trace]) -> list[Trace]:
    """One trace of several that were taken side by side (by the processes of one service), in the order of time: one
    for each size of blocks."""
    alike: dict[tuple[int, int], list[Trace]] = {}
    for trace in traces:
        alike.setdefault((trace.block_tokens, trace.block_nbytes), []).append(trace)
    return [
        Trace(
            "+".join(part.name for part in parts),
            tokens,
            list(heapq.merge(*(part.requests for part in parts), key=attrgetter("now"))),
            nbytes,
        )
        for (tokens, nbytes), parts in alike.items()
    ]
