"""What the lossy codecs share: when a block is coded at all, and the first tokens.

Stored form: eight bytes (the mode, then zeros), then by mode

- 0: the block as it is. For types of one byte (the engine's own fp8), values that are not finite or beyond 2^48,
  blocks that would consist of exact tokens only, and those that coding makes no smaller.
- 1: the codec's own form.
- 2: the same, then the block's first tokens as they are: of each layer group the keys, then the values,
  ``[layers, heads, tokens, dim]``. For the first block of a sequence: attention leans on its first tokens (the *sink*),
  so an error in their keys moves the weight of all the others.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.codecs.base import Codec
from kvkeep.codecs.kernels import prepare
from kvkeep.codecs.values import FLOATS, Array, Shape, first_tokens, groups, shapes
from kvkeep.errors import CodecError
from kvkeep.layout import KVLayout

HEAD_NBYTES = 8
AS_IS, CODED, CODED_WITH_FIRST = range(3)


class Lossy(Codec):
    """A codec for float types."""

    lossless: ClassVar[bool] = False

    exact_tokens: ClassVar[int] = 4
    """How many of a sequence's first tokens are kept as they are."""

    def __init__(self) -> None:
        prepare()

    @abstractmethod
    def code(self, view: memoryview, layout: KVLayout, skip: int, head: bytes, tail: bytes) -> Buffer | None:
        """The block without its first ``skip`` tokens, between ``head`` and ``tail``; None where it holds what cannot
        be coded."""

    @abstractmethod
    def undo(self, coded: memoryview, layout: KVLayout, out: memoryview) -> None:
        """Fill ``out``; the skipped tokens are overwritten afterwards."""

    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        return self._encode(data, layout, 0)

    def encode_first(self, data: Buffer, layout: KVLayout) -> Buffer:
        return self._encode(data, layout, self.exact_tokens)

    def _encode(self, data: Buffer, layout: KVLayout, skip: int) -> Buffer:
        view = as_bytes(data)
        if len(view) != layout.block_nbytes:
            raise CodecError(f"{len(view)} bytes are no block of {layout.block_nbytes}")
        coded = None
        if layout.dtype in FLOATS and skip < layout.block_tokens:
            first = b"".join(part.tobytes() for part in first_tokens(view, layout, skip)) if skip else b""
            coded = self.code(view, layout, skip, _head(CODED_WITH_FIRST if skip else CODED), first)
        if coded is None or memoryview(coded).nbytes >= HEAD_NBYTES + len(view):
            return b"".join([_head(AS_IS), view])
        return coded

    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        view = as_bytes(data)
        if len(out) != layout.block_nbytes:
            raise CodecError(f"room for {len(out)} bytes, not for a block of {layout.block_nbytes}")
        mode = view[0] if len(view) >= HEAD_NBYTES and not any(view[1:HEAD_NBYTES]) else -1
        body = view[HEAD_NBYTES:]
        if mode == AS_IS and len(body) == len(out):
            out[:] = body
        elif mode == CODED and layout.dtype in FLOATS:
            self.undo(body, layout, out)
        elif mode == CODED_WITH_FIRST and layout.dtype in FLOATS and self.exact_tokens < layout.block_tokens:
            nbytes = layout.token_nbytes * self.exact_tokens
            if len(body) < nbytes:
                raise CodecError(f"a payload of {len(view)} bytes lacks its first tokens")
            self.undo(body[:-nbytes], layout, out)
            at = len(body) - nbytes
            for part in first_tokens(out, layout, self.exact_tokens):
                part.view("u1")[...] = np.frombuffer(body[at : at + part.nbytes], "u1").reshape(part.view("u1").shape)
                at += part.nbytes
        else:
            raise CodecError(f"a payload of {len(view)} bytes, mode {mode}, is none of {self.name}")


class Fixed(Lossy):
    """A codec whose size the layout gives: no entropy coding."""

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """Stored bytes of a layer group."""

    @abstractmethod
    def code_group(self, x: Array, skip: int, stored: Array, shape: Shape, dtype: str) -> bool:
        """Values into stored bytes; False where they cannot be coded."""

    @abstractmethod
    def undo_group(self, stored: Array, x: Array, shape: Shape, dtype: str) -> None:
        """And back."""

    def code(self, view: memoryview, layout: KVLayout, skip: int, head: bytes, tail: bytes) -> Buffer | None:
        stored = np.empty(len(head) + sum(map(self.nbytes, shapes(layout))) + len(tail), np.uint8)
        at = len(head)
        stored[:at] = np.frombuffer(head, np.uint8)
        for shape, x in groups(view, layout):
            end = at + self.nbytes(shape)
            stored[end - 1] = 0  # nobody else may write it
            if not self.code_group(x, skip, stored[at:end], shape, layout.dtype):
                return None
            at = end
        stored[at:] = np.frombuffer(tail, np.uint8)
        return stored.data

    def undo(self, coded: memoryview, layout: KVLayout, out: memoryview) -> None:
        nbytes = sum(map(self.nbytes, shapes(layout)))
        if len(coded) != nbytes:
            raise CodecError(f"a payload of {len(coded)} bytes where {self.name} has {nbytes}")
        stored = np.frombuffer(coded, np.uint8)
        at = 0
        for shape, x in groups(out, layout):
            end = at + self.nbytes(shape)
            self.undo_group(stored[at:end], x, shape, layout.dtype)
            at = end


def _head(mode: int) -> bytes:
    return bytes([mode]) + bytes(HEAD_NBYTES - 1)
