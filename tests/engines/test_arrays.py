"""Arrays of every kind into blocks and back, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvkeep
from kvkeep.engines.base import ArraySink, ArraySource, bits_of
from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import KVLayout, LayerGroup

HEADS, DIM, LAYERS, BLOCK = 2, 8, 3, 16


def layout(dtype: str = "float32", **options: Any) -> KVLayout:
    identity = ModelIdentity(weights="w", kv_dtype=dtype)
    return KVLayout.uniform(
        identity, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype, block_tokens=BLOCK, **options
    )


def random_layers(tokens: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (torch.randn(HEADS, tokens, DIM).to(dtype), torch.randn(HEADS, tokens, DIM).to(dtype)) for _ in range(LAYERS)
    ]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_cache_gives_back_what_an_engine_gave(dtype: str) -> None:
    kind = getattr(torch, dtype)
    given = random_layers(50, kind)
    tokens = list(range(50))
    with kvkeep.open(None, memory="16MiB", disk=0) as cache:
        bound = cache.bind(layout(dtype))
        assert bound.save(tokens, ArraySource(layout(dtype), given)) == 3
        got = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in given]
        with bound.lease(bound.match(tokens)) as lease:
            assert bound.load(lease, ArraySink(layout(dtype), got)) == 48
    for (k, v), (got_k, got_v) in zip(given, got, strict=True):
        assert same_bits(k[:, :48], got_k[:, :48])
        assert same_bits(v[:, :48], got_v[:, :48])
        assert not got_k[:, 48:].float().any()


def test_views_are_not_copies() -> None:
    tensor = torch.zeros(HEADS, 4, 32, DIM, dtype=torch.bfloat16)[:, 1, ::2]  # strided, with an offset
    view = bits_of(tensor, layout("bfloat16"))
    view[1, 3, 5] = 0x3F80
    assert tensor[1, 3, 5] == 1.0
    assert tensor.float().sum() == 1.0


def test_one_array_for_all_layers_and_a_start() -> None:
    whole = np.arange(LAYERS * 2 * HEADS * 48 * DIM, dtype=np.float32).reshape(LAYERS, 2, HEADS, 48, DIM)
    out = bytearray(layout().block_nbytes)
    ArraySource(layout(), whole[:, :, :, 16:], start=16).read(2, memoryview(out))
    assert np.array_equal(layout().arrays(out)[0], whole[:, :, :, 32:48])
    target = np.zeros((LAYERS, 2, HEADS, 20, DIM), np.float32)
    ArraySink(layout(), target, start=32).write(2, memoryview(out))
    assert np.array_equal(target[:, :, :, :16], whole[:, :, :, 32:48])


def test_a_block_that_hangs_over_is_cut() -> None:
    out = bytearray(b"\x01" * layout().block_nbytes)
    target = [(np.zeros((HEADS, 20, DIM), np.float32), np.zeros((HEADS, 20, DIM), np.float32)) for _ in range(LAYERS)]
    ArraySink(layout(), target).write(1, memoryview(out))
    assert not target[0][0][:, :16].any()
    assert target[0][0][:, 16:].all()


def test_keys_wider_than_values_and_no_values() -> None:
    identity = ModelIdentity(weights="w", kv_dtype="float32")
    odd = KVLayout(identity, (LayerGroup(1, 2, 8, 4), LayerGroup(1, 1, 6, 0)), "float32", 4)
    rng = np.random.default_rng(0)
    arrays = [
        (rng.random((2, 4, 8), np.float32), rng.random((2, 4, 4), np.float32)),
        (rng.random((1, 4, 6), np.float32), None),
    ]
    out = bytearray(odd.block_nbytes)
    ArraySource(odd, arrays).read(0, memoryview(out))
    target = [(np.zeros_like(k), None if v is None else np.zeros_like(v)) for k, v in arrays]
    ArraySink(odd, target).write(0, memoryview(out))
    for (k, v), (got_k, got_v) in zip(arrays, target, strict=True):
        assert np.array_equal(k, got_k)
        assert v is None or np.array_equal(v, got_v)


@pytest.mark.parametrize(
    "arrays",
    [
        random_layers(16, torch.float16),
        random_layers(16, torch.float32)[:2],
        [(k[:1], v[:1]) for k, v in random_layers(16, torch.float32)],
        [(k, v[:, :8]) for k, v in random_layers(16, torch.float32)],
        [(k, None) for k, _ in random_layers(16, torch.float32)],
        np.zeros((LAYERS, 2, HEADS + 1, 16, DIM), np.float32),
        [(object(), object())] * LAYERS,
        bytes(LAYERS * 2 * HEADS * 16 * DIM * 4),
        [(k.to("meta"), v.to("meta")) for k, v in random_layers(16, torch.float32)],
    ],
)
def test_arrays_that_do_not_fit(arrays: Any) -> None:
    with pytest.raises(LayoutError):
        ArraySource(layout(), arrays)


def test_what_cannot_be_written_to_is_no_sink() -> None:
    frozen = np.zeros((LAYERS, 2, HEADS, 16, DIM), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(LayoutError, match="read-only"):
        ArraySink(layout(), frozen)


def test_arrays_in_place_of_a_source_or_a_sink_are_told_how_to_become_one() -> None:
    arrays: Any = np.zeros((LAYERS, 2, HEADS, 32, DIM), np.float32)
    with kvkeep.open(None, memory="16MiB", disk=0) as cache:
        bound = cache.bind(layout())
        with pytest.raises(LayoutError, match="ArraySource"):
            bound.save(range(32), arrays)
        with bound.lease(bound.match(range(32))) as lease, pytest.raises(LayoutError, match="ArraySink"):
            bound.load(lease, arrays)


def test_a_block_that_is_not_there() -> None:
    source = ArraySource(layout(), random_layers(20, torch.float32), start=16)
    for index in (0, 2):
        with pytest.raises(LayoutError, match="not whole"):
            source.read(index, memoryview(bytearray(layout().block_nbytes)))
