"""From payloads to the frames that a tier holds, and back: codec, seal, encryption."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

from kvkeep import frame
from kvkeep.buffers import Buffer, BufferPool
from kvkeep.codecs.base import Codec
from kvkeep.crypt import Cipher
from kvkeep.errors import CodecError, FrameError
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access
from kvkeep.tier import Tier

CodecLookup = Callable[[str], Codec]


class Write:
    """One block on its way to tier ``target`` from tier ``source``, where it is pinned."""

    __slots__ = ("access", "key", "layout", "most", "nbytes", "source", "target", "tenant")

    def __init__(
        self, key: BlockKey, layout: KVLayout, nbytes: int, source: Tier, target: Tier, access: Access
    ) -> None:
        self.key, self.layout, self.nbytes = key, layout, nbytes
        self.source, self.target, self.access = source, target, access
        self.tenant = layout.identity.tenant
        self.most: float = math.inf  # bytes above which it is stored as it is, not encoded


class Framing:
    """Of all tiers. With a ``cipher``, those that are not trusted hold encrypted frames, and no others are believed
    there."""

    def __init__(self, codec: CodecLookup, cipher: Cipher | None) -> None:
        self.cipher = cipher
        self.pool = BufferPool()
        self._codec = codec

    def parse(self, key: BlockKey, value: memoryview, tier: Tier, layout: KVLayout) -> tuple[frame.Header, memoryview]:
        """Header and payload of a frame that is ``key``'s; sealed, or else still to be decrypted."""
        encrypted = self.cipher is not None and not tier.trusted
        header, payload = frame.parse(value) if encrypted or tier.trusted else frame.verify(value)
        frame.check(header, key, layout.fingerprint, layout.block_nbytes)
        if encrypted and not header.encrypted:
            raise FrameError("plain", f"block {key.hex()[:16]} is not encrypted")
        return header, payload

    def open(
        self, header: frame.Header, value: memoryview, payload: memoryview, layout: KVLayout, room: memoryview
    ) -> memoryview:
        """The decoded block of what :meth:`parse` gave for the frame ``value``: in ``room``, or where it lies already.
        Raises :class:`FrameError`."""
        raw = header.codec == "raw"
        if header.encrypted and self.cipher is not None:
            if raw:
                self.cipher.decrypt(value, layout.identity.namespace, room)
                return room
            with self.pool.borrow(len(payload) - frame.TAG_NBYTES) as plain:
                self.cipher.decrypt(value, layout.identity.namespace, plain)
                self._decode(header.codec, plain, layout, room)
            return room
        if raw:
            if len(payload) != layout.block_nbytes:
                raise FrameError("size", "a raw payload that is not a block's size")
            return payload
        self._decode(header.codec, payload, layout, room)
        return room

    def make(self, key: BlockKey, payload: Buffer, layout: KVLayout, codec: Codec, access: Access) -> list[Buffer]:
        """An unsealed frame in ``codec``."""
        stored = _encoded(codec, payload, layout, access)
        size, tenant = memoryview(stored).nbytes, layout.identity.tenant
        head = frame.pack(key, layout.fingerprint, codec.name, size, layout.block_nbytes, tenant=tenant)
        return [bytes(head), stored]

    def again(self, write: Write, value: memoryview, rooms: ExitStack) -> list[Buffer]:
        """The frame ``value`` as the target holds it. What was decoded from a lossy codec is never encoded again. What
        is returned may lie in buffers that ``rooms`` holds. Raises :class:`FrameError` for the frame that is there,
        :class:`CodecError` where the target's codec cannot encode it."""
        layout, target = write.layout, write.target
        header, payload = self.parse(write.key, value, write.source, layout)
        if header.encrypted and self.cipher is not None:
            plain = rooms.enter_context(self.pool.borrow(len(payload) - frame.TAG_NBYTES))
            self.cipher.decrypt(value, layout.identity.namespace, plain)
            payload = plain
        stored: Buffer = payload
        codec = header.codec
        if codec != target.codec.name and (codec == "raw" or self._codec_of(codec).lossless):
            if codec != "raw":
                room = rooms.enter_context(self.pool.borrow(layout.block_nbytes))
                self._decode(codec, payload, layout, room)
                stored = room
            encoded = _encoded(target.codec, stored, layout, write.access)
            small = memoryview(encoded).nbytes <= write.most
            stored, codec = (encoded, target.codec.name) if small else (stored, "raw")
        size = memoryview(stored).nbytes
        if self.cipher is not None and not target.trusted:
            sealed = rooms.enter_context(self.pool.borrow(size + frame.TAG_NBYTES))
            return [self.cipher.encrypt(write.key, layout, codec, stored, sealed), sealed]
        head = frame.pack(write.key, layout.fingerprint, codec, size, layout.block_nbytes, tenant=header.tenant)
        if not target.trusted:
            frame.seal(head, stored)
        return [bytes(head), stored]

    def _decode(self, codec: str, payload: memoryview, layout: KVLayout, room: memoryview) -> None:
        decoder = self._codec_of(codec)
        try:
            decoder.decode(payload, layout, room)
        except CodecError as error:
            raise FrameError("codec", str(error)) from error

    def _codec_of(self, name: str) -> Codec:
        try:
            return self._codec(name)
        except (CodecError, KeyError) as error:
            raise FrameError("unknown", str(error)) from error


def _encoded(codec: Codec, payload: Buffer, layout: KVLayout, access: Access) -> Buffer:
    return (codec.encode if access.position else codec.encode_first)(payload, layout)
