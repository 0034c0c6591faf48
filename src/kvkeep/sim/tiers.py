"""Several tiers: hits by tier, and what is written to the slower ones under each write rule.

As ``tiered.py`` does it: blocks found below are copied up, the tiers below the first get what their write rule wants,
and a block that is found is touched where it was found. One thing is simpler here: the first tier gets only what its
policy admits, while a cache's first tier also holds, for a while, what waits to be written down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep import registry
from kvkeep.admission import WriteRule, write_rule
from kvkeep.errors import ConfigError
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access
from kvkeep.sim.capacity import parse_capacity
from kvkeep.sim.owner import Owner, accesses_of
from kvkeep.trace import Request, Trace


@dataclass(frozen=True, slots=True)
class TierSpec:
    """``capacity`` in blocks; ``policy`` empty: the one that is replayed."""

    name: str
    capacity: int
    label: str
    policy: str = ""


def parse_tiers(text: str, trace: Trace, *, token_nbytes: float = 0) -> list[TierSpec]:
    """``"memory=1%,disk=10%"``, fastest first; ``memory=1%:hazard`` fixes a tier's policy. Raises ConfigError."""
    specs = []
    for part in text.split(","):
        name, equals, rest = part.partition("=")
        label, _, policy = rest.partition(":")
        if not name.strip() or not equals or not label.strip():
            raise ConfigError(f"{part!r} is no tier: write NAME=CAPACITY, as in memory=1%,disk=10%")
        policy = policy.strip()
        if policy:
            registry.lookup("policies", policy)
        capacity = parse_capacity(label, trace, token_nbytes=token_nbytes)
        specs.append(TierSpec(name.strip(), capacity, label.strip(), policy))
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigError(f"{text!r}: two tiers of one name")
    return specs


class Tiers:
    """Owners fastest first; ``rules``: one for each tier but the first."""

    def __init__(self, owners: Sequence[Owner], rules: Sequence[WriteRule]) -> None:
        self.owners = owners
        self.rules = rules

    def hits(self, keys: Iterable[BlockKey]) -> list[int]:
        """Blocks of the longest prefix that is resident anywhere, by the fastest tier that has them."""
        counts = [0] * len(self.owners)
        for key in keys:
            for number, owner in enumerate(self.owners):
                if key in owner.resident:
                    counts[number] += 1
                    break
            else:
                break
        return counts

    def serve(self, request: Request, hits: int) -> None:
        keys = request.keys
        accesses = accesses_of(request, hits)
        asked = range(request.start, len(keys))
        found: list[list[int]] = [[] for _ in self.owners]
        missing: list[list[int]] = [[] for _ in self.owners]
        for at in asked:
            fastest = True
            for number, owner in enumerate(self.owners):
                if keys[at] not in owner.resident:
                    missing[number].append(at)
                elif fastest:
                    found[number].append(at)
                    fastest = False
        for number, owner in enumerate(self.owners):
            wanted = missing[number]
            if number:
                wanted = _wanted(self.rules[number - 1], keys, asked, wanted, accesses)
            # A tier's policy is told of what its own tier has: what comes up from below is new to it.
            own = accesses_of(request, 0 if request.start else owner.prefix(keys))
            owner.store(keys, wanted, own)
            for at in reversed(found[number]):
                owner.policy.touch(keys[at], own[at])


def _wanted(
    rule: WriteRule, keys: Sequence[BlockKey], asked: Iterable[int], missing: Sequence[int], accesses: Sequence[Access]
) -> list[int]:
    for at in asked:
        rule.seen(keys[at], accesses[at])
    return [at for at in missing if rule.wants(keys[at], accesses[at])]


def run(trace: Trace, specs: Sequence[TierSpec], policy: str, rule: str) -> tuple[list[list[int]], Tiers]:
    """Hit blocks of each request by tier."""
    owners = [Owner(registry.lookup("policies", spec.policy or policy)(spec.capacity), spec.capacity) for spec in specs]
    tiers = Tiers(owners, [write_rule(rule) for _ in specs[1:]])
    hits = []
    for request in trace.requests:
        found = [0] * len(owners) if request.start else tiers.hits(request.keys)
        hits.append(found)
        tiers.serve(request, sum(found))
    return hits, tiers


def columns(trace: Trace, specs: Sequence[TierSpec], hits: Sequence[Sequence[int]], tiers: Tiers) -> dict[str, Any]:
    """What a row says of each tier."""
    row: dict[str, Any] = {}
    for number, (spec, owner) in enumerate(zip(specs, tiers.owners, strict=True)):
        blocks = sum(found[number] for found in hits)
        row[f"{spec.name}_capacity_blocks"] = spec.capacity
        row[f"{spec.name}_policy"] = owner.policy.name
        row[f"{spec.name}_hit_ratio"] = blocks * trace.block_tokens / (trace.num_tokens or 1)
        row[f"{spec.name}_written_blocks"] = owner.stored
    return row
