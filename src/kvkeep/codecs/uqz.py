"""Uniform quantization, then entropy coding: the fewest bits for a given error.

Keys lose their channels' mean over the block and are rounded to steps of ``k_step`` × the RMS of their head; values to
steps of ``v_step`` × the RMS of their token and head. Most numbers are then small, and zstd's Huffman coder takes them
to their entropy. No calibration: all scales come from the block. A sequence's first token is exact.

Stored form: the streams of :mod:`kvkeep.codecs.entropy`, over all layer groups one after the other: steps, tops and
the means' upper bytes; the means' lower bytes (signed); levels; key numbers; value numbers (see
:mod:`kvkeep.codecs.kernels`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np

from kvkeep.buffers import Buffer
from kvkeep.codecs import entropy
from kvkeep.codecs.kernels import kernels
from kvkeep.codecs.lossy import Lossy
from kvkeep.codecs.values import Array, Shape, groups, shapes
from kvkeep.layout import KVLayout


class UQZ(Lossy):
    name: ClassVar[str] = "uqz"
    exact_tokens: ClassVar[int] = 1  # measured: more of them cost bits and change nothing

    k_step: ClassVar[float] = 0.20
    v_step: ClassVar[float] = 0.50
    grid: ClassVar[float] = 4.0
    """Steps between two means: they need not be exact, only known; about 0.8 of the RMS costs the fewest bits."""

    def code(self, view: memoryview, layout: KVLayout, skip: int, head: bytes, tail: bytes) -> Buffer | None:
        whole = _arrays(layout)
        steps = (self.k_step, self.v_step, self.grid)
        for (shape, x), arrays in zip(groups(view, layout), _of_groups(whole, layout), strict=True):
            if not kernels().uqz_encode(x, skip, steps, arrays, shape, layout.dtype):
                return None
        k_steps, v_tops, means, levels, k, v = whole
        high = ((means + 128) >> 8).astype(np.uint8)  # so it is 0 for what the lower byte alone says, signs included
        side = np.concatenate([k_steps.view(np.uint8), v_tops.view(np.uint8), high])
        streams = [side, means.astype(np.uint8), levels, k.view(np.uint8), v.view(np.uint8)]
        return entropy.pack(streams, head, tail)

    def undo(self, coded: memoryview, layout: KVLayout, out: memoryview) -> None:
        steps, tops, means, levels, k, v = _sizes(shapes(layout))
        streams = entropy.unpack(coded, [2 * steps + 2 * tops + means, means, levels, k, v])
        side = streams[0]
        both = side[2 * (steps + tops) :].astype("<i2")
        both <<= 8
        both += streams[1].view(np.int8)
        whole = (
            side[: 2 * steps].view("<u2"),
            side[2 * steps : 2 * (steps + tops)].view("<u2"),
            both,
            streams[2],
            streams[3].view(np.int8),
            streams[4].view(np.int8),
        )
        for (shape, x), arrays in zip(groups(out, layout), _of_groups(whole, layout), strict=True):
            kernels().uqz_decode(self.grid, arrays, x, shape, layout.dtype)


class UQZHQ(UQZ):
    name: ClassVar[str] = "uqz-hq"
    k_step: ClassVar[float] = 0.10
    v_step: ClassVar[float] = 0.20
    grid: ClassVar[float] = 8.0


class UQZMax(UQZ):
    name: ClassVar[str] = "uqz-max"
    k_step: ClassVar[float] = 0.35
    v_step: ClassVar[float] = 0.70
    grid: ClassVar[float] = 2.0


@lru_cache(64)
def _sizes(of: tuple[Shape, ...]) -> list[int]:
    """Values in each of the kernel's arrays, over all of these groups."""
    each = [
        (s.layers * s.heads, s.layers, s.layers * s.heads * s.k_dim, s.layers * s.heads * s.tokens * bool(s.v_dim),
         s.layers * s.heads * s.tokens * s.k_dim, s.layers * s.heads * s.tokens * s.v_dim)
        for s in of
    ]  # fmt: skip
    return [sum(column) for column in zip(*each, strict=True)]


def _arrays(layout: KVLayout) -> tuple[Array, ...]:
    types = ("<u2", "<u2", "<i2", "u1", "i1", "i1")
    return tuple(np.empty(count, kind) for count, kind in zip(_sizes(shapes(layout)), types, strict=True))


def _of_groups(whole: tuple[Array, ...], layout: KVLayout) -> list[tuple[Array, ...]]:
    """The same arrays, cut by group."""
    if len(layout.groups) == 1:
        return [whole]
    parts = []
    at = [0] * len(whole)
    for shape in shapes(layout):
        ends = [a + b for a, b in zip(at, _sizes((shape,)), strict=True)]
        parts.append(tuple(array[a:b] for array, a, b in zip(whole, at, ends, strict=True)))
        at = ends
    return parts
