"""The kernels in NumPy: what ``kernels.c`` does, in the same order of operations, so with the same bytes.

Used until the compiled kernels are there, and where they never are. Arguments: see :mod:`kvkeep.codecs.kernels`.
All arithmetic is IEEE single precision; sums have a fixed order (:func:`_sum`). Scales are floats cut to a few bits of
mantissa by integer arithmetic on their bits, so that no logarithm, whose rounding differs, is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.codecs.values import Shape

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

LANES = 8
HUGE_BITS = 0x57800000  # 2^48: what is larger, infinite or NaN is not coded, so 2^28 squares have a finite sum
TINY_BITS = 0x21800000  # 2^-60: the smallest step
GROUP = 32  # int4: values that share a step

_F = np.float32


def int8_nbytes(s: Shape) -> int:
    """Bytes of a group in the form of ``int8``."""
    rows = s.layers * s.heads
    side = 2 * s.layers + rows + rows * ((s.k_dim + 1) // 2) + (rows * s.tokens if s.v_dim else 0)
    return _even(side + rows * s.tokens * (s.k_dim + s.v_dim))


def int4_nbytes(s: Shape) -> int:
    """Bytes of a group in the form of ``int4``."""
    rows = s.layers * s.heads
    side = 2 * rows * (-(-s.tokens // GROUP) * s.k_dim + s.tokens * -(-s.v_dim // GROUP))
    return _even(4 * s.layers + side + rows * s.tokens * ((s.k_dim + 1) // 2 + (s.v_dim + 1) // 2))


def _even(nbytes: int) -> int:
    """The next group begins with numbers of two bytes."""
    return nbytes + nbytes % 2


def int8_encode(x: Array, stored: Array, s: Shape, dtype: str) -> bool:
    k, v = _parts(x, s)
    k_levels, v_tops, v_levels, k_tops, q = _int8_parts(stored, s)
    qk, qv = _parts(q.view(np.int8), s)
    keys = _load(k, dtype)
    head = _magnitudes(keys).max((2, 3))
    if head.size and head.max() > HUGE_BITS:
        return False
    top = (np.maximum(head, TINY_BITS + (8 << 23)) + 0x7FFFFF) >> 23
    k_tops[:] = top
    channel = _magnitudes(keys).max(2)
    level = np.clip(2 * top[:, :, None] - ((channel + 0x3FFFFF) >> 22), 0, 15)
    even = np.zeros((s.layers, s.heads, 2 * ((s.k_dim + 1) // 2)), np.uint8)
    even[..., : s.k_dim] = level
    k_levels[:] = even[..., ::2] | even[..., 1::2] << 4
    scale = _real((2 * top[:, :, None] - level) << 22) * _F(1 / 127)
    qk[:] = _quantized(keys, _F(1) / scale[:, :, None, :])
    if not s.v_dim:
        v_tops[:] = 0
        return True
    values = _load(v, dtype)
    most = _magnitudes(values).max(3)
    if most.max() > HUGE_BITS:
        return False
    tops = (np.maximum(most.max((1, 2)), TINY_BITS) + 0xFFFFF) >> 20
    v_tops[:] = tops
    level = np.clip(tops[:, None, None] - ((most + 0xFFFFF) >> 20), 0, 255)
    v_levels[:] = level
    scale = _real((tops[:, None, None] - level) << 20) * _F(1 / 127)
    qv[:] = _quantized(values, _F(1) / scale[..., None])
    return True


@np.errstate(all="ignore")  # of a damaged payload anything may come
def int8_decode(stored: Array, x: Array, s: Shape, dtype: str) -> None:
    k, v = _parts(x, s)
    k_levels, v_tops, v_levels, k_tops, q = _int8_parts(stored, s)
    qk, qv = _parts(q.view(np.int8), s)
    level = np.empty((s.layers, s.heads, 2 * k_levels.shape[2]), np.int32)
    level[..., ::2] = k_levels & 15
    level[..., 1::2] = k_levels >> 4
    scale = _real((2 * k_tops[:, :, None].astype(np.int32) - level[..., : s.k_dim]) << 22) * _F(1 / 127)
    for at in _pieces(s):
        _store(k[at], qk[at].astype(np.float32) * scale[at[0], :, None, :], dtype)
        if s.v_dim:
            step = _real((v_tops[at[0]].astype(np.int32) - v_levels[at]) << 20) * _F(1 / 127)
            _store(v[at], qv[at].astype(np.float32) * step[..., None], dtype)


def uqz_encode(
    x: Array, skip: int, steps: tuple[float, float, float], out: tuple[Array, ...], s: Shape, dtype: str
) -> bool:
    k_steps, v_tops, means, v_levels, qk, qv = out
    k, v = _parts(x, s)
    k_step, v_step, grid = (_F(step) for step in steps)
    keys = _load(k, dtype)[:, :, skip:]
    if _magnitudes(keys).max() > HUGE_BITS:
        return False
    tokens = s.tokens - skip
    mean = np.zeros((s.layers, s.heads, s.k_dim), np.float32)
    for token in range(tokens):
        mean += keys[:, :, token]
    mean /= _F(tokens)
    rest = keys - mean[:, :, None, :]
    power = np.zeros_like(mean)
    for token in range(tokens):
        power += rest[:, :, token] * rest[:, :, token]
    step = k_step * np.sqrt(_sum(power) / _F(tokens * s.k_dim))
    step = np.maximum(step, _real(_magnitudes(rest).max((2, 3))) / _F(122))
    step = np.maximum(step, _real(_magnitudes(mean).max(2)) / (_F(32000) * grid))
    code = (np.maximum(step.view(np.int32), TINY_BITS) + 0xFFFF) >> 16
    k_steps[:] = code.ravel()
    step = _real(code << 16)[:, :, None]
    wide = step * grid
    near = np.clip(np.rint(mean / wide), -32767, 32767)
    means[:] = near.ravel()
    qk = qk.reshape(s.layers, s.heads, s.tokens, s.k_dim)
    qk[:, :, :skip] = 0
    qk[:, :, skip:] = _quantized(keys - (near * wide)[:, :, None, :], (_F(1) / step)[:, :, None])
    if not s.v_dim:
        v_tops[:] = 0
        return True
    values = _load(v, dtype)[:, :, skip:]
    most = _magnitudes(values).max(3)
    if most.max() > HUGE_BITS:
        return False
    step = v_step * np.sqrt(_sum(values * values) / _F(s.v_dim))
    step = np.maximum(step, _real(most) / _F(127))
    tops = (np.maximum(step.view(np.int32).max((1, 2)), TINY_BITS) + 0x80000) >> 20
    v_tops[:] = tops
    level = np.clip(tops[:, None, None] - ((step.view(np.int32) + 0x80000) >> 20), 0, 255)
    levels = v_levels.reshape(s.layers, s.heads, s.tokens)
    levels[:, :, :skip] = 0
    levels[:, :, skip:] = level
    qv = qv.reshape(s.layers, s.heads, s.tokens, s.v_dim)
    qv[:, :, :skip] = 0
    qv[:, :, skip:] = _quantized(values, (_F(1) / _real((tops[:, None, None] - level) << 20))[..., None])
    return True


@np.errstate(all="ignore")  # of a damaged payload anything may come
def uqz_decode(grid: float, stored: tuple[Array, ...], x: Array, s: Shape, dtype: str) -> None:
    k_steps, v_tops, means, v_levels, qk, qv = stored
    k, v = _parts(x, s)
    step = _real(k_steps.astype(np.int32) << 16).reshape(s.layers, s.heads, 1)
    near = means.reshape(s.layers, s.heads, s.k_dim).astype(np.float32) * (step * _F(grid))
    qk = qk.reshape(s.layers, s.heads, s.tokens, s.k_dim)
    qv = qv.reshape(s.layers, s.heads, s.tokens, s.v_dim)
    levels = v_levels.reshape(s.layers, s.heads, s.tokens) if s.v_dim else v_levels
    for at in _pieces(s):
        _store(k[at], qk[at].astype(np.float32) * step[at[0]][:, None] + near[at[0]][:, None, :], dtype)
        if s.v_dim:
            scale = _real((v_tops[at[0]].astype(np.int32) - levels[at]) << 20)
            _store(v[at], qv[at].astype(np.float32) * scale[..., None], dtype)


def int4_encode(x: Array, skip: int, stored: Array, s: Shape, dtype: str) -> bool:
    tops, k_levels, k_lows, v_levels, v_lows, qk, qv = _int4_parts(stored, s)
    k, v = _parts(x, s)
    keys = _load(k, dtype)
    if _magnitudes(keys).max() > HUGE_BITS:
        return False
    starts = range(0, s.tokens, GROUP)
    spans = [slice(max(start, skip), start + GROUP) for start in starts]
    low = np.stack([keys[:, :, span].min(2) for span in spans], 2)
    high = np.stack([keys[:, :, span].max(2) for span in spans], 2)
    tops[:, 0], k_levels[:], scale = _int4_levels(low, high)
    k_lows[:] = np.rint(low * scale)
    for at, start in enumerate(starts):
        part = np.rint(keys[:, :, start : start + GROUP] * scale[:, :, at, None]) - k_lows[:, :, at, None]
        part = np.clip(part, 0, 15).astype(np.uint8)
        part[:, :, : max(0, skip - start)] = 0
        _pack_rows(qk[:, :, start : start + GROUP], part)
    tops[:, 1] = 0
    if not s.v_dim:
        return True
    values = _load(v, dtype)
    if _magnitudes(values).max() > HUGE_BITS:
        return False
    starts = range(0, s.v_dim, GROUP)
    low = np.stack([values[..., start : start + GROUP].min(3) for start in starts], 3)[:, :, skip:]
    high = np.stack([values[..., start : start + GROUP].max(3) for start in starts], 3)[:, :, skip:]
    tops[:, 1], v_levels[:, :, skip:], scale = _int4_levels(low, high)
    v_lows[:, :, skip:] = np.rint(low * scale)
    v_levels[:, :, :skip] = 0
    v_lows[:, :, :skip] = 0
    whole = np.zeros(values.shape, np.uint8)
    for at, start in enumerate(starts):
        part = np.rint(values[:, :, skip:, start : start + GROUP] * scale[..., at, None])
        whole[:, :, skip:, start : start + GROUP] = np.clip(part - v_lows[:, :, skip:, at, None], 0, 15)
    _pack_rows(qv, whole)
    return True


@np.errstate(all="ignore")  # of a damaged payload anything may come
def int4_decode(stored: Array, x: Array, s: Shape, dtype: str) -> None:
    tops, k_levels, k_lows, v_levels, v_lows, qk, qv = _int4_parts(stored, s)
    k, v = _parts(x, s)
    for at in _pieces(s):
        layer, group = at[0], at[2].start // GROUP
        scale = _real((tops[layer, 0].astype(np.int32) - k_levels[layer, :, group, None]) << 20)
        _store(k[at], (_unpack_rows(qk[at], s.k_dim) + k_lows[layer, :, group, None].astype(np.float32)) * scale, dtype)
        if s.v_dim:
            scale = np.repeat(_real((tops[layer, 1].astype(np.int32) - v_levels[at]) << 20), GROUP, 2)
            low = np.repeat(v_lows[at].astype(np.float32), GROUP, 2)
            _store(v[at], (_unpack_rows(qv[at], s.v_dim) + low[..., : s.v_dim]) * scale[..., : s.v_dim], dtype)


# --- values and their bits


def _parts(x: Array, s: Shape) -> tuple[Array, Array]:
    """Views of a group's keys ``[layers, heads, tokens, k_dim]`` and its values."""
    split = s.heads * s.tokens * s.k_dim
    rows = x.reshape(s.layers, -1)
    head = (s.layers, s.heads, s.tokens)
    return rows[:, :split].reshape(*head, s.k_dim, copy=False), rows[:, split:].reshape(*head, s.v_dim, copy=False)


