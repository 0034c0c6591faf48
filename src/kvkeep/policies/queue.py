"""A part of several policies: a row of keys, oldest first, that knows how many bytes they have."""

from __future__ import annotations

from collections import OrderedDict

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Allowed


class Queue:
    """What is pushed goes to the young end. Of ghosts, the bytes are those that the block had."""

    def __init__(self) -> None:
        self._nbytes: OrderedDict[BlockKey, int] = OrderedDict()
        self.nbytes = 0

    def push(self, key: BlockKey, nbytes: int) -> None:
        self._nbytes[key] = nbytes
        self.nbytes += nbytes

    def pop(self, key: BlockKey) -> int | None:
        """Take ``key`` out: its bytes, or ``None`` if it is not here."""
        nbytes = self._nbytes.pop(key, None)
        if nbytes is not None:
            self.nbytes -= nbytes
        return nbytes

    def renew(self, key: BlockKey) -> None:
        """Move ``key`` to the young end."""
        self._nbytes.move_to_end(key)

    def first(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in self._nbytes if allowed(key)), None)

    def trim(self, nbytes: int) -> None:
        """Drop the oldest until no more than ``nbytes`` are left."""
        while self.nbytes > nbytes and self._nbytes:
            self.nbytes -= self._nbytes.popitem(last=False)[1]

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._nbytes

    def __len__(self) -> int:
        return len(self._nbytes)
