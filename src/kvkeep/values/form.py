"""Values as bytes and back, without pickle: what comes back is what it was, and bytes can do no more than be refused.

::

    "kvv1"  u32 length of the head  head (JSON)  padding to 64  buffer  padding to 64  buffer …

The head is ``[[length of each buffer], node]``. A node is JSON's own null, bool, text, 64-bit integer or finite
number, or a list that begins with a tag. Buffers are used in the order in which nodes are read, each once, so nothing
can make a small value large. Reading raises :class:`FormError` on anything that :func:`pack` cannot have written.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import CodecError
from kvkeep.values.padding import solid

MAGIC = b"kvv1"
ALIGN = 64
LONG_TEXT = 256
"""Characters above which a text is a buffer, not part of the head."""

DEPTH = 100
"""Of lists in lists."""

SHORT_HEAD = 256
"""Bytes up to which a head that was read is remembered: those of arrays, of which there are few different ones."""

_HEAD = struct.Struct("<4sI")
_loads = json.JSONDecoder().decode
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_INT64 = 1 << 63

Node = Any
Array = npt.NDArray[Any]


class FormError(CodecError):
    """Bytes that are no value."""


# Whatever a hostile head can make json, struct, NumPy or pandas raise.
_REFUSALS = (ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError, ArithmeticError,
             MemoryError)  # fmt: skip


def pack(value: Any) -> list[Buffer]:
    """``value`` in parts. Arrays are not copied where they lie in one piece. Raises ``TypeError`` on an object."""
    writer = Writer()
    node = writer.node(value)
    head = _dumps([[buffer.nbytes for buffer in writer.buffers], node]).encode()
    parts: list[Buffer] = [_HEAD.pack(MAGIC, len(head)) + head]
    at = _HEAD.size + len(head)
    for buffer in writer.buffers:
        parts += [bytes(-at % ALIGN), buffer]
        at += -at % ALIGN + buffer.nbytes
    return parts


def unpack(data: Buffer, *, given: bool = False) -> Any:
    """The value, in memory of its own. Raises :class:`FormError`.

    ``given``: ``data`` is writable and nobody else's, so an array that is all of the value may stay where it lies.
    """
    view = as_bytes(data)
    try:
        magic, length = _HEAD.unpack_from(view)
        if magic != MAGIC:
            raise FormError("no value of kvkeep")
        at = _HEAD.size + length
        head = bytes(view[_HEAD.size : at])
        lengths, node = _short_head(head) if length <= SHORT_HEAD else _head(head)
        buffers = []
        for nbytes in lengths:
            at += -at % ALIGN
            if type(nbytes) is not int or not 0 <= nbytes <= len(view) - at:
                raise FormError(f"a buffer of {nbytes} bytes where {len(view) - at} are left")
            buffers.append(view[at : at + nbytes])
            at += nbytes
        if at != len(view):
            raise FormError(f"{len(view)} bytes where the head announces {at}")
        reader = Reader(buffers, given=given and type(node) is list and node[:1] == ["a"])
        value = reader.value(node)
    except (*_REFUSALS, struct.error) as error:
        raise FormError(f"bytes that are no value: {error}") from error
    if reader.left:
        raise FormError("a buffer that belongs to nothing")
    return value


def _head(head: bytes) -> tuple[list[int], Node]:
    lengths, node = _loads(head.decode())
    return lengths, node


_short_head = lru_cache(maxsize=256)(_head)  # nobody changes a node


class Writer:
    """Turns values into nodes and collects their buffers."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []
        self._depth = 0

    def node(self, value: Any) -> Node:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            if len(value) <= LONG_TEXT:
                return value
            return self._buffer("u", value.encode("utf-8", "surrogatepass"))
        if kind is int:
            return value if -_INT64 <= value < _INT64 else ["i", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["f", struct.pack("<d", value).hex()]
        if kind is np.ndarray:
            return self._array(value)
        write = _WRITERS.get(kind)
        if write is not None:
            self._depth += 1
            if self._depth > DEPTH:
                raise TypeError(f"a value nested more than {DEPTH} deep, or inside itself")
            node = write(self, value)
            self._depth -= 1
            return node
        if isinstance(value, np.generic):
            return self._scalar(value)
        if "pandas" in sys.modules:
            from kvkeep.values import frames

            return frames.node(self, value)
        raise refusal(value)

    def _buffer(self, tag: str, data: Buffer) -> Node:
        self.buffers.append(as_bytes(data))
        return [tag]

    def _bytearray(self, value: bytearray) -> Node:
        return self._buffer("Y", bytes(value))

    def _bytes(self, value: bytes) -> Node:
        return self._buffer("y", value) if len(value) > LONG_TEXT // 2 else ["x", value.hex()]

    def _complex(self, value: complex) -> Node:
        return ["c", struct.pack("<dd", value.real, value.imag).hex()]

    def _list(self, value: list[Any]) -> Node:
        return ["l", *map(self.node, value)]

    def _tuple(self, value: tuple[Any, ...]) -> Node:
        return ["t", *map(self.node, value)]

    def _dict(self, value: dict[Any, Any]) -> Node:
        return ["d", *(self.node(part) for item in value.items() for part in item)]

    def _set(self, value: set[Any] | frozenset[Any]) -> Node:
        """In an order of its own, so that equal sets are equal bytes in every process."""
        parts = sorted(value, key=lambda part: b"".join(pack(part)))
        return ["S" if type(value) is set else "F", *map(self.node, parts)]

    def _array(self, array: Array) -> Node:
        if array.dtype.kind == "T":
            return ["T", list(array.shape), dtype_node(array.dtype), *map(self.node, array.reshape(-1).tolist())]
        dtype = dtype_node(array.dtype)
        # Axes from the slowest to the fastest: C order, Fortran order and every permutation come back as they lie.
        order = list(range(array.ndim))
        if not array.flags.c_contiguous:
            order.sort(key=lambda axis: -abs(array.strides[axis]))
        flat = solid(np.ascontiguousarray(array.transpose(order)).reshape(-1))
        data = flat.view(np.uint8).data if flat.nbytes else b""
        node = self._buffer("a", data)
        node += [dtype, list(array.shape)]
        return node if order == list(range(array.ndim)) else [*node, order]

    def _scalar(self, scalar: np.generic) -> Node:
        if isinstance(scalar, np.str_):
            return ["ns", str(scalar)]
        if isinstance(scalar, np.bytes_):
            return ["nb", scalar.hex()]
        return ["n", dtype_node(scalar.dtype), solid(np.array([scalar], scalar.dtype)).tobytes().hex()]


_WRITERS: dict[type, Callable[[Writer, Any], Node]] = {
    bytes: Writer._bytes,
    bytearray: Writer._bytearray,
    complex: Writer._complex,
    list: Writer._list,
    tuple: Writer._tuple,
    dict: Writer._dict,
    set: Writer._set,
    frozenset: Writer._set,
}


class Reader:
    """Turns nodes back into values. Raises whatever comes: :func:`unpack` makes one error of it."""

    def __init__(self, buffers: list[memoryview], *, given: bool = False) -> None:
        self._buffers = iter(buffers)
        self._given = given

    @property
    def left(self) -> bool:
        """Is there a buffer that nobody has used?"""
        return next(self._buffers, None) is not None

    def value(self, node: Node) -> Any:
        if type(node) is not list:
            if type(node) is dict:
                raise FormError("an object in the head")
            return node
        tag, *rest = node
        read = _READERS.get(tag)
        if read is not None:
            return read(self, *rest)
        if type(tag) is str and tag.startswith("pd."):
            try:
                from kvkeep.values import frames
            except ImportError as error:
                raise FormError("a value of pandas, which is not installed") from error
            return frames.value(self, tag, rest)
        raise FormError(f"unknown tag {tag!r}")

    def buffer(self) -> memoryview:
        buffer = next(self._buffers, None)
        if buffer is None:
            raise FormError("a buffer is missing")
        return buffer

    def _text(self) -> str:
        return bytes(self.buffer()).decode("utf-8", "surrogatepass")

    def _set(self, *nodes: Node) -> set[Any]:
        return {self.value(node) for node in nodes}

    def _dict(self, *nodes: Node) -> dict[Any, Any]:
        parts = [self.value(node) for node in nodes]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def _array(self, dtype_node: Node, shape: list[int], order: list[int] | None = None) -> Array:
        dtype = dtype_of(dtype_node)
        data = self.buffer()
        _check_shape(shape)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise FormError(f"{len(data)} bytes for an array {shape} of {dtype}")
        lies = shape if order is None else [shape[axis] for axis in order]
        array = np.ndarray(lies, dtype, data) if len(data) else np.empty(lies, dtype)
        if len(data) and not (self._given and array.flags.aligned):
            array = array.copy()
        if order is None:
            return array
        if sorted(order) != list(range(len(shape))):
            raise FormError("axes that are no permutation")
        return array.transpose(np.argsort(order))

    def _texts(self, shape: list[int], dtype_node: Node, *nodes: Node) -> Array:
        dtype = dtype_of(dtype_node)
        _check_shape(shape)
        if dtype.kind != "T" or math.prod(shape) != len(nodes):
            raise FormError("texts that are no array")
        return np.array([self.value(node) for node in nodes], dtype).reshape(shape)

    def _scalar(self, dtype_node: Node, data: str) -> Any:
        (scalar,) = np.frombuffer(bytearray.fromhex(data), dtype_of(dtype_node))
        return scalar

    def _complex(self, data: str) -> complex:
        return complex(*struct.unpack("<dd", bytes.fromhex(data)))


_READERS: dict[str, Callable[..., Any]] = {
    "u": Reader._text,
    "i": lambda _, digits: int(digits, 16),
    "f": lambda _, data: struct.unpack("<d", bytes.fromhex(data))[0],
    "x": lambda _, data: bytes.fromhex(data),
    "y": lambda reader: bytes(reader.buffer()),
    "Y": lambda reader: bytearray(reader.buffer()),
    "c": Reader._complex,
    "l": lambda reader, *nodes: [reader.value(node) for node in nodes],
    "t": lambda reader, *nodes: tuple(reader.value(node) for node in nodes),
    "d": Reader._dict,
    "S": Reader._set,
    "F": lambda reader, *nodes: frozenset(reader._set(*nodes)),
    "a": Reader._array,
    "T": Reader._texts,
    "n": Reader._scalar,
    "ns": lambda _, text: np.str_(text),
    "nb": lambda _, data: np.bytes_(bytes.fromhex(data)),
}


def _check_shape(shape: Any) -> None:
    if type(shape) is not list or not all(type(length) is int and length >= 0 for length in shape):
        raise FormError(f"{shape!r} is no shape")


def dtype_node(dtype: np.dtype[Any]) -> Node:
    """A text for plain types, a list for structured ones. Raises ``TypeError`` where it would not come back."""
    node = _describe(dtype)
    try:
        same = dtype_of(node) == dtype
    except _REFUSALS:
        same = False
    if not same and dtype.kind == "T":
        raise TypeError(f"an array of {dtype!r} cannot be kept: use StringDType() itself, or a list of texts")
    if not same:
        raise TypeError(f"an array of {dtype} cannot be kept: use a view of its bits, or a type of NumPy's own")
    return node


def _describe(dtype: np.dtype[Any]) -> Node:
    if dtype.kind == "T":
        return "T"
    if dtype.hasobject:
        raise TypeError("an array of objects cannot be kept: use a list, or a type of NumPy's own such as str_")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return ["sub", _describe(base), list(shape)]
    if dtype.fields is not None and dtype.names is not None:
        fields = []
        for name in dtype.names:
            form, offset, *title = dtype.fields[name]
            fields.append([name, _describe(form), offset, *title])
        return ["rec", dtype.itemsize, dtype.isalignedstruct, *fields]
    return dtype.str


def dtype_of(node: Node) -> np.dtype[Any]:
    """The type that :func:`dtype_node` described; never one that holds objects."""
    if node == "T":
        return np.dtypes.StringDType()  # NumPy 2
    if type(node) is str:
        dtype = _plain_dtype(node)
    elif node[0] == "sub":
        _check_shape(node[2])
        dtype = np.dtype((dtype_of(node[1]), tuple(node[2])))
    elif node[0] == "rec":
        _, itemsize, aligned, *fields = node
        layout = {
            "names": [field[0] for field in fields],
            "formats": [dtype_of(field[1]) for field in fields],
            "offsets": [field[2] for field in fields],
            "titles": [field[3] if len(field) > 3 else None for field in fields],
            "itemsize": itemsize,
        }
        dtype = np.dtype(layout, align=bool(aligned))  # type: ignore[call-overload]
    else:
        raise FormError(f"type {node!r}")
    if dtype.hasobject:
        raise FormError(f"type {node!r} holds objects")
    return dtype


@lru_cache(maxsize=256)
def _plain_dtype(text: str) -> np.dtype[Any]:
    if "," in text or "O" in text:
        raise FormError(f"type {text!r}")
    return np.dtype(text)


def refusal(value: Any) -> TypeError:
    """What to say of a value that cannot be kept."""
    kind = type(value)
    hint = " Keep numpy.asarray() of it, or its parts." if isinstance(value, np.ndarray) else ""
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return TypeError(
        f"{name} cannot be kept as a value. What can: None, bool, int, float, complex, str, bytes, NumPy arrays and "
        f"scalars, pandas frames, series and indexes, and lists, tuples, sets and dicts of these.{hint}"
    )
