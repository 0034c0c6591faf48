"""No compression."""

from __future__ import annotations

from typing import ClassVar

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.codecs.base import Codec
from kvkeep.errors import CodecError
from kvkeep.layout import KVLayout


class Raw(Codec):
    """The block's bytes as they are."""

    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True

    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        return data

    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        view = as_bytes(data)
        if len(view) != len(out):
            raise CodecError(f"a raw payload of {len(view)} bytes for a block of {len(out)}")
        out[:] = view