def _pieces(s: Shape) -> Iterator[tuple[int, slice, slice]]:
    """Layer, heads and tokens to decode at once: floats take more room than what is decoded."""
    for layer in range(s.layers):
        for start in range(0, s.tokens, GROUP):
            yield layer, slice(None), slice(start, start + GROUP)


def _load(x: Array, dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return x.astype(np.float32)


def _store(x: Array, floats: Floats, dtype: str) -> None:
    if dtype == "bfloat16":
        floats.view(np.uint32)[...] += 0x8000
        x[...] = floats.view(np.uint32) >> 16
    elif dtype == "float16":
        x[...] = np.clip(floats, -65504, 65504)
    else:
        x[...] = floats


def _magnitudes(floats: Floats) -> npt.NDArray[np.int32]:
    return floats.view(np.int32) & 0x7FFFFFFF


def _real(bits: Array) -> Floats:
    return bits.astype(np.int32).view(np.float32)


def _quantized(floats: Floats, inverse: Floats) -> Array:
    numbers: Array = np.clip(np.rint(floats * inverse), -127, 127)
    return numbers


def _sum(x: Floats) -> Floats:
    """Over the last axis, in eight lanes: lane j adds elements j, j + 8, … in order; then the lanes in pairs."""
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for start in range(0, x.shape[-1], LANES):
        part = x[..., start : start + LANES]
        lanes[..., : part.shape[-1]] += part
    a, b, c, d, e, f, g, h = np.moveaxis(lanes, -1, 0)
    total: Floats = ((a + e) + (c + g)) + ((b + f) + (d + h))
    return total


# --- stored forms


def _int8_parts(stored: Array, s: Shape) -> tuple[Array, ...]:
    rows, half = s.layers * s.heads, (s.k_dim + 1) // 2
    cut = np.cumsum([2 * s.layers, rows, rows * half, rows * s.tokens if s.v_dim else 0]).tolist()
    v_tops = stored[: cut[0]].view("<u2")
    k_tops = stored[cut[0] : cut[1]].reshape(s.layers, s.heads)
    k_levels = stored[cut[1] : cut[2]].reshape(s.layers, s.heads, half)
    v_levels = stored[cut[2] : cut[3]]
    return k_levels, v_tops, v_levels.reshape(s.layers, s.heads, -1), k_tops, stored[cut[3] : cut[3] + s.num_values]


def _int4_parts(stored: Array, s: Shape) -> tuple[Array, ...]:
    k_shape = (s.layers, s.heads, -(-s.tokens // GROUP), s.k_dim)
    v_shape = (s.layers, s.heads, s.tokens, -(-s.v_dim // GROUP))
    k_side, v_side = int(np.prod(k_shape)), int(np.prod(v_shape))
    rows = (s.layers, s.heads, s.tokens)
    k_nbytes, v_nbytes = (int(np.prod(rows)) * ((dim + 1) // 2) for dim in (s.k_dim, s.v_dim))
    cut = np.cumsum([4 * s.layers, k_side, k_side, v_side, v_side, k_nbytes, v_nbytes]).tolist()
    parts = np.split(stored, cut)
    return (
        parts[0].view("<u2").reshape(s.layers, 2),
        parts[1].reshape(k_shape),
        parts[2].view(np.int8).reshape(k_shape),
        parts[3].reshape(v_shape),
        parts[4].view(np.int8).reshape(v_shape),
        parts[5].reshape(*rows, (s.k_dim + 1) // 2),
        parts[6].reshape(*rows, (s.v_dim + 1) // 2),
    )


def _int4_levels(low: Floats, high: Floats) -> tuple[Array, Array, Floats]:
    """Tops of the layers, levels below them, and one over the steps."""
    step = (high - low) * _F(1 / 15)
    step = np.maximum(step, _real(np.maximum(_magnitudes(low), _magnitudes(high))) * _F(1 / 112))
    code = (np.maximum(step.view(np.int32), TINY_BITS) + 0xFFFFF) >> 20
    top = code.reshape(len(code), -1).max(1)
    level = np.clip(top[:, None, None, None] - code, 0, 255)
    return top, level, _F(1) / _real((top[:, None, None, None] - level) << 20)


def _pack_rows(to: Array, q: Array) -> None:
    half = to.shape[-1]
    to[...] = q[..., :half]
    to[..., : q.shape[-1] - half] |= q[..., half:] << 4


def _unpack_rows(packed: Array, dim: int) -> Floats:
    out = np.empty((*packed.shape[:-1], dim), np.float32)
    half = packed.shape[-1]
    out[..., :half] = packed & 15
    out[..., half:] = packed[..., : dim - half] >> 4
    return out


# --- planes of the lossless codec

STEP = 1 << 16
"""Values taken at once: two scratch rows stay in the second-level cache, and NumPy's cost a call is spread."""


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.a = np.empty(STEP, np.uint16)
        self.b = np.empty(STEP, np.uint16)


_scratch = _Scratch()


def split(words: Array, planes: list[Array]) -> None:
    halves = words.view("<u2")
    top = halves[1::2] if len(planes) == 4 else halves  # of each value the half with sign and exponent
    for start in range(0, top.size, STEP):
        part = slice(start, start + STEP)
        x = top[part]
        a, b = _scratch.a[: x.size], _scratch.b[: x.size]
        np.right_shift(x, 7, out=a)
        np.copyto(planes[0][part], a, casting="unsafe")  # bits 14 … 7
        np.bitwise_and(x, 0x807F, out=a)
        np.right_shift(a, 8, out=b)
        np.bitwise_or(a, b, out=a)
        np.copyto(planes[1][part], a, casting="unsafe")  # the sign over bits 6 … 0
        if len(planes) == 4:
            low = halves[2 * start : 2 * (start + STEP) : 2]
            np.right_shift(low, 8, out=a)
            np.copyto(planes[2][part], a, casting="unsafe")
            np.copyto(planes[3][part], low, casting="unsafe")


def join(planes: list[Array], words: Array) -> None:
    halves = words.view("<u2")
    top = halves[1::2] if len(planes) == 4 else halves
    for start in range(0, top.size, STEP):
        part = slice(start, start + STEP)
        x = top[part]
        a, b = _scratch.a[: x.size], _scratch.b[: x.size]
        np.copyto(a, planes[0][part])
        np.multiply(a, 128, out=a)  # a shift, at twice its speed in NumPy 2.4
        np.copyto(b.view(np.int16), planes[1][part].view(np.int8))  # spreads the sign over the upper byte
        np.bitwise_and(b, 0x807F, out=b)
        np.bitwise_or(a, b, out=x)
        if len(planes) == 4:
            np.copyto(a, planes[2][part])
            np.multiply(a, 256, out=a)
            np.copyto(b, planes[3][part])
            np.bitwise_or(a, b, out=halves[2 * start : 2 * (start + STEP) : 2])
