"""The stored form of a value: a fixed header, then the payload.

::

    offset  bytes  field
         0      8  magic
         8      2  format version
        10      2  flags              0
        12      4  header's bytes     192
        16      8  payload's bytes
        24      8  decoded bytes      of the payload once its codec has been undone
        32     32  key
        64     32  layout fingerprint
        96     16  codec              ASCII, zero-padded; a name never changes its meaning
       112      8  encryption key id  0: not encrypted
       120     12  nonce
       132     44  reserved           0
       176     16  seal               xxh3-128 of all bytes above and the payload

All little-endian. A frame is verified whenever its bytes enter the process: whatever differs is a
:class:`~kvkeep.errors.FrameError` with a cause, and no length in it is believed before it has been compared with the
bytes at hand. Inside one process a frame may stay *unsealed* (seal 0) until it leaves memory.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import FrameError
from kvkeep.keys import BlockKey

MAGIC = b"kvkeep\r\n"
VERSION = 1
HEADER_NBYTES = 192
MAX_PAYLOAD_NBYTES = 1 << 30

_STRUCT = struct.Struct("<8sHHIQQ32s32s16s8s12s44s16s")
_SEAL_AT = HEADER_NBYTES - 16
_UNSEALED = bytes(16)
assert _STRUCT.size == HEADER_NBYTES

CAUSES: dict[str, str] = {
    "short": "fewer bytes than a header, or than the header announces",
    "long": "more bytes than the header announces",
    "magic": "not a kvkeep frame",
    "version": "a format version that this kvkeep does not read",
    "key": "another block's frame",
    "layout": "another model's, or another layout's, frame",
    "size": "a length above the cap, or not that of the layout",
    "checksum": "the seal does not match",
    "codec": "an unknown codec, or a payload that the codec cannot have written",
}
"""Why stored bytes were refused."""


class Header(NamedTuple):
    """A frame's parsed header. ``codec`` is its name; the seal has not been looked at."""

    payload_nbytes: int
    decoded_nbytes: int
    key: BlockKey
    layout: bytes
    codec: str

    @property
    def frame_nbytes(self) -> int:
        return HEADER_NBYTES + self.payload_nbytes


def pack(key: BlockKey, layout: bytes, codec: str, payload_nbytes: int, decoded_nbytes: int) -> bytearray:
    """An unsealed header."""
    return bytearray(
        _STRUCT.pack(
            MAGIC, VERSION, 0, HEADER_NBYTES, payload_nbytes, decoded_nbytes, key, layout,
            codec.encode("ascii"), b"", b"", b"", _UNSEALED,
        )
    )  # fmt: skip


def seal(header: bytearray | memoryview, payload: Buffer) -> None:
    """Write the seal of ``header`` and ``payload`` into ``header``."""
    header[_SEAL_AT:] = _digest(header, payload)


def parse(data: Buffer) -> tuple[Header, memoryview]:
    """Header and payload of a frame. Checks form and lengths, not the seal."""
    view = as_bytes(data)
    if len(view) < HEADER_NBYTES:
        raise FrameError("short", f"{len(view)} bytes are no frame: a header has {HEADER_NBYTES}")
    (
        magic,
        version,
        flags,
        header_nbytes,
        payload_nbytes,
        decoded_nbytes,
        key,
        layout,
        codec,
        key_id,
        nonce,
        reserved,
        _,
    ) = _STRUCT.unpack_from(view)
    if magic != MAGIC:
        raise FrameError("magic", "not a kvkeep frame")
    if version != VERSION or header_nbytes != HEADER_NBYTES or flags or any(key_id + nonce + reserved):
        raise FrameError("version", f"frame version {version}, header of {header_nbytes} bytes, flags {flags:#x}")
    if payload_nbytes > MAX_PAYLOAD_NBYTES or decoded_nbytes > MAX_PAYLOAD_NBYTES:
        raise FrameError("size", f"a payload of {payload_nbytes}, decoded {decoded_nbytes}, is above the cap")
    if HEADER_NBYTES + payload_nbytes != len(view):
        cause = "short" if HEADER_NBYTES + payload_nbytes > len(view) else "long"
        raise FrameError(cause, f"the header announces {payload_nbytes} bytes, {len(view) - HEADER_NBYTES} are there")
    try:
        name = codec.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        raise FrameError("codec", f"codec name {codec!r} is not ASCII") from None
    header = Header(payload_nbytes, decoded_nbytes, BlockKey(key), layout, name)
    return header, view[HEADER_NBYTES:]


def check(header: Header, key: BlockKey, layout: bytes, decoded_nbytes: int | None = None) -> None:
    """Raise :class:`FrameError` unless the frame claims to be ``key`` of ``layout``, of ``decoded_nbytes`` bytes."""
    if header.key != key:
        raise FrameError("key", f"frame of block {header.key.hex()[:16]} where {key.hex()[:16]} was expected")
    if header.layout != layout:
        raise FrameError("layout", "frame of another layout")
    if decoded_nbytes is not None and header.decoded_nbytes != decoded_nbytes:
        raise FrameError("size", f"a payload of {header.decoded_nbytes} bytes where the layout has {decoded_nbytes}")


def verify(data: Buffer) -> tuple[Header, memoryview]:
    """:func:`parse`, and the seal."""
    header, payload = parse(data)
    view = as_bytes(data)
    if bytes(view[_SEAL_AT:HEADER_NBYTES]) != _digest(view, payload):
        raise FrameError("checksum", f"the seal of block {header.key.hex()[:16]} does not match")
    return header, payload


def _digest(header: Buffer, payload: Buffer) -> bytes:
    state = xxhash.xxh3_128(as_bytes(header)[:_SEAL_AT])
    state.update(payload)
    return state.digest()
