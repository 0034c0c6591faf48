"""The contract of an eviction policy: keys, sizes and accesses in, a victim out.

No bytes, clock, lock, randomness or I/O: the object that serves production is the one that the simulator replays, and
its decisions are the same from run to run. A policy has a ``capacity`` in bytes to size its queues by; the owner
decides when to ask for a victim. Every method is amortised O(1) or O(log n): that is part of the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from kvkeep.keys import BlockKey

Allowed = Callable[[BlockKey], bool]


class Access(NamedTuple):
    """Where a block stands in the request that touches it. The clock comes in here.

    ``now``: seconds, never decreasing. ``position``: the block's index in its prompt. ``prompt_blocks``: the prompt's
    length. ``hit_blocks``: how many of its blocks were cached when the request came. ``parent``: the key of the block
    before. ``priority``: all blocks of a lower one are evicted first; the owner sees to that, policies ignore it.
    """

    now: float
    position: int = 0
    prompt_blocks: int = 1
    hit_blocks: int = 0
    parent: BlockKey | None = None
    priority: int = 0


class EvictionPolicy(ABC):
    """Decides who stays. Not thread-safe: its owner calls it under a lock.

    Sequence of calls: for a new block ``admit``, and if that says yes (and room was found) ``insert``; ``touch`` for a
    resident block that is used; ``remove`` when a block is gone, whoever took it away. ``victim`` only names a block:
    the owner then calls ``remove(key, evicted=True)``. A policy may learn from each of these calls, ``admit`` too; it
    works, if less well, for an owner that never asks for admission. Several blocks may be admitted before the first
    of them is inserted, and blocks of one request come in any order.
    """

    name: ClassVar[str]
    leaf_first: ClassVar[bool] = False
    """Does a block go only after those that follow it in a prompt? Policies that do not see to that are wrapped by a
    cache (:mod:`kvkeep.policies.leaf`): it learns of a prompt from the front, so the end would stay longest."""

    def __init__(self, capacity: int) -> None:
        """``capacity``: bytes that the resident blocks may take."""
        self.capacity = capacity

    def admit(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        """Is the block worth storing? Asked once for each new block."""
        return True

    @abstractmethod
    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        """``key`` became resident. It was not."""

    @abstractmethod
    def touch(self, key: BlockKey, access: Access) -> None:
        """``key``, which is resident, was used."""

    @abstractmethod
    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        """``key`` is gone: evicted on this policy's advice, or deleted by others. Unknown keys are ignored."""

    @abstractmethod
    def victim(self, allowed: Allowed) -> BlockKey | None:
        """The resident block to evict next among those for which ``allowed`` says yes; ``None`` if there is none."""

    @abstractmethod
    def __len__(self) -> int:
        """Resident blocks."""
