"""What every codec has to hold.

Subclass :class:`CodecSuite` in a test module as ``TestMine`` and override :meth:`CodecSuite.make`; pytest runs the
rest. Needs the extra ``test``.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from kvkeep.buffers import as_bytes
from kvkeep.codecs.base import Codec
from kvkeep.errors import CodecError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import DTYPES, KVLayout, LayerGroup

GROUPS: dict[str, tuple[LayerGroup, ...]] = {
    "uniform": (LayerGroup(2, 2, 8, 8),),
    "mixed": (LayerGroup(1, 2, 8, 8), LayerGroup(2, 1, 12, 4)),
    "latent": (LayerGroup(3, 1, 9, 0),),
    "tiny": (LayerGroup(1, 1, 1, 0),),
}
"""Layouts by name: alike, of two groups, with one tensor a layer, of one value a token."""

SLACK_NBYTES = 64 << 10
"""What decoding may allocate beyond a block: Python's own objects."""


def layout(dtype: str, groups: str = "uniform", block_tokens: int = 16) -> KVLayout:
    """A layout of ``dtype`` and the shape that :data:`GROUPS` has under ``groups``."""
    return KVLayout(ModelIdentity("0" * 64, dtype), GROUPS[groups], dtype, block_tokens)


def gaussian(of: KVLayout, seed: int = 0) -> bytes:
    """A block like a model's: normal values with a scale for each of 64 channels."""
    rng = np.random.default_rng(seed)
    count = of.block_nbytes // of.np_dtype.itemsize
    scales = np.exp(rng.standard_normal(64))
    values = (rng.standard_normal(count) * np.resize(scales, count)).astype(np.float32)
    return as_dtype(values, of.dtype)


def as_dtype(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """The bits of ``values`` in ``dtype``; one-byte types get their values scaled to integers."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype in ("float32", "float16"):
        return values.astype(DTYPES[dtype][0]).tobytes()
    return np.clip(values * 16, -127, 127).astype(np.int8).tobytes()


def blocks(of: KVLayout) -> Iterator[bytes]:
    """Blocks of every kind: like a model's, constant, random bits, and the floats that arithmetic trips over."""
    rng = np.random.default_rng(1)
    yield gaussian(of)
    yield bytes(of.block_nbytes)
    yield b"\xff" * of.block_nbytes
    yield rng.bytes(of.block_nbytes)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1e-38, 3.4e38, 1.0], np.float32)
    bits = np.concatenate([odd.view("<u4"), np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF], "<u4")])
    yield np.resize(bits, -(-of.block_nbytes // 4)).tobytes()[: of.block_nbytes]


class CodecSuite:
    """Subclass and override :meth:`make`. A lossy codec says so by ``lossless``, and is held to shape only."""

    def make(self) -> Codec:
        raise NotImplementedError

    @pytest.fixture
    def codec(self) -> Codec:
        return self.make()

    def test_name_fits_a_frame(self, codec: Codec) -> None:
        assert codec.name
        assert len(codec.name.encode("ascii")) <= 16
        assert codec.lossless in (True, False)

    @pytest.mark.parametrize("groups", GROUPS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_round_trip(self, codec: Codec, dtype: str, groups: str) -> None:
        of = layout(dtype, groups)
        for block in blocks(of):
            for data in (block, bytearray(block), memoryview(block)):
                stored = bytes(codec.encode(data, of))
                assert data == block, "encode changed what it was given"
                out = bytearray(b"\xa5" * of.block_nbytes)
                codec.decode(stored, of, memoryview(out))
                again = bytearray(b"\x5a" * of.block_nbytes)
                codec.decode(memoryview(stored), of, memoryview(again))
                assert out == again, "decode left a part of its output as it was"
                if codec.lossless:
                    assert out == block

    @pytest.mark.parametrize("groups", GROUPS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_first_blocks_too(self, codec: Codec, dtype: str, groups: str) -> None:
        for tokens in (1, 3, 16):
            of = layout(dtype, groups, tokens)
            for block in blocks(of):
                stored = bytes(codec.encode_first(block, of))
                out = bytearray(b"\xa5" * of.block_nbytes)
                codec.decode(stored, of, memoryview(out))
                again = bytearray(b"\x5a" * of.block_nbytes)
                codec.decode(memoryview(stored), of, memoryview(again))
                assert out == again, "decode left a part of its output as it was"
                if codec.lossless:
                    assert out == block

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_every_pattern_of_16_bits(self, codec: Codec, dtype: str) -> None:
        of = layout(dtype, "uniform", 1 << 11)  # 2 layers × 2 heads × 16 values × 2,048 tokens: two of each
        block = np.tile(np.arange(1 << 16, dtype="<u2"), 2).tobytes()
        out = bytearray(of.block_nbytes)
        codec.decode(codec.encode(block, of), of, memoryview(out))
        if codec.lossless:
            assert out == block

    def test_equal_blocks_are_stored_alike(self, codec: Codec) -> None:
        of = layout("bfloat16")
        first, second = (bytes(self.make().encode(gaussian(of), of)) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_wrong_lengths_are_refused(self, codec: Codec, dtype: str) -> None:
        of = layout(dtype)
        stored = bytes(codec.encode(gaussian(of), of))
        out = memoryview(bytearray(of.block_nbytes))
        for damaged in (b"", stored[:1], stored[: len(stored) // 2], stored[:-1], stored + b"\0", stored + stored):
            with pytest.raises(CodecError):
                codec.decode(damaged, of, out)
        if of.block_nbytes > 1:
            with pytest.raises(CodecError):
                codec.decode(stored, of, out[:-1])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
    def test_garbage_is_refused_or_decoded(self, codec: Codec, dtype: str) -> None:
        """A seal guards what is stored; what passes it all the same is a CodecError or some block, no crash."""
        of = layout(dtype)
        rng = random.Random(7)
        stored = bytes(codec.encode(gaussian(of), of))
        out = bytearray(of.block_nbytes)
        for round_ in range(400):
            if round_ % 4 == 0:
                damaged = rng.randbytes(rng.randrange(2 * len(stored)))
            else:
                wrong = bytearray(stored)
                for _ in range(rng.choice([1, 1, 3])):
                    at = rng.randrange(len(wrong) if round_ % 2 else min(24, len(wrong)))
                    wrong[at] = rng.choice([0, 255, wrong[at] ^ (1 << rng.randrange(8))])
                damaged = bytes(wrong)
            try:
                codec.decode(damaged, of, memoryview(out))
            except CodecError:
                continue

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
    def test_decoding_allocates_no_more_than_a_block(self, codec: Codec, dtype: str) -> None:
        of = layout(dtype, "uniform", 1 << 12)
        for block in (gaussian(of), bytes(of.block_nbytes)):
            stored = bytes(codec.encode(block, of))
            out = memoryview(bytearray(of.block_nbytes))
            codec.decode(stored, of, out)  # what is set up once does not count
            tracemalloc.start()
            try:
                codec.decode(stored, of, out)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak <= of.block_nbytes + SLACK_NBYTES

    def test_threads_do_not_meet(self, codec: Codec) -> None:
        of = layout("bfloat16", "uniform", 256)
        cases = [gaussian(of, seed) for seed in range(8)]
        expected = [bytes(codec.encode(block, of)) for block in cases]

        def work(number: int) -> bool:
            block, out = cases[number % 8], bytearray(of.block_nbytes)
            stored = codec.encode(block, of)
            codec.decode(stored, of, memoryview(out))
            return as_bytes(stored) == expected[number % 8] and (out == block or not codec.lossless)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(200)))
