"""A part of the hazard policy: when are blocks of a class used again, and what is it worth to wait for it?

For each class, decayed counts of reuses and of time waited by age. Classes with few observations lean on their family,
and that on all. What comes out is the Gittins index (J. C. Gittins, "Bandit processes and dynamic allocation indices",
1979): of all times to give up at, the best ratio of the chance of a reuse until then to the time held until then.
"""

from __future__ import annotations

import numpy as np

BINS = 24
FACTOR = 1.5
EDGES = (0.0, *(FACTOR**k for k in range(BINS)))
"""Seconds at which the age bins begin; the last one has no end."""
CLASS_PRIOR = 20.0
"""Reuses that a class needs before it is believed as much as its family."""
BIN_PRIOR = 5.0
DECAY = 0.998
"""At each refresh: half is forgotten after 350 of them. Faster, and classes are judged by too few turns."""
GUARD = 0.95
"""Share of the observed reuses that happen before the age from which on nothing is waited for."""
MIN_REUSES = 50.0

_WIDTHS = np.array([*(np.diff(EDGES)), EDGES[-1]])[:BINS]


def bin_of(age: float) -> int:
    """The age bin that ``age`` seconds fall into."""
    low, high = 0, BINS
    while high - low > 1:
        middle = (low + high) // 2
        if age >= EDGES[middle]:
            low = middle
        else:
            high = middle
    return low


class Survival:
    """``families`` × ``members`` classes, numbered family by family."""

    def __init__(self, families: int, members: int) -> None:
        self._shape = families, members
        self._reuses = [[0.0] * BINS for _ in range(families * members)]
        self._waited = [[0.0] * BINS for _ in range(families * members)]
        self.index: list[list[float]] = [[1.0] * BINS for _ in range(families * members)]
        self.guard = float("inf")
        self.usual = 0.0

    def reuse(self, kind: int, age: float, weight: float) -> None:
        """A block of class ``kind`` was used again at ``age``; the time waited in earlier bins has been told."""
        at = bin_of(age)
        self._reuses[kind][at] += weight
        self._waited[kind][at] += weight * (age - EDGES[at])

    def wait(self, kind: int, at: int, weight: float) -> None:
        """A block of class ``kind`` was not used all through age bin ``at``."""
        self._waited[kind][at] += weight * (EDGES[at + 1] - EDGES[at])

    def refresh(self) -> None:
        """Compute the index and the guard from what has been observed, and let that fade a little."""
        reuses, waited = np.array(self._reuses), np.array(self._waited)
        all_reuses = reuses.sum(0)
        hazard = (all_reuses + 0.1) / (waited.sum(0) + 2 * _WIDTHS)
        total = all_reuses.sum()
        if total > MIN_REUSES:
            half, last = (int(at) for at in np.searchsorted(np.cumsum(all_reuses), (0.5 * total, GUARD * total)))
            self.usual = EDGES[min(half + 1, BINS)]
            self.guard = EDGES[last + 1] if last + 1 < len(EDGES) else float("inf")
        # How much more often than all, first the family, then the class; then bin by bin.
        seen, expected = reuses.sum(1), (waited * hazard).sum(1)
        family_seen, family_expected = (row.reshape(self._shape).sum(1) for row in (seen, expected))
        family = np.repeat((family_seen + CLASS_PRIOR) / (family_expected + CLASS_PRIOR), self._shape[1])
        ratio = (seen + CLASS_PRIOR * family) / (expected + CLASS_PRIOR)
        rates = (reuses + BIN_PRIOR) / (waited + BIN_PRIOR / (ratio[:, None] * hazard))
        leaves = np.exp(-rates * _WIDTHS)
        alive = np.concatenate([np.ones((len(rates), 1)), np.cumprod(leaves, 1)], 1)
        held = np.concatenate([np.zeros((len(rates), 1)), np.cumsum(alive[:, :-1] * (1 - leaves) / rates, 1)], 1)
        index = np.empty_like(rates)
        for start in range(BINS):
            used = alive[:, start : start + 1] - alive[:, start + 1 :]
            time = held[:, start + 1 :] - held[:, start : start + 1]
            index[:, start] = (used / np.maximum(time, 1e-300)).max(1)
        self.index = index.tolist()
        self._reuses, self._waited = (reuses * DECAY).tolist(), (waited * DECAY).tolist()
