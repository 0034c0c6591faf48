"""zstd for streams whose decoded lengths the reader knows: never a length from the payload is believed.

Stored form: for each stream its stored length (u32, little-endian; a stream's full length means "as it is"), then the
streams. A stream is a zstd frame, or lies there as it is where zstd would save less than a 32nd.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.errors import CodecError, ConfigError

try:
    import zstandard
except ImportError as error:
    raise ConfigError("the codecs lossless and uqz need zstandard: pip install 'kvkeep[zstd]'") from error

Stream = npt.NDArray[np.uint8]

# Level 1 with matches of at least 7 bytes from a tiny table: exponents and quantized values have hardly any matches, so
# the time and the bits go into entropy coding. On exponents: 3.4 × as fast as plain level 1, in 6% fewer bytes.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    compression_level=1, strategy=zstandard.STRATEGY_FAST, window_log=17, min_match=7, hash_log=6, target_length=0
)


class _Contexts(threading.local):
    """One pair a thread: zstd contexts are not thread-safe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def pack(streams: Sequence[Stream], head: bytes = b"", tail: bytes = b"") -> bytes:
    """The streams in stored form, between ``head`` and ``tail``."""
    compressor = _contexts.compressor
    stored: list[Any] = []
    for stream in streams:
        packed = compressor.compress(stream.data)
        stored.append(packed if len(packed) < stream.nbytes - stream.nbytes // 32 else stream)
    lengths = struct.pack(f"<{len(stored)}I", *(memoryview(part).nbytes for part in stored))
    return b"".join([head, lengths, *stored, tail])


def unpack(view: memoryview, sizes: Sequence[int]) -> list[Stream]:
    """The streams, of ``sizes`` bytes. Raises :class:`CodecError` on what :func:`pack` cannot have written."""
    head = struct.Struct(f"<{len(sizes)}I")
    if len(view) < head.size:
        raise CodecError(f"a payload of {len(view)} bytes has no lengths of its streams")
    lengths = head.unpack_from(view)
    if head.size + sum(lengths) != len(view):
        raise CodecError(f"streams of {sum(lengths)} bytes in a payload of {len(view)}")
    streams = []
    at = head.size
    for length, nbytes in zip(lengths, sizes, strict=True):
        streams.append(_stream(view[at : at + length], nbytes))
        at += length
    return streams


def _stream(stored: memoryview, nbytes: int) -> Stream:
    """Decode one stream. zstd allocates what a frame claims, so the claim is compared with ``nbytes`` first."""
    if len(stored) == nbytes:
        return np.frombuffer(stored, np.uint8)
    try:
        claimed = zstandard.frame_content_size(stored)
        if claimed != nbytes:
            raise CodecError(f"a zstd frame of {claimed} bytes where a stream has {nbytes}")
        plain = _contexts.decompressor.decompress(stored, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"a damaged zstd frame: {error}") from error
    if len(plain) != nbytes:
        raise CodecError(f"a zstd frame held {len(plain)} bytes of a stream's {nbytes}")
    return np.frombuffer(plain, np.uint8)
