"""Byte planes and zstd: every bit comes back, in about two thirds of the bytes.

Of a KV value only the exponent is predictable, and in a 16-bit float it straddles two bytes. So the value is split
into planes of one byte each: the exponent (for float16: with the mantissa's top), and the rest of the mantissa with
the sign on top. A float32 has the planes of its upper half, then the two bytes of its lower half. Types of one byte are
one plane. The planes are the streams of :mod:`kvkeep.codecs.entropy`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.codecs import entropy
from kvkeep.codecs.base import Codec
from kvkeep.codecs.kernels import kernels, prepare
from kvkeep.errors import CodecError
from kvkeep.layout import KVLayout


class Lossless(Codec):
    """Bit-exact for every pattern of every dtype, NaN payloads included."""

    name: ClassVar[str] = "lossless"
    lossless: ClassVar[bool] = True

    def __init__(self) -> None:
        prepare()

    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        view = as_bytes(data)
        if len(view) != layout.block_nbytes:
            raise CodecError(f"{len(view)} bytes are no block of {layout.block_nbytes}")
        size = layout.np_dtype.itemsize
        if size == 1:
            return entropy.pack([np.frombuffer(view, np.uint8)])
        planes = [np.empty(len(view) // size, np.uint8) for _ in range(size)]
        kernels().split(np.frombuffer(view, f"<u{size}"), planes)
        return entropy.pack(planes)

    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        if len(out) != layout.block_nbytes:
            raise CodecError(f"room for {len(out)} bytes, not for a block of {layout.block_nbytes}")
        size = layout.np_dtype.itemsize
        planes = entropy.unpack(as_bytes(data), [len(out) // size] * size)
        if size == 1:
            out[:] = planes[0].data
        else:
            kernels().join(planes, np.frombuffer(out, f"<u{size}"))
