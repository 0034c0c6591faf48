"""A block as the kernels see it: its groups' shapes, and flat arrays of their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvkeep.layout import KVLayout

Array = npt.NDArray[Any]

FLOATS: dict[str, str] = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
"""Types that a lossy codec codes, and the NumPy type of their values. All others it passes through."""


class Shape(NamedTuple):
    """Of a layer group in a block: for each layer ``[heads, tokens, k_dim]``, then ``[heads, tokens, v_dim]``."""

    layers: int
    heads: int
    tokens: int
    k_dim: int
    v_dim: int

    @property
    def num_values(self) -> int:
        """Values in it."""
        return self.layers * self.heads * self.tokens * (self.k_dim + self.v_dim)


def shapes(layout: KVLayout) -> tuple[Shape, ...]:
    """One a layer group."""
    name = layout.fingerprint, layout.block_nbytes  # values of all sizes have one fingerprint
    found = _shapes.get(name)  # to hash the groups takes a tenth of decoding a small block
    if found is None:
        if len(_shapes) >= _LAYOUTS:
            _shapes.clear()
        tokens = layout.block_tokens
        found = tuple(Shape(one.num_layers, one.num_kv_heads, tokens, one.k_dim, one.v_dim) for one in layout.groups)
        _shapes[name] = found
    return found


_shapes: dict[tuple[bytes, int], tuple[Shape, ...]] = {}
_LAYOUTS = 64


def groups(data: memoryview, layout: KVLayout) -> Iterator[tuple[Shape, Array]]:
    """Each group's shape and its values, flat; writable where ``data`` is."""
    flat = np.frombuffer(data, FLOATS[layout.dtype])
    at = 0
    for shape in shapes(layout):
        yield shape, flat[at : at + shape.num_values]
        at += shape.num_values


def first_tokens(data: memoryview, layout: KVLayout, tokens: int) -> list[Array]:
    """Views of the first tokens, ``[layers, heads, tokens, dim]``: of each group its keys, then its values."""
    views = []
    for shape, flat in groups(data, layout):
        rows = flat.reshape(shape.layers, -1)
        split = shape.heads * shape.tokens * shape.k_dim
        for part, dim in ((rows[:, :split], shape.k_dim), (rows[:, split:], shape.v_dim)):
            views.append(part.reshape(shape.layers, shape.heads, shape.tokens, dim)[:, :, :tokens])
    return views
