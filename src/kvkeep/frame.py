"""The stored form of a value: a fixed header, then the payload.

::

    offset  bytes  field
         0      8  magic
         8      2  format version
        10      2  flags              bit 0: encrypted
        12      4  header's bytes     192
        16      8  payload's bytes
        24      8  decoded bytes      of the payload once its codec has been undone
        32     32  key
        64     32  layout fingerprint
        96     16  codec              ASCII, zero-padded; a name never changes its meaning
       112      8  encryption key id  0 unless encrypted, and so are nonce and salt
       120     12  nonce
       132     16  salt               of the key that is used up to the next salt
       148     16  tenant             a label that only the namespace's secret leads to; 0: no namespace
       164     12  reserved           0
       176     16  seal               xxh3-128 of all bytes above and the payload; 0 in an encrypted frame

All little-endian. A frame is verified whenever its bytes enter the process: whatever differs is a
:class:`~kvkeep.errors.FrameError` with a cause, and no length in it is believed before it has been compared with the
bytes at hand. Inside one process a frame may stay *unsealed* (seal 0) until it leaves memory.

An encrypted frame's payload is what AES-256-GCM made of it, the tag last, with the header's first 176 bytes as
associated data: see :mod:`kvkeep.crypt`. It needs no seal, and none is allowed, so that no bit of it may differ.
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

TAG_NBYTES = 16
ENCRYPTED = 1

_STRUCT = struct.Struct("<8sHHIQQ32s32s16s8s12s16s16s12s16s")
_KEY_AT = 32
_TENANT_AT = 148
SEAL_AT = HEADER_NBYTES - 16
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
    "codec": "a payload that the codec cannot have written, or a name that is none",
    "unknown": "a codec that is not known, or not installed, here",
    "locked": "encrypted, with a key that is not at hand",
    "plain": "not encrypted, where only what is encrypted is believed",
}
"""Why stored bytes were refused."""


class Header(NamedTuple):
    """A frame's parsed header. ``codec`` is its name; the seal has not been looked at. ``key_id`` is empty, and so are
    ``nonce`` and ``salt``, unless the payload is encrypted; ``tenant`` is empty without a namespace."""

    payload_nbytes: int
    decoded_nbytes: int
    key: BlockKey
    layout: bytes
    codec: str
    tenant: bytes = b""
    key_id: bytes = b""
    nonce: bytes = b""
    salt: bytes = b""

    @property
    def frame_nbytes(self) -> int:
        return HEADER_NBYTES + self.payload_nbytes

    @property
    def encrypted(self) -> bool:
        return bool(self.key_id)


def pack(
    key: BlockKey,
    layout: bytes,
    codec: str,
    payload_nbytes: int,
    decoded_nbytes: int,
    *,
    tenant: bytes = b"",
    key_id: bytes = b"",
    nonce: bytes = b"",
    salt: bytes = b"",
) -> bytearray:
    """An unsealed header."""
    return bytearray(
        _STRUCT.pack(
            MAGIC, VERSION, ENCRYPTED if key_id else 0, HEADER_NBYTES, payload_nbytes, decoded_nbytes, key, layout,
            codec.encode("ascii"), key_id, nonce, salt, tenant, b"", _UNSEALED,
        )
    )  # fmt: skip


def around_key(layout: bytes, nbytes: int, tenant: bytes) -> tuple[bytes, bytes]:
    """What stands before the key, and behind it, in every unsealed header of a raw payload of ``nbytes``."""
    head = bytes(pack(BlockKey(bytes(32)), layout, "raw", nbytes, nbytes, tenant=tenant))
    return head[:_KEY_AT], head[_KEY_AT + 32 :]


def seal(header: bytearray | memoryview, payload: Buffer) -> None:
    """Write the seal of ``header`` and ``payload`` into ``header``."""
    header[SEAL_AT:] = _digest(header, payload)


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
        salt,
        tenant,
        reserved,
        sealed,
    ) = _STRUCT.unpack_from(view)
    if magic != MAGIC:
        raise FrameError("magic", "not a kvkeep frame")
    encrypted = flags == ENCRYPTED
    # What contradicts the flag is another format.
    fits = any(key_id) and not any(sealed) if encrypted else not flags and not any(key_id + nonce + salt)
    if version != VERSION or header_nbytes != HEADER_NBYTES or not fits or any(reserved):
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
    whose = tenant if any(tenant) else b""
    if not encrypted:
        return Header(payload_nbytes, decoded_nbytes, BlockKey(key), layout, name, whose), view[HEADER_NBYTES:]
    if payload_nbytes < TAG_NBYTES:
        raise FrameError("short", f"an encrypted payload of {payload_nbytes} bytes has no room for its tag")
    header = Header(payload_nbytes, decoded_nbytes, BlockKey(key), layout, name, whose, key_id, nonce, salt)
    return header, view[HEADER_NBYTES:]


def tenant_of(head: Buffer) -> bytes:
    """The tenant's mark in the first bytes of a frame; empty where there is none, or no frame."""
    view = as_bytes(head)
    tenant = bytes(view[_TENANT_AT : _TENANT_AT + 16])
    return tenant if len(view) >= HEADER_NBYTES and view[: len(MAGIC)] == MAGIC and any(tenant) else b""


def check(header: Header, key: BlockKey, layout: bytes, decoded_nbytes: int | None = None) -> None:
    """Raise :class:`FrameError` unless the frame claims to be ``key`` of ``layout``, of ``decoded_nbytes`` bytes."""
    if header.key != key:
        raise FrameError("key", f"frame of block {header.key.hex()[:16]} where {key.hex()[:16]} was expected")
    if header.layout != layout:
        raise FrameError("layout", "frame of another layout")
    if decoded_nbytes is not None and header.decoded_nbytes != decoded_nbytes:
        raise FrameError("size", f"a payload of {header.decoded_nbytes} bytes where the layout has {decoded_nbytes}")


def verify(data: Buffer) -> tuple[Header, memoryview]:
    """:func:`parse`, and the seal. An encrypted frame is ``locked`` to this function."""
    header, payload = parse(data)
    if header.encrypted:
        raise FrameError("locked", f"block {header.key.hex()[:16]} is encrypted with key {header.key_id.hex()}")
    view = as_bytes(data)
    if bytes(view[SEAL_AT:HEADER_NBYTES]) != _digest(view, payload):
        raise FrameError("checksum", f"the seal of block {header.key.hex()[:16]} does not match")
    return header, payload


def _digest(header: Buffer, payload: Buffer) -> bytes:
    state = xxhash.xxh3_128(as_bytes(header)[:SEAL_AT])
    state.update(payload)
    return state.digest()
