"""What the two sides of the connector tell each other, once a step.

``Plan`` goes from the scheduler to every rank, ``Report`` comes back, joined over the ranks: what one rank could not
do, none has done. Both are pickled on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout

DROPPED = -1
"""In :attr:`Report.kept`: this save was not made, since the step computed from blocks that did not load."""


@dataclass(frozen=True)
class Hello(KVConnectorHandshakeMetadata):
    """A rank's introduction at start: what its blocks look like, and which shard they are."""

    layout: KVLayout
    shard: int


@dataclass(frozen=True, slots=True)
class Load:
    """Fill the pages of ``tokens`` (first, end) from the store."""

    request: str
    tokens: tuple[int, int]
    first: int
    """Index of the block that ``keys`` begin with."""
    keys: tuple[tuple[BlockKey, ...], ...]
    """By shard."""
    before: tuple[BlockKey | None, ...]
    """The block before these, by shard."""
    total: int
    """Blocks of the whole prompt."""
    base: int
    """Index of the request's engine block that ``pages`` begin with."""
    pages: tuple[int, ...]
    """The engine blocks that hold these tokens."""
    background: bool


@dataclass(frozen=True, slots=True)
class Save:
    """Keep these blocks; their tokens are computed when the step is done."""

    request: str
    first: int
    keys: tuple[tuple[BlockKey, ...], ...]
    before: tuple[BlockKey | None, ...]
    total: int
    hits: int
    """How many of the prompt's blocks were stored when it came."""
    base: int
    pages: tuple[int, ...]


@dataclass(slots=True)
class Plan(KVConnectorMetadata):
    """``epoch`` counts the failed loads that the scheduler had heard of when it made this."""

    step: int
    epoch: int
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass(slots=True)
class Report(KVConnectorWorkerMetadata):
    """``kept``: step → how many blocks of each of its saves are kept now. ``failed``: request → the first block that
    did not load. ``bad_epoch``: plans of this epoch and before were computed from missing blocks."""

    kept: dict[int, list[int]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    bad_epoch: int = -1

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        assert isinstance(other, Report)
        kept = dict(self.kept)
        for step, counts in other.kept.items():
            mine = kept.get(step, counts)
            kept[step] = [min(pair) for pair in zip(mine, counts, strict=True)]
        failed = dict(self.failed)
        for request, block in other.failed.items():
            failed[request] = min(block, failed.get(request, block))
        return Report(kept, failed, max(self.bad_epoch, other.bad_epoch))
