"""Arrays in, arrays out: a source and a sink for those who bring their own engine.

:class:`ArraySource` gives a cache blocks out of per-layer ``(keys, values)`` arrays ``[heads, tokens, dim]``;
:class:`ArraySink` fills such arrays from it. An array is anything with the buffer protocol, ``__array__`` or
DLPack that lies in the CPU's memory: NumPy, torch (bfloat16 and float8 too), JAX, … Nothing is converted: values
travel as bits, one copy a block, and an array that would need a conversion is a :class:`LayoutError`. ::

    bound.save(tokens, ArraySource(layout, [(k0, v0), (k1, v1)]))
    with bound.lease(bound.match(tokens)) as lease:
        n = bound.load(lease, ArraySink(layout, [(k0, v0), (k1, v1)]))

Where a whole model's state is one array ``[layers, 2, heads, tokens, dim]``, give that: a block is then one copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvkeep.errors import LayoutError
from kvkeep.layout import Array, KVLayout

Layers = Sequence[tuple[Any, Any]]
"""Keys and values of each layer, in the model's order; values are None where ``v_dim`` is 0."""


class _Arrays:
    """Arrays of one sequence that hold tokens ``start``, ``start + 1``, …"""

    def __init__(self, layout: KVLayout, arrays: Layers | Any, *, start: int = 0) -> None:
        self._layout = layout
        self._start = start
        arrays = arrays if hasattr(arrays, "shape") else list(arrays)
        self._keep_alive = arrays  # bits_of() makes views that own nothing
        self._stacked: Array | None = None
        self._layers: list[tuple[Array, Array | None]] = []
        if hasattr(arrays, "shape"):
            self._stacked = bits_of(arrays, layout)
            self.num_tokens = self._check_stacked(self._stacked)
        else:
            try:
                pairs = [(k, v) for k, v in arrays]
            except (TypeError, ValueError):  # a flat buffer, perhaps
                what = "(keys, values) for each layer, or one array [layers, 2, heads, tokens, dim]"
                raise LayoutError(f"give {what}") from None
            self._layers = [(bits_of(k, layout), None if v is None else bits_of(v, layout)) for k, v in pairs]
            self.num_tokens = self._check_layers()

    def _check_stacked(self, array: Array) -> int:
        groups = self._layout.groups
        if len(groups) != 1 or groups[0].k_dim != groups[0].v_dim:
            raise LayoutError("one array for all layers needs layers that are alike, keys as wide as values")
        group = groups[0]
        want = (group.num_layers, 2, group.num_kv_heads, group.k_dim)
        if array.ndim != 5 or (*array.shape[:3], array.shape[4]) != want:
            raise LayoutError(f"an array of shape {array.shape} is not [{want[0]}, 2, {want[2]}, tokens, {want[3]}]")
        return int(array.shape[3])

    def _check_layers(self) -> int:
        shapes = [
            (group.num_kv_heads, group.k_dim, group.v_dim)
            for group in self._layout.groups
            for _ in range(group.num_layers)
        ]
        if len(shapes) != len(self._layers):
            raise LayoutError(f"{len(self._layers)} layers given, the layout has {len(shapes)}")
        tokens = {int(part.shape[1]) for pair in self._layers for part in pair if part is not None and part.ndim == 3}
        if len(tokens) != 1:
            raise LayoutError(f"keys and values are [heads, tokens, dim] of the same tokens; found {sorted(tokens)}")
        for index, ((heads, k_dim, v_dim), (keys, values)) in enumerate(zip(shapes, self._layers, strict=True)):
            got = [None if part is None else (part.shape[0], part.shape[-1]) for part in (keys, values)]
            if got != [(heads, k_dim), (heads, v_dim) if v_dim else None]:
                raise LayoutError(f"layer {index} holds (heads, dim) {got}, the layout says {heads}, {k_dim}, {v_dim}")
        return tokens.pop()

    def _span(self, index: int) -> tuple[int, int]:
        """Where block ``index`` begins in the arrays, and how many of its tokens they hold."""
        first = index * self._layout.block_tokens - self._start
        return first, min(self._layout.block_tokens, self.num_tokens - first)


