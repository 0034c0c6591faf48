"""Attack: whoever can write to the medium hands the parser anything at all. It must answer with FrameError, at once,
from the bytes at hand: no crash, no allocation that a length in the header asks for, no frame taken for another."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep import frame
from kvkeep.crypt import Cipher
from kvkeep.errors import FrameError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout

KEY, LAYOUT = BlockKey(b"k" * 32), b"l" * 32


def sealed(payload: bytes) -> bytes:
    header = frame.pack(KEY, LAYOUT, "raw", len(payload), len(payload))
    frame.seal(header, payload)
    return bytes(header) + payload


def accepts(data: bytes) -> bool:
    """Does the whole check, as a reader does it, let ``data`` pass? A FrameError of unknown cause counts as a yes."""
    try:
        header, payload = frame.verify(data)
        frame.check(header, KEY, LAYOUT, 300)
    except FrameError as error:
        return error.cause not in frame.CAUSES
    assert len(payload) == header.payload_nbytes == len(data) - frame.HEADER_NBYTES
    return True


def test_100_000_mutations() -> None:
    rng = random.Random(20260701)
    valid = sealed(rng.randbytes(300))
    assert accepts(valid)
    accepted = 0
    for round_ in range(100_000):
        data = bytearray(valid)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data)) if round_ & 1 else rng.randrange(192)
            match rng.randrange(5):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del data[at : at + rng.randrange(1, 40)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 4:
                    data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
            if not data:
                break
        accepted += data != valid and accepts(bytes(data))
    assert accepted == 0


def test_20_000_forged_headers_with_a_right_seal() -> None:
    """xxh3 is no secret: a forger can seal. Form, key, layout and lengths must hold all the same."""
    rng = random.Random(7)
    valid = sealed(rng.randbytes(300))
    for _ in range(20_000):
        data = bytearray(valid)
        at, nbytes = rng.choice(((0, 8), (8, 2), (10, 2), (12, 4), (16, 8), (24, 8), (32, 32), (64, 32), (96, 16)))
        data[at : at + nbytes] = rng.choice((rng.randbytes(nbytes), bytes(nbytes), b"\xff" * nbytes))
        data[176:192] = xxhash.xxh3_128(bytes(data[:176]) + bytes(data[192:])).digest()
        if data != valid and accepts(bytes(data)):
            assert at == 96, "only the codec's name may differ: its reader looks it up"


@settings(max_examples=300)
@given(data=st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    assert not accepts(data)


@settings(max_examples=300)
@given(
    tail=st.binary(max_size=400),
    numbers=st.tuples(*[st.integers(0, (1 << 64) - 1)] * 2),
    small=st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([0, 1, 191, 192, 193, (1 << 32) - 1])),
)
def test_headers_of_any_numbers(tail: bytes, numbers: tuple[int, int], small: tuple[int, int, int]) -> None:
    version, flags, header_nbytes = small
    head = frame.MAGIC + version.to_bytes(2, "little") + flags.to_bytes(2, "little")
    head += header_nbytes.to_bytes(4, "little") + b"".join(number.to_bytes(8, "little") for number in numbers)
    assert not accepts(head + tail)


@pytest.mark.parametrize("claim", [1 << 30, 1 << 40, (1 << 64) - 1])
def test_nothing_is_allocated_for_a_claim(claim: int) -> None:
    data = bytearray(sealed(bytes(300)))
    data[16:24] = data[24:32] = claim.to_bytes(8, "little")
    data[176:192] = xxhash.xxh3_128(bytes(data[:176]) + bytes(data[192:])).digest()
    tracemalloc.start()
    try:
        assert not accepts(bytes(data))
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


ENCRYPTED_LAYOUT = KVLayout.uniform(
    ModelIdentity(weights="w", kv_dtype="uint8", namespace=b"tenant"),
    num_layers=1, num_kv_heads=1, head_dim=8, dtype="uint8", block_tokens=20,
)  # fmt: skip


def encrypted(cipher: Cipher, payload: bytes) -> bytes:
    room = memoryview(bytearray(len(payload) + frame.TAG_NBYTES))
    return cipher.encrypt(KEY, ENCRYPTED_LAYOUT, "raw", payload, room) + bytes(room)


def decrypts(cipher: Cipher, data: bytes) -> bool:
    room = memoryview(bytearray(ENCRYPTED_LAYOUT.block_nbytes))
    try:
        header, _ = frame.parse(data)
        frame.check(header, KEY, ENCRYPTED_LAYOUT.fingerprint, ENCRYPTED_LAYOUT.block_nbytes)
        cipher.decrypt(data, b"tenant", room)
    except FrameError as error:
        return error.cause not in frame.CAUSES
    return True


def test_100_000_mutations_of_an_encrypted_frame() -> None:
    rng = random.Random(20261124)
    cipher = Cipher([bytes(32)])
    valid = encrypted(cipher, rng.randbytes(ENCRYPTED_LAYOUT.block_nbytes))
    assert decrypts(cipher, valid)
    accepted = 0
    for _ in range(100_000):
        data = bytearray(valid)
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 40)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
        accepted += data != valid and decrypts(cipher, bytes(data))
    assert accepted == 0


@settings(max_examples=300)
@given(data=st.binary(max_size=700), head=st.booleans())
def test_any_bytes_as_an_encrypted_frame(data: bytes, head: bool) -> None:
    cipher = Cipher([bytes(32)])
    start = encrypted(cipher, bytes(ENCRYPTED_LAYOUT.block_nbytes))[: 176 if head else 16]
    assert not decrypts(cipher, start + data)


@settings(max_examples=300)
@given(text=st.text(max_size=200))
def test_any_text_as_an_encrypted_one(text: str) -> None:
    with pytest.raises(FrameError):
        Cipher([bytes(32)]).decrypt_text(text, context=b"")
