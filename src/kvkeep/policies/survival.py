"""A part of the hazard policy: when are blocks of a class used again, and what is it worth to wait for it?

For each class, decayed counts of reuses and of time waited by age. A class is a combination of features, and most are
seldom seen. So what is expected of one is what all do, times a factor for each of its features, learned from all
classes that share it; only what is seen of the class at an age beyond that is its own. The last feature also shifts
the age: freely, and as far as it says how long earlier turns took, by the age beside that time, whatever the time.
What comes out is the Gittins index (J. C. Gittins, "Bandit processes and dynamic allocation indices", 1979): of all
times to give up at, the best ratio of the chance of a reuse until then to the time held until then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]

BINS = 24
FACTOR = 1.5
EDGES = (0.0, *(FACTOR**k for k in range(BINS)))
"""Seconds at which the age bins begin; the last one has no end."""
FEATURE_PRIOR = 10.0
"""Reuses that a feature needs before its factor is believed as much as that it makes no difference …"""
AGE_PRIOR = 5.0
"""… and one of its ages …"""
BIN_PRIOR = 40.0
"""… and a class's age bin, before it is believed as much as its features."""
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
    """Classes by ``features``: how many values each has. They are numbered with the last one running fastest.

    ``usual_times``: for the last values of the last feature, how many seconds earlier turns took there.
    """

    def __init__(self, *features: int, usual_times: Sequence[float] = ()) -> None:
        self._shape = (*features, BINS)
        count = math.prod(features)
        self._reuses = [[0.0] * BINS for _ in range(count)]
        self._waited = [[0.0] * BINS for _ in range(count)]
        # One array a feature, and one of the last by age. Each has the axes of all, of length 1 but for its own.
        axes = [{axis} for axis in range(len(features))] + [{len(features) - 1, len(features)}]
        self._factors: list[_Array] = [
            np.ones([values if axis in own else 1 for axis, values in enumerate(self._shape)]) for own in axes
        ]
        # A factor for each distance between age and usual time, in bins; distance 0 is in the middle, and the first one
        # stands for no usual time. Which of them an age of the last feature's values has:
        self._by_distance = np.ones(2 * BINS)
        self._distance = np.zeros((features[-1], BINS), dtype=np.intp)
        for value, seconds in enumerate(usual_times, features[-1] - len(usual_times)):
            self._distance[value] = np.arange(BINS) - bin_of(seconds) + BINS
        self.index: list[list[float]] = [[1.0] * BINS for _ in range(count)]
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
        rates = self._rates(reuses.reshape(self._shape), waited.reshape(self._shape), hazard).reshape(reuses.shape)
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

    def _rates(self, reuses: _Array, waited: _Array, hazard: _Array) -> _Array:
        """Reuses a second by class and age: from the features, then what the class has of its own at each age.

        The factors depend on each other: a refresh improves each of them once, with the others as they are.
        """
        rates = hazard * self._by_distance[self._distance]
        for factor in self._factors:
            rates = rates * factor
        *of_features, by_age = range(len(self._factors))
        for number in of_features:
            rates = self._improve(number, FEATURE_PRIOR, reuses, waited, rates)
        rates = self._improve_by_distance(reuses, waited, rates)
        rates = self._improve(by_age, AGE_PRIOR, reuses, waited, rates)
        rates_by_age: _Array = (reuses + BIN_PRIOR) / (waited + BIN_PRIOR / rates)
        return rates_by_age

    def _improve(self, number: int, prior: float, reuses: _Array, waited: _Array, rates: _Array) -> _Array:
        factor = self._factors[number]
        over = tuple(axis for axis, values in enumerate(factor.shape) if values == 1)
        seen, expected = reuses.sum(over, keepdims=True), (waited * rates).sum(over, keepdims=True)
        self._factors[number] = (seen + prior) / (expected / factor + prior)
        improved: _Array = rates * (self._factors[number] / factor)
        return improved

    def _improve_by_distance(self, reuses: _Array, waited: _Array, rates: _Array) -> _Array:
        factor, distance, over = self._by_distance, self._distance, tuple(range(reuses.ndim - 2))
        seen, expected = (
            np.bincount(distance.ravel(), each.sum(over).ravel(), len(factor)) for each in (reuses, waited * rates)
        )
        self._by_distance = (seen + AGE_PRIOR) / (expected / factor + AGE_PRIOR)
        self._by_distance[0] = 1.0
        improved: _Array = rates * (self._by_distance / factor)[distance]
        return improved
