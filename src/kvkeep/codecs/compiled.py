"""``kernels.c`` through ctypes, compiled for this machine's processor once and kept.

The library lies beside this file in ``__pycache__``, or where that may not be written in ``~/.cache/kvkeep-kernels``,
under a name that stands for the source, the flags and the processor. It is loaded only if it belongs to this user (or
root) and nobody else may write it, and used only if it gives the bytes of :mod:`kvkeep.codecs.reference`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kvkeep.codecs import reference
from kvkeep.codecs.values import Shape

Array = npt.NDArray[Any]

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_SECONDS = 600

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in Shape._fields)


def compiler() -> list[str] | None:
    """The C compiler's command: ``cc``, ``gcc`` or ``clang``, or the one of the package ``ziglang``."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"] if find_spec("ziglang") else None


def library() -> Path | None:
    """The compiled library, where it is there already."""
    return next((path for path in _places() if _is_ours(path)), None)


def build() -> Path | None:
    """Compile; takes a second or two. None where there is no compiler, it fails, or nothing can be written."""
    command = compiler()
    if command is None:
        return None
    for path in _places():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".kernels-", dir=path.parent) as folder:
                made = Path(folder) / path.name
                whole = [*command, *FLAGS, str(SOURCE), "-o", str(made)]
                subprocess.run(
                    whole, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_SECONDS
                )
                made.chmod(0o755)
                made.replace(path)
        except OSError:
            continue  # may not be written: the next place
        except subprocess.SubprocessError:
            return None
        return path if _is_ours(path) else None
    return None


def _places() -> list[Path]:
    try:
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        cpu = ""
    if not cpu and os.uname().machine not in ("aarch64", "arm64"):
        return []
    text = " ".join([*FLAGS, *os.uname()[::4], cpu]).encode()
    name = f"kernels-{xxhash.xxh3_64_hexdigest(SOURCE.read_bytes() + text)}.so"
    return [SOURCE.parent / "__pycache__" / name, Path("~/.cache/kvkeep-kernels").expanduser() / name]


def _is_ours(path: Path) -> bool:
    """A library runs with our rights, so nobody else may have written it."""
    try:
        return all(
            there.stat().st_uid in (0, os.geteuid()) and not there.stat().st_mode & 0o022
            for there in (path, path.parent)
        )
    except OSError:
        return False


class Compiled:
    """The functions of :mod:`kvkeep.codecs.reference`, compiled. Raises OSError where ``path`` cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        tail = (ctypes.POINTER(_Shape), ctypes.c_int)
        for name, arguments in {
            "int8_encode": (pointer, pointer, *tail),
            "int8_decode": (pointer, pointer, *tail),
            "int4_encode": (pointer, integer, pointer, *tail),
            "int4_decode": (pointer, pointer, *tail),
            "uqz_encode": (pointer, integer, real, real, real, *[pointer] * 6, *tail),
            "uqz_decode": (real, *[pointer] * 7, *tail),
            "split2": (pointer, pointer, pointer, integer),
            "join2": (pointer, pointer, pointer, integer),
            "split4": (*[pointer] * 5, integer),
            "join4": (*[pointer] * 5, integer),
        }.items():
            function = getattr(self._library, f"kvkeep_{name}")
            function.argtypes = arguments
            function.restype = ctypes.c_int
            setattr(self, f"_{name}", function)

    _int8_encode: Any
    _int8_decode: Any
    _int4_encode: Any
    _int4_decode: Any
    _uqz_encode: Any
    _uqz_decode: Any
    _split2: Any
    _join2: Any
    _split4: Any
    _join4: Any

    def int8_encode(self, x: Array, stored: Array, s: Shape, dtype: str) -> bool:
        return bool(self._int8_encode(_at(x), _at(stored), _shape(s), _KINDS[dtype]))

    def int8_decode(self, stored: Array, x: Array, s: Shape, dtype: str) -> None:
        _done(self._int8_decode(_at(stored), _at(x), _shape(s), _KINDS[dtype]))

    def int4_encode(self, x: Array, skip: int, stored: Array, s: Shape, dtype: str) -> bool:
        return bool(self._int4_encode(_at(x), skip, _at(stored), _shape(s), _KINDS[dtype]))

    def int4_decode(self, stored: Array, x: Array, s: Shape, dtype: str) -> None:
        _done(self._int4_decode(_at(stored), _at(x), _shape(s), _KINDS[dtype]))

    def uqz_encode(
        self, x: Array, skip: int, steps: tuple[float, float, float], out: tuple[Array, ...], s: Shape, dtype: str
    ) -> bool:
        return bool(self._uqz_encode(_at(x), skip, *steps, *map(_at, out), _shape(s), _KINDS[dtype]))

    def uqz_decode(self, grid: float, stored: tuple[Array, ...], x: Array, s: Shape, dtype: str) -> None:
        _done(self._uqz_decode(grid, *map(_at, stored), _at(x), _shape(s), _KINDS[dtype]))

    def split(self, words: Array, planes: list[Array]) -> None:
        function = self._split2 if len(planes) == 2 else self._split4
        function(_at(words), *map(_at, planes), planes[0].size)

    def join(self, planes: list[Array], words: Array) -> None:
        function = self._join2 if len(planes) == 2 else self._join4
        function(*map(_at, planes), _at(words), planes[0].size)


@lru_cache(64)
def _shape(shape: Shape) -> _Shape:
    return _Shape(*shape)


class _ArrayInterface(ctypes.Structure):
    """NumPy's array interface, its C side."""

    _fields_ = (
        ("two", ctypes.c_int), ("nd", ctypes.c_int), ("typekind", ctypes.c_char), ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("data", ctypes.c_void_p),
        ("descr", ctypes.c_void_p),
    )  # fmt: skip


