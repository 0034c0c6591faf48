"""LeCaR: LRU or LFU chooses the victim; the one that regrets more of its choices chooses less often.

G. Vietri, L. V. Rodriguez, W. A. Martinez, S. Lyons, J. Liu, R. Rangaswami, M. Zhao, G. Narasimhan, "Driving cache
replacement with ML-based LeCaR", HotStorage 2018. The paper draws the expert at random by weight; here each expert's
weight is added up and the one whose turn has come chooses, so that decisions repeat.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import ClassVar

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.queue import Queue
from kvkeep.policies.ranking import Ranking

LEARNING_RATE = 0.45
DISCOUNT = 0.005
"""What a regret is worth as many uses after the mistake as there are blocks."""

MIN_WEIGHT = 1e-6


class LeCaR(EvictionPolicy):
    """Learns when it is asked to admit a block: a miss that an expert's ghosts know is that expert's mistake."""

    name: ClassVar[str] = "lecar"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._by_use: OrderedDict[BlockKey, int] = OrderedDict()  # → bytes
        self._by_count = Ranking()
        self._gone = Queue()
        self._mistakes: dict[BlockKey, tuple[bool, int]] = {}  # of ghosts → by recency? and when
        self._uses = 0  # of all blocks: the paper's clock
        self._recency_weight = 0.5
        self._turn = 0.0  # of recency: at 1 it has come

    def admit(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        self._uses += 1
        mistake = self._mistakes.get(key)
        if mistake is not None:
            by_recency, when = mistake
            regret = DISCOUNT ** ((self._uses - when) / max(len(self._by_use), 1))
            odds = self._recency_weight / (1 - self._recency_weight)
            odds *= math.exp((-LEARNING_RATE if by_recency else LEARNING_RATE) * regret)
            self._recency_weight = min(max(odds / (1 + odds), MIN_WEIGHT), 1 - MIN_WEIGHT)
        return True

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._gone.pop(key)
        self._mistakes.pop(key, None)
        self._by_use[key] = nbytes
        self._by_count[key] = 1

    def touch(self, key: BlockKey, access: Access) -> None:
        self._uses += 1
        self._by_use.move_to_end(key)
        self._by_count[key] = self._by_count[key] + 1

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        nbytes = self._by_use.pop(key, None)
        if nbytes is None:
            return
        self._by_count.discard(key)
        if evicted:
            recency = self._recency_turn
            self._turn += self._recency_weight - recency
            self._gone.push(key, nbytes)
            self._mistakes[key] = recency, self._uses
            while self._gone.nbytes > self.capacity:
                oldest = self._gone.first(lambda _: True)
                assert oldest is not None
                self._gone.pop(oldest)
                del self._mistakes[oldest]

    def victim(self, allowed: Allowed) -> BlockKey | None:
        if self._recency_turn:
            return next((key for key in self._by_use if allowed(key)), None)
        return self._by_count.first(allowed)

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def _recency_turn(self) -> bool:
        return self._turn + self._recency_weight >= 1
