"""The contract of a codec: a payload in, fewer bytes out, and back.

A codec's name is written into every frame and never changes its meaning: committed golden frames must decode for
ever, so a better format is a new name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kvkeep.buffers import Buffer
from kvkeep.layout import KVLayout


class Codec(ABC):
    """Stateless, or safe to call from any thread."""

    name: ClassVar[str]
    """ASCII, at most 16 characters."""

    lossless: ClassVar[bool]

    @abstractmethod
    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        """A block of ``layout`` (``layout.block_nbytes`` bytes) in stored form. May return ``data`` itself."""

    def encode_first(self, data: Buffer, layout: KVLayout) -> Buffer:
        """:meth:`encode` for the first block of a sequence, on whose first tokens a model's attention leans: a lossy
        codec may keep those exactly. :meth:`decode` takes either."""
        return self.encode(data, layout)

    @abstractmethod
    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        """Fill ``out`` (``layout.block_nbytes`` bytes). Raises :class:`~kvkeep.errors.CodecError` on a payload that
        :meth:`encode` cannot have written; allocates no more than a block's bytes, whatever the payload claims."""
