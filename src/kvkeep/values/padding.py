"""Bytes of an array that are no part of its value: between fields, in columns that a view leaves out, in long doubles.

What lies there is whatever was in that memory before. It is neither stored nor hashed, so equal values are equal bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

EXTENDED = (np.longdouble, np.clongdouble)


def solid(flat: Array) -> Array:
    """An array of one dimension, in one piece: itself, or a copy with zeros where its elements hold nothing."""
    if flat.dtype.kind != "V" and flat.dtype.type not in EXTENDED:
        return flat
    holes = _holes(flat.dtype)
    if not holes.any() or not len(flat):
        return flat
    own = flat.copy()
    own.view(np.uint8).reshape(len(flat), -1)[:, holes] = 0
    return own


@lru_cache(maxsize=256)
def _holes(dtype: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Which bytes of an element are no part of its value."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.tile(_holes(base), math.prod(shape))
    holes = np.zeros(dtype.itemsize, bool)
    if dtype.names is not None:
        holes[:] = True
        for name in dtype.names:
            form, offset = dtype.fields[name][:2]  # type: ignore[index]
            holes[offset : offset + form.itemsize] &= _holes(form)
    elif dtype.type in EXTENDED and np.finfo(dtype).nmant == 63:
        each = holes.reshape(-1, np.dtype(np.longdouble).itemsize)  # of x87: ten bytes
        each[:, slice(10, None) if dtype.isnative else slice(-10)] = True
    return holes
