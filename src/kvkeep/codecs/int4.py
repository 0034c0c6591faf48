"""Four bits a value, without entropy coding: a quarter of the bytes, decoded several times as fast as ``uqz``.

Keys have a step and a lowest value a channel and 64 tokens, values the same a token and 64 channels (after KIVI, Liu et
al. 2024); a sequence's first tokens are exact. Form: see :mod:`kvkeep.codecs.kernels`.
"""

from __future__ import annotations

from typing import ClassVar

from kvkeep.codecs.kernels import kernels
from kvkeep.codecs.lossy import Fixed
from kvkeep.codecs.reference import int4_nbytes
from kvkeep.codecs.values import Array, Shape


class Int4(Fixed):
    name: ClassVar[str] = "int4"

    def nbytes(self, shape: Shape) -> int:
        return int4_nbytes(shape)

    def code_group(self, x: Array, skip: int, stored: Array, shape: Shape, dtype: str) -> bool:
        coded: bool = kernels().int4_encode(x, skip, stored, shape, dtype)
        return coded

    def undo_group(self, stored: Array, x: Array, shape: Shape, dtype: str) -> None:
        kernels().int4_decode(stored, x, shape, dtype)
