"""Frames: what was sealed comes back, and every other byte string is refused with its cause."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import xxhash

from kvkeep import frame
from kvkeep.errors import FrameError
from kvkeep.keys import BlockKey

GOLDEN = Path(__file__).parent / "golden"
KEY = BlockKey(bytes(range(32)))
OTHER_KEY = BlockKey(bytes(range(1, 33)))
LAYOUT = bytes(range(100, 132))
PAYLOAD = b"The quick brown fox jumps over the lazy dog."


def sealed(
    key: BlockKey = KEY, layout: bytes = LAYOUT, codec: str = "raw", payload: bytes = PAYLOAD, decoded: int = 44
) -> bytes:
    header = frame.pack(key, layout, codec, len(payload), decoded)
    frame.seal(header, payload)
    return bytes(header) + payload


def cause_of(data: bytes) -> str:
    with pytest.raises(FrameError) as caught:
        frame.verify(data)
    assert caught.value.cause in frame.CAUSES
    return caught.value.cause


def resealed(data: bytearray) -> bytes:
    """``data`` with a right seal: what an attacker, or a bug before the seal, would write."""
    data[176:192] = xxhash.xxh3_128(bytes(data[:176]) + bytes(data[192:])).digest()
    return bytes(data)


def test_what_was_sealed_comes_back() -> None:
    for payload in (PAYLOAD, b"", bytes(100_000)):
        for codec in ("raw", "lossless", "x" * 16):
            for form in (bytes, bytearray, memoryview):
                header, view = frame.verify(form(sealed(codec=codec, payload=payload, decoded=7)))
                assert header == frame.Header(len(payload), 7, KEY, LAYOUT, codec)
                assert header.frame_nbytes == len(sealed(payload=payload))
                assert view == payload
                frame.check(header, KEY, LAYOUT, 7)
                frame.check(header, KEY, LAYOUT)


def test_the_seal_is_in_place_and_the_header_is_what_pack_made() -> None:
    header = frame.pack(KEY, LAYOUT, "raw", len(PAYLOAD), 44)
    assert len(header) == frame.HEADER_NBYTES
    assert header[176:] == bytes(16)
    before = bytes(header)
    frame.seal(header, PAYLOAD)
    assert header[:176] == before[:176]
    assert len(header) == frame.HEADER_NBYTES
    buffer = bytearray(before)
    frame.seal(memoryview(buffer), PAYLOAD)
    assert buffer == header


@pytest.mark.parametrize("name", ["frame-raw.bin", "frame-empty.bin", "frame-lossless.bin"])
def test_golden_frames_are_read_for_ever(name: str) -> None:
    """A failure means that stored caches are lost: a new format needs a new version, and reading the old one."""
    data = (GOLDEN / name).read_bytes()
    header, payload = frame.verify(data)
    codec = name.removeprefix("frame-").removesuffix(".bin")
    expected = {
        "raw": (PAYLOAD, "raw", 44),
        "empty": (b"", "raw", 0),
        "lossless": ((GOLDEN / "lossless.payload").read_bytes(), "lossless", 8192),
    }[codec]
    assert (bytes(payload), header.codec, header.decoded_nbytes) == expected
    assert (header.key, header.layout) == (KEY, LAYOUT)
    assert sealed(codec=expected[1], payload=expected[0], decoded=expected[2]) == data, "written differently today"


def test_the_golden_header_byte_by_byte() -> None:
    data = (GOLDEN / "frame-raw.bin").read_bytes()
    assert data[:8] == b"kvkeep\r\n"
    assert struct.unpack_from("<HHIQQ", data, 8) == (1, 0, 192, 44, 44)
    assert (data[32:64], data[64:96], data[96:112]) == (KEY, LAYOUT, b"raw" + bytes(13))
    assert data[112:176] == bytes(64)
    assert data[176:192] == xxhash.xxh3_128(data[:176] + data[192:]).digest()


def test_every_single_bit_flipped_is_refused() -> None:
    data = bytearray(sealed())
    causes = set()
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        causes.add(cause_of(bytes(data)))
        data[bit >> 3] ^= 1 << (bit & 7)
    frame.verify(bytes(data))
    assert causes == {"magic", "version", "size", "short", "long", "checksum", "codec"}


def test_every_pair_of_neighbouring_bytes_swapped_is_refused() -> None:
    data = sealed()
    for at in range(len(data) - 1):
        if data[at] != data[at + 1]:
            cause_of(data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :])


def test_every_truncation_is_refused() -> None:
    data = sealed()
    assert {cause_of(data[:nbytes]) for nbytes in range(len(data))} == {"short"}
    assert {cause_of(data[start:]) for start in range(1, len(data))} <= {"short", "magic"}


def test_every_extension_is_refused() -> None:
    data = sealed()
    for tail in (b"\0", b"\xff", data, bytes(4096)):
        assert cause_of(data + tail) == "long"
        assert cause_of(tail + data) in ("magic", "long")


def test_bytes_of_the_same_size_are_refused() -> None:
    nbytes = len(sealed())
    assert cause_of(bytes(nbytes)) == "magic"
    assert cause_of(b"\xff" * nbytes) == "magic"
    torn = sealed()[:192] + bytes(len(PAYLOAD))  # the header reached the disk, the payload did not
    assert cause_of(torn) == "checksum"
    assert cause_of(bytes(192) + PAYLOAD) == "magic"


def test_another_blocks_frame_is_refused() -> None:
    header, _ = frame.verify(sealed())
    for key, layout, decoded, cause in (
        (OTHER_KEY, LAYOUT, 44, "key"),
        (KEY, LAYOUT[::-1], 44, "layout"),
        (KEY, LAYOUT, 45, "size"),
        (OTHER_KEY, LAYOUT[::-1], 45, "key"),
    ):
        with pytest.raises(FrameError) as caught:
            frame.check(header, key, layout, decoded)
        assert caught.value.cause == cause


def test_the_seal_covers_the_header() -> None:
    """The payload of one block under the header of another, both intact, is refused."""
    first, second = sealed(payload=b"a" * 44), sealed(key=OTHER_KEY, payload=b"b" * 44)
    assert cause_of(first[:192] + second[192:]) == "checksum"
    assert cause_of(first[:176] + second[176:]) == "checksum"


@pytest.mark.parametrize("nbytes", [1 << 40, (1 << 64) - 1, (1 << 63), frame.MAX_PAYLOAD_NBYTES + 1])
@pytest.mark.parametrize("at", [16, 24])
def test_a_header_that_claims_too_much(nbytes: int, at: int) -> None:
    """Even with a right seal: refused by the cap, before anything is allocated."""
    data = bytearray(sealed())
    data[at : at + 8] = nbytes.to_bytes(8, "little")
    assert cause_of(resealed(data)) == "size"


def test_a_header_that_claims_another_length() -> None:
    for nbytes, cause in ((45, "short"), (43, "long"), (0, "long"), (frame.MAX_PAYLOAD_NBYTES, "short")):
        data = bytearray(sealed())
        data[16:24] = nbytes.to_bytes(8, "little")
        assert cause_of(resealed(data)) == cause


@pytest.mark.parametrize(
    ("at", "field", "cause"),
    [
        (0, b"KVKEEP\r\n", "magic"),
        (0, b"kvkeep\n\n", "magic"),  # a transfer in text mode
        (8, b"\x02\x00", "version"),
        (8, b"\x00\x00", "version"),
        (10, b"\x01\x00", "version"),
        (12, b"\x00\x00\x00\x00", "version"),
        (12, b"\xff\xff\xff\xff", "version"),
        (96, b"\xff" * 16, "codec"),
        (96, "é".encode() + bytes(14), "codec"),
    ],
)
def test_sealed_headers_from_elsewhere(at: int, field: bytes, cause: str) -> None:
    data = bytearray(sealed())
    data[at : at + len(field)] = field
    assert cause_of(resealed(data)) == cause


def test_an_unsealed_frame_is_not_verified_but_parsed() -> None:
    data = bytes(frame.pack(KEY, LAYOUT, "raw", len(PAYLOAD), 44)) + PAYLOAD
    assert cause_of(data) == "checksum"
    header, payload = frame.parse(data)
    assert (header.key, bytes(payload)) == (KEY, PAYLOAD)


def test_every_cause_can_occur_and_is_explained() -> None:
    assert all(frame.CAUSES.values())
    assert {"short", "long", "magic", "version", "key", "layout", "size", "checksum", "codec"} < set(frame.CAUSES)
    assert {"locked", "plain", "unknown"} < set(frame.CAUSES)  # tests/test_crypt.py
