"""Attack: a payload of a few bytes that unfolds into terabytes. A decoder allocates what the layout says, never what
the payload says; checked in a process that may not take more memory than that."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from kvkeep.codecs.lossless import Lossless
from kvkeep.errors import CodecError
from kvkeep.testing.codecs import gaussian, layout

LAYOUT = layout("bfloat16", block_tokens=256)
PLANE = LAYOUT.block_nbytes // 2


def payload(first: bytes, second: bytes = b"") -> bytes:
    """Two planes as stored; the second lies there as it is unless given."""
    second = second or bytes(PLANE)
    return struct.pack("<2I", len(first), len(second)) + first + second


def zeros(nbytes: int) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(bytes(nbytes))


def unsized(data: bytes) -> bytes:
    """A frame that does not say how much it holds, as streams write it."""
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(data) + stream.flush()


def claiming(nbytes: int) -> bytes:
    """A frame whose header claims ``nbytes``, followed by one small block: RFC 8878, 3.1.1."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + nbytes.to_bytes(8, "little") + b"\x03\x00\x00" + b"\0"


BOMBS: dict[str, Callable[[], bytes]] = {
    "256 MB of zeros": lambda: zeros(256 << 20),
    "one byte too many": lambda: zeros(PLANE + 1),
    "one byte too few": lambda: zeros(PLANE - 1),
    "claims 1 TB": lambda: claiming(1 << 40),
    "claims 2^64 - 1": lambda: claiming((1 << 64) - 1),
    "claims a plane, holds nothing": lambda: claiming(PLANE),
    "does not say": lambda: unsized(bytes(64 << 20)),
    "does not say, and is right": lambda: unsized(bytes(PLANE)),
    "two frames": lambda: zeros(PLANE) + zeros(PLANE),
    "a frame and a tail": lambda: zeros(PLANE) + b"tail",
    "skippable frame first": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zeros(PLANE),
    "nothing": lambda: b"",
    "no frame": lambda: b"garbage",
    "a window of 2 GB": lambda: b"\x28\xb5\x2f\xfd\x00\xa8\x03\x00\x00\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_refused_without_allocating(name: str) -> None:
    bomb, out = payload(BOMBS[name]()), memoryview(bytearray(LAYOUT.block_nbytes))
    codec = Lossless()
    codec.decode(codec.encode(gaussian(LAYOUT), LAYOUT), LAYOUT, out)  # what is set up once does not count
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode(bomb, LAYOUT, out)
        assert tracemalloc.get_traced_memory()[1] < LAYOUT.block_nbytes + (64 << 10)
    finally:
        tracemalloc.stop()


def test_right_planes_from_another_writer_are_read() -> None:
    """The test's own tools make valid planes, so what is refused above is refused for its length."""
    out = bytearray(b"x" * LAYOUT.block_nbytes)
    Lossless().decode(payload(zeros(PLANE)), LAYOUT, memoryview(out))
    assert out == bytes(LAYOUT.block_nbytes)


@pytest.mark.parametrize("lengths", [(0, 0), (1 << 32) - 1, (PLANE, PLANE + 1), (2 * PLANE, 0)], ids=str)
def test_lengths_that_do_not_add_up(lengths: tuple[int, int] | int) -> None:
    first, second = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    with pytest.raises(CodecError):
        Lossless().decode(
            struct.pack("<2I", first, second) + bytes(2 * PLANE), LAYOUT, memoryview(bytearray(2 * PLANE))
        )


def test_in_a_process_with_little_memory() -> None:
    """zstd's own allocations, which Python does not see: 64 MB above what the process has taken so far, no more."""
    program = textwrap.dedent(
        """
        import resource
        from test_zip_bombs import *
        codec, out = Lossless(), memoryview(bytearray(LAYOUT.block_nbytes))
        codec.decode(codec.encode(gaussian(LAYOUT), LAYOUT), LAYOUT, out)
        bombs = [payload(make()) for make in BOMBS.values()]
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20),) * 2)
        for bomb in bombs:
            try:
                codec.decode(bomb, LAYOUT, out)
            except CodecError:
                continue
            raise SystemExit("a bomb was decoded")
        print("refused", len(bombs))
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"refused {len(BOMBS)}\n"
