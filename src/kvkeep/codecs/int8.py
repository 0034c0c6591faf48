"""Eight bits a value, about as exact as bfloat16 arithmetic itself, at the speed of a copy.

Keys have a scale a channel (their channels differ by orders of magnitude), values a scale a token and head. Form: see
:mod:`kvkeep.codecs.kernels`.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.codecs.kernels import kernels
from kvkeep.codecs.lossy import Fixed
from kvkeep.codecs.reference import int8_nbytes
from kvkeep.codecs.values import Array, Shape


class Int8(Fixed):
    name: ClassVar[str] = "int8"
    exact_tokens: ClassVar[int] = 0  # its scales a channel take the sink in

    def nbytes(self, shape: Shape) -> int:
        return int8_nbytes(shape)

    def code_group(self, x: Array, skip: int, stored: Array, shape: Shape, dtype: str) -> bool:
        coded: bool = kernels().int8_encode(x, stored, shape, dtype)
        return coded

    def undo_group(self, stored: Array, x: Array, shape: Shape, dtype: str) -> None:
        kernels().int8_decode(stored, x, shape, dtype)
