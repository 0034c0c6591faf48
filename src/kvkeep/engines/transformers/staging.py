"""Memory that restored prefixes lie in, and cache layers that grow in it.

Fresh pages cost more than the copy into them, so memory is lent, and comes back by itself once no tensor lies in it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from kvkeep.buffers import PAGE, anonymous, populate
from kvkeep.layout import Array, KVLayout

STAGING_KEPT = 1 << 30
"""Bytes of touched memory that an attached model keeps between calls to restore into; more than that is given back."""

STAGING_AHEAD = 512 << 20
"""Bytes at most that are touched when a model is attached, before anybody asks."""

WORTH_A_THREAD = 16 << 20
"""Bytes of memory whose pages are worth one that touches them beside a load."""

_STEP = 4 << 20
"""Bytes that are touched at a time: other threads that want memory of their own wait for that long."""

_FREED_AT_MOST = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX


class _Region:
    """Memory whose first ``touched`` bytes have been faulted in."""

    def __init__(self, nbytes: int) -> None:
        self.memory = anonymous(nbytes)
        self.touched = 0
        self.lent = False

    def touch_all(self) -> None:
        while self.touched < self.memory.nbytes and not self.lent and self._touch(self.touched, self.memory.nbytes):
            self.touched += _STEP

    def touch_before(self, end: int) -> None:
        """Beside a load, from the other end on: its first block alone touches nearly every huge page."""
        start = (end - 1) // _STEP * _STEP
        while start >= self.touched and self._touch(start, end):
            start -= _STEP

    def _touch(self, start: int, end: int) -> bool:
        return populate(self.memory, start, min(_STEP, end - start))


class Staging:
    """Memory for one restored prefix at a time, kept touched in between. Thread-safe."""

    def __init__(self) -> None:
        self._kept: deque[_Region] = deque(maxlen=1)

    def prepare(self, nbytes: int) -> None:
        """Touch that much in the background, so that the first prefix to be restored need not wait for pages."""
        region = _Region(nbytes)
        self._kept.append(region)
        _start(region.touch_all)

    def borrow(self, nbytes: int) -> Array:
        """``nbytes`` of undefined content, lent for as long as a view of them is alive."""
        try:
            region = self._kept.pop()
        except IndexError:
            region = None
        if region is not None:
            region.lent = True  # or, if it is too small, given up: nobody touches it any further
        if region is None or region.memory.nbytes < nbytes:
            region = _Region(nbytes + nbytes // 4)  # the next turn of a chat needs a little more
        if nbytes - region.touched >= WORTH_A_THREAD:
            _start(partial(region.touch_before, nbytes))
        lent = np.frombuffer(region.memory, np.uint8, nbytes)
        weakref.finalize(lent, self._back, region, nbytes).atexit = False
        return lent

    def _back(self, region: _Region, nbytes: int) -> None:
        """No lock, since the garbage collector may call this at any time."""
        if region.memory.nbytes <= STAGING_KEPT:
            region.touched = max(region.touched, nbytes)
            self._kept.append(region)


def _start(work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # no more threads: who writes there touches it all the same
        threading.Thread(target=work, name="kvkeep-touch", daemon=True).start()


class RestoredLayer(DynamicLayer):
    """A layer with room behind what was restored: the next tokens go there, where :class:`DynamicLayer` copies all
    that it holds at each forward. Once the room is used up, or anything else was done to its tensors, it is one."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """``keys`` and ``values`` ``[batch, heads, room, dim]``, of which ``length`` tokens are there."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.is_initialized = True
        self._room: tuple[torch.Tensor, torch.Tensor] | None = (keys, values)
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._length + key_states.shape[-2]
        if self._room is None or not self._fits(key_states, value_states, end):
            self._room = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        for part, new in zip(self._room, (key_states, value_states), strict=True):
            part[:, :, self._length : end] = new
        self.keys, self.values = (part[:, :, :end] for part in self._room)
        self._length = end
        return self.keys, self.values

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor, end: int) -> bool:
        """Also whether the tensors are still those of the last update: after ``crop``, say, what lies behind them may
        be another's."""
        assert self._room is not None
        return not torch.is_grad_enabled() and all(
            isinstance(held, torch.Tensor)
            and held.data_ptr() == part.data_ptr()
            and held.shape == (*part.shape[:2], self._length, part.shape[3])
            and new.shape == (*part.shape[:2], end - self._length, part.shape[3])
            and (new.dtype, new.device) == (part.dtype, part.device)
            and end <= part.shape[2]
            and (torch.is_inference_mode_enabled() or not part.is_inference())
            for held, part, new in zip((self.keys, self.values), self._room, (key_states, value_states), strict=True)
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are Transformers' own layers: two layers must not grow in one room."""
        state = {name: value for name, value in vars(self).items() if name not in ("_room", "_length")}
        return DynamicLayer, (), state


def carve(flat: Any, layout: KVLayout, batch: int, tokens: int) -> list[tuple[Any, Any]]:
    """Views of each layer's keys and values ``[batch, heads, tokens, dim]`` in flat memory, NumPy's or torch's."""
    views: list[tuple[Any, Any]] = []
    offset = 0
    for group in layout.groups:
        for _ in range(group.num_layers):
            pair: list[Any] = []
            for dim in (group.k_dim, group.v_dim):
                count = batch * group.num_kv_heads * tokens * dim
                part = flat[offset : offset + count].reshape(batch, group.num_kv_heads, tokens, dim) if dim else None
                pair.append(part)
                offset += count
            views.append((pair[0], pair[1]))
    return views


def stacked(flat: Any, layout: KVLayout, batch: int, tokens: int) -> Any:
    """The same memory as ``[layers, 2, batch, heads, tokens, dim]`` where all layers are alike, else None."""
    group = layout.groups[0]
    if len(layout.groups) > 1 or group.k_dim != group.v_dim:
        return None
    shape = (group.num_layers, 2, batch, group.num_kv_heads, tokens, group.k_dim)
    return flat[: int(np.prod(shape))].reshape(shape)


def keep_freed_memory() -> None:
    """Spare the first answer of a new process its page faults.

    Until a block of some size was freed once, glibc returns blocks of that size to the system at each free. In a new
    process each layer's copies of keys and values are then fresh pages, in each forward: twice a suffix's time at
    6,000 tokens of SmolLM2. A process that has read a long prompt has freed large blocks; this does the same, with
    the largest that counts, untouched. It keeps at most 64 MiB of freed memory from then on.
    """
    torch.empty(_FREED_AT_MOST - 4 * PAGE, dtype=torch.uint8)
