"""A store that breaks on command."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from kvkeep.buffers import Buffer
from kvkeep.errors import StoreError, StoreFullError
from kvkeep.keys import BlockKey
from kvkeep.stores.base import Owner, Store

Fault = Literal["error", "full", "truncate", "flip", "swap", "lose", "hang"]
"""What goes wrong.

``error``: every method raises StoreError. ``full``: a put finds no room. ``truncate``, ``flip``, ``swap``: a read gives
half of the value, one wrong bit, another key's value. ``lose``: a read finds nothing though ``contains`` said yes.
``hang``: every method takes ``hang_seconds`` longer.
"""


class FaultyStore(Store):
    """``inner``, which fails as told by :meth:`fail` until :meth:`heal`."""

    def __init__(self, inner: Store, *, hang_seconds: float = 0.2) -> None:
        self.inner = inner
        self.capacity = inner.capacity
        self.hang_seconds = hang_seconds
        self._fault: Fault | None = None
        self._left = 0

    def fail(self, fault: Fault, times: int = 1 << 62) -> None:
        """From now on; only the next ``times`` calls that the fault concerns."""
        if fault not in get_args(Fault):
            raise ValueError(f"{fault!r} is not one of {', '.join(get_args(Fault))}")
        self._fault, self._left = fault, times

    def heal(self) -> None:
        self._fault = None

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self._any_call()
        if self._strikes("full"):
            raise StoreFullError("told to be full")
        self.inner.put(key, parts)

    def get(self, key: BlockKey) -> Buffer | None:
        self._any_call()
        value = self.inner.get(key)
        if value is None or self._strikes("lose"):
            return None
        if self._strikes("truncate"):
            return memoryview(value)[: len(value) // 2]
        if self._strikes("flip"):
            wrong = bytearray(value)
            wrong[len(wrong) // 2] ^= 0x10
            return wrong
        if self._strikes("swap"):
            other = next((k for k, _ in self.inner.items() if k != key), key)
            return self.inner.get(other)
        return value

    def contains(self, key: BlockKey) -> bool:
        self._any_call()
        return self.inner.contains(key)

    def delete(self, key: BlockKey) -> bool:
        self._any_call()
        return self.inner.delete(key)

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        self._any_call()
        return self.inner.items()

    def ping(self) -> None:
        self._any_call()
        self.inner.ping()

    def stamps(self) -> dict[BlockKey, float]:
        return self.inner.stamps()

    def attach(self, owner: Owner) -> None:
        self.inner.attach(owner)

    def maintain(self) -> bool:
        return self.inner.maintain()

    def after_fork(self) -> None:
        self.inner.after_fork()

    def close(self) -> None:
        self.inner.close()

    def _any_call(self) -> None:
        if self._strikes("error"):
            raise StoreError("told to fail")
        if self._strikes("hang"):
            time.sleep(self.hang_seconds)

    def _strikes(self, fault: Fault) -> bool:
        if self._fault != fault or self._left < 1:
            return False
        self._left -= 1
        return True
