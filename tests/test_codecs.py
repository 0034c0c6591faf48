"""The shipped codecs pass the shipped suite; what is particular to each."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from kvkeep.codecs import kernels, reference
from kvkeep.codecs.base import Codec
from kvkeep.codecs.int4 import Int4
from kvkeep.codecs.int8 import Int8
from kvkeep.codecs.lossless import Lossless
from kvkeep.codecs.raw import Raw
from kvkeep.codecs.uqz import UQZ, UQZHQ, UQZMax
from kvkeep.errors import CodecError
from kvkeep.layout import KVLayout
from kvkeep.testing.codecs import CodecSuite, gaussian, layout


class TestRaw(CodecSuite):
    def make(self) -> Codec:
        return Raw()


class Both(CodecSuite):
    """With the compiled kernels, then with NumPy's."""

    @pytest.fixture(autouse=True, params=["compiled", "numpy"])
    def which(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        assert kernels.wait(60), "no compiled kernels: is there a C compiler?"
        if request.param == "numpy":
            monkeypatch.setattr(kernels, "_current", reference)


class TestLossless(Both):
    def make(self) -> Codec:
        return Lossless()


class TestInt8(Both):
    def make(self) -> Codec:
        return Int8()


class TestInt4(Both):
    def make(self) -> Codec:
        return Int4()


class TestUQZ(Both):
    def make(self) -> Codec:
        return UQZ()


class TestUQZHQ(Both):
    def make(self) -> Codec:
        return UQZHQ()


class TestUQZMax(Both):
    def make(self) -> Codec:
        return UQZMax()


def ratio(of: KVLayout, block: bytes) -> float:
    return len(Lossless().encode(block, of)) / len(block)


def test_lossless_is_smaller_where_there_is_something_to_gain() -> None:
    assert ratio(layout("bfloat16", block_tokens=1024), gaussian(layout("bfloat16", block_tokens=1024))) < 0.72
    assert ratio(layout("float32", block_tokens=1024), gaussian(layout("float32", block_tokens=1024))) < 0.87
    of = layout("bfloat16", block_tokens=1024)
    assert ratio(of, bytes(of.block_nbytes)) < 0.01


def test_lossless_costs_a_few_bytes_at_most() -> None:
    for dtype in ("float32", "bfloat16", "int8"):
        of = layout(dtype)
        noise = np.random.default_rng(3).bytes(of.block_nbytes)
        assert len(Lossless().encode(noise, of)) <= of.block_nbytes + 4 * of.np_dtype.itemsize


def test_float32_that_was_bfloat16_costs_no_more_than_bfloat16() -> None:
    of, narrow = layout("float32", block_tokens=1024), layout("bfloat16", block_tokens=1024)
    half = np.frombuffer(gaussian(narrow), "<u2").astype("<u4") << 16
    stored = Lossless().encode(half.tobytes(), of)
    assert len(stored) < 1.01 * len(Lossless().encode(gaussian(narrow), narrow)) + 64


def test_random_float32_patterns() -> None:
    of = layout("float32", block_tokens=1 << 12)
    for seed in range(4):
        block = np.random.default_rng(seed).bytes(of.block_nbytes)
        out = bytearray(of.block_nbytes)
        Lossless().decode(Lossless().encode(block, of), of, memoryview(out))
        assert out == block


def test_encode_refuses_what_is_no_block() -> None:
    of = layout("bfloat16")
    with pytest.raises(CodecError):
        Lossless().encode(bytes(of.block_nbytes - 2), of)


def test_payload_of_a_larger_block_is_refused() -> None:
    large, small = layout("bfloat16", block_tokens=64), layout("bfloat16", block_tokens=16)
    with pytest.raises(CodecError):
        Lossless().decode(Lossless().encode(bytes(large.block_nbytes), large), small, memoryview(bytearray(2048)))


def test_golden_payload_decodes_for_ever() -> None:
    """Written by version 0.1.0. Failing here means that stored caches are lost: a new format needs a new name."""
    of = layout("bfloat16", block_tokens=64)
    out = bytearray(of.block_nbytes)
    Lossless().decode((Path(__file__).parent / "golden" / "lossless.payload").read_bytes(), of, memoryview(out))
    values = (np.arange(of.block_nbytes // 2, dtype=np.uint32) * 40503 >> 3) & 0x3FFF | 0x3000
    assert hashlib.sha256(out).digest() == hashlib.sha256(values.astype("<u2").tobytes()).digest()
