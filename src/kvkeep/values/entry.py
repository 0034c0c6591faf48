"""What the index keeps under a name, as bytes.

::

    "kvi1"  tags u8  in place u8  key's length u32  value's length u64  stale f64  digest 32s
    (tag 32s, generation 16s) …  key  [the value, if it is in place]  xxh3-128 of the name and all of this

The check ties an entry to its name: one that was stored under another, or damaged, or cut short, is a miss.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

import xxhash

MAGIC = b"kvi1"
CHECK_NBYTES = 16
MAX_TAGS = 255
_HEAD = struct.Struct("<4sBBIQd32s")
_TAG = struct.Struct("32s16s")


class Entry(NamedTuple):
    """``digest`` names the value's bytes, of which there are ``nbytes``; small ones stand in ``value`` themselves.
    ``tags``: each with the generation that it had. For the last ``stale`` seconds of its life it is not fresh.
    ``key`` is the caller's, packed."""

    digest: bytes
    nbytes: int
    key: bytes
    tags: tuple[tuple[bytes, bytes], ...] = ()
    stale: float = 0.0
    value: bytes | None = None


def naming(namespace: bytes) -> hmac.HMAC:
    """What a tenant's names are made by, of the caller's packed keys."""
    return hmac.new(namespace, b"kvkeep value name 1\0", hashlib.sha256)


def encode(name: bytes, entry: Entry) -> bytes:
    parts = [
        _HEAD.pack(
            MAGIC, len(entry.tags), entry.value is not None, len(entry.key), entry.nbytes, entry.stale, entry.digest
        ),
        *(_TAG.pack(*tag) for tag in entry.tags),
        entry.key,
        entry.value or b"",
    ]
    body = b"".join(parts)
    return body + xxhash.xxh3_128_digest(name + body)


def decode(name: bytes, data: bytes) -> Entry | None:
    """None if these bytes are not an entry of ``name``."""
    body = data[:-CHECK_NBYTES]
    if len(body) < _HEAD.size or data[-CHECK_NBYTES:] != xxhash.xxh3_128_digest(name + body):
        return None
    magic, num_tags, in_place, key_nbytes, nbytes, stale, digest = _HEAD.unpack_from(body)
    at = _HEAD.size + num_tags * _TAG.size
    end = at + key_nbytes
    if magic != MAGIC or len(body) != end + (nbytes if in_place else 0):
        return None
    tags = tuple(_TAG.iter_unpack(body[_HEAD.size : at]))
    return Entry(digest, nbytes, body[at:end], tags, stale, body[end:] if in_place else None)