_interface = ctypes.PYFUNCTYPE(ctypes.POINTER(_ArrayInterface), ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _at(array: Array) -> int:
    """Where the values lie. ``array.ctypes`` and ``__array_interface__`` take 3 µs, a tenth of decoding a small block
    where there are several arrays; this takes less than 1."""
    capsule: Any = array.__array_struct__  # owns what the pointer leads to
    address: int = _interface(capsule, None)[0].data
    return address


def _done(status: int) -> None:
    if not status:
        raise MemoryError("no memory for a row of floats")


def agrees(compiled: Compiled) -> bool:
    """Does it give the reference's bytes? A small block of each type, in and out; about two milliseconds."""
    shape = Shape(2, 2, 7, 17, 9)
    numbers = np.arange(shape.num_values)
    values = (np.sin(numbers * 1.7) * np.exp2(numbers % 5 - 1)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    for dtype, x in (("bfloat16", bits), ("float16", values.astype(np.float16)), ("float32", values)):
        if _bytes_of(compiled, x, shape, dtype) != _bytes_of(reference, x, shape, dtype):
            return False
    return True


def _bytes_of(kernels: Any, x: Array, shape: Shape, dtype: str) -> list[bytes]:
    """All that the kernels make of ``x``, and all that they make of that."""
    eight, four = (np.zeros(size(shape), np.uint8) for size in (reference.int8_nbytes, reference.int4_nbytes))
    counts = (4, 2, 4 * 17, 4 * 7, 4 * 7 * 17, 4 * 7 * 9)
    types = ("<u2", "<u2", "<i2", "u1", "i1", "i1")
    streams = tuple(np.zeros(count, kind) for count, kind in zip(counts, types, strict=True))
    kernels.int8_encode(x, eight, shape, dtype)
    kernels.int4_encode(x, 2, four, shape, dtype)
    kernels.uqz_encode(x, 2, (0.2, 0.5, 4.0), streams, shape, dtype)
    back = [np.zeros_like(x) for _ in range(3)]
    kernels.int8_decode(eight, back[0], shape, dtype)
    kernels.int4_decode(four, back[1], shape, dtype)
    kernels.uqz_decode(4.0, streams, back[2], shape, dtype)
    words = x.view(f"<u{x.itemsize}")
    planes = [np.zeros(x.size, np.uint8) for _ in range(x.itemsize)]
    kernels.split(words, planes)
    joined = np.zeros_like(words)
    kernels.join(planes, joined)
    return [array.tobytes() for array in (eight, four, *streams, *back, *planes, joined)]