class ArraySource(_Arrays):
    """A :class:`kvkeep.cache.KVSource`: blocks out of arrays."""

    def read(self, index: int, out: memoryview) -> None:
        """Fill ``out`` with block ``index``. Raises :class:`LayoutError` where the arrays do not hold all of it."""
        first, count = self._span(index)
        size = self._layout.block_tokens
        if first < 0 or count < size:
            raise LayoutError(f"block {index} is not whole in arrays of tokens {self._start} … +{self.num_tokens}")
        if self._stacked is not None:
            self._layout.arrays(out)[0][...] = self._stacked[:, :, :, first : first + size]
            return
        for (to_keys, to_values), (keys, values) in zip(self._layout.layers(out), self._layers, strict=True):
            to_keys[...] = keys[:, first : first + size]
            if values is not None:
                to_values[...] = values[:, first : first + size]


class ArraySink(_Arrays):
    """A :class:`kvkeep.cache.KVSink`: blocks into arrays. A block that hangs over their end is cut there."""

    def __init__(self, layout: KVLayout, arrays: Layers | Any, *, start: int = 0) -> None:
        super().__init__(layout, arrays, start=start)
        views = [self._stacked, *(part for pair in self._layers for part in pair)]
        if not all(view is None or view.flags.writeable for view in views):
            raise LayoutError("an array that is read-only cannot be loaded into")

    def write(self, index: int, payload: memoryview) -> None:
        first, count = self._span(index)
        if first < 0 or count < 1:
            raise LayoutError(f"block {index} lies outside arrays of tokens {self._start} … +{self.num_tokens}")
        if self._stacked is not None:
            self._stacked[:, :, :, first : first + count] = self._layout.arrays(payload)[0][:, :, :, :count]
            return
        for (from_keys, from_values), (keys, values) in zip(self._layout.layers(payload), self._layers, strict=True):
            keys[:, first : first + count] = from_keys[:, :count]
            if values is not None:
                values[:, first : first + count] = from_values[:, :count]


def bits_of(array: Any, layout: KVLayout) -> Array:
    """``array`` as a NumPy view in the type that the layout's bits travel in, without a copy.

    The view does not keep ``array`` alive. Raises :class:`LayoutError` on what cannot be viewed: another
    dtype, another device.
    """
    name = str(array.dtype).removeprefix("torch.") if hasattr(array, "dtype") else None
    if name is not None and name not in (layout.dtype, layout.np_dtype.name):  # or the bits themselves
        raise LayoutError(f"an array of {name}, the layout says {layout.dtype}")
    if isinstance(array, np.ndarray):
        return array.view(layout.np_dtype)
    if hasattr(array, "__dlpack__"):
        return _from_dlpack(array, layout.np_dtype)
    try:
        view = np.asarray(memoryview(array))
    except TypeError:
        raise LayoutError(f"a {type(array).__name__} has neither the buffer protocol nor DLPack") from None
    if view.dtype.itemsize != layout.np_dtype.itemsize:
        raise LayoutError(f"values of {view.dtype.itemsize} bytes, {layout.dtype} has {layout.np_dtype.itemsize}")
    return view.view(layout.np_dtype)


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h (its layout is the same in versions 0 and 1)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(array: Any, dtype: np.dtype[Any]) -> Array:
    """NumPy's own ``from_dlpack`` refuses bfloat16 and float8, whose bits are all that is wanted here.

    The capsule is read and left unconsumed, so its producer frees it; the caller keeps ``array`` alive.
    """
    try:
        capsule = array.__dlpack__()
    except (BufferError, RuntimeError, TypeError) as error:  # each library refuses with another of these
        raise LayoutError(f"a {type(array).__name__} cannot be viewed through DLPack: {error}") from error
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    if tensor.device_type not in _CPU_DEVICES:
        raise LayoutError(f"an array on DLPack device {tensor.device_type}: copy it to the CPU first")
    if tensor.bits * tensor.lanes != 8 * dtype.itemsize:
        raise LayoutError(f"values of {tensor.bits * tensor.lanes} bits, {dtype} has {8 * dtype.itemsize}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if not all(shape):
        return np.empty(shape, dtype)
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    else:
        strides = tuple(int(np.prod(shape[axis + 1 :])) * dtype.itemsize for axis in range(tensor.ndim))
    if min(strides, default=0) < 0:
        raise LayoutError("an array with negative strides")
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    memory = (ctypes.c_char * span).from_address(tensor.data + tensor.byte_offset)
    return np.ndarray(shape, dtype, buffer=memory, strides=strides)
