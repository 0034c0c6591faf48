"""Layout: default block sizes, fingerprints, and the views of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import DTYPES, MIN_BLOCK_NBYTES, MIN_BLOCK_TOKENS, KVLayout, LayerGroup, default_block_tokens

IDENTITY = ModelIdentity("ab" * 32, "bfloat16")
BASE = KVLayout(IDENTITY, (LayerGroup(2, 3, 8, 8),), "bfloat16", 16)


def uniform(layers: int, heads: int, dim: int, dtype: str = "bfloat16", **options: int) -> KVLayout:
    return KVLayout.uniform(IDENTITY, num_layers=layers, num_kv_heads=heads, head_dim=dim, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("shape", "block_tokens", "block_nbytes"),
    [
        ((30, 3, 64, "bfloat16"), 16, 368_640),  # SmolLM2-135M
        ((30, 3, 64, "float32"), 16, 737_280),
        ((32, 8, 128, "bfloat16"), 16, 2 << 20),  # Llama-3-8B
        ((24, 2, 64, "bfloat16"), 32, 393_216),  # Qwen2.5-0.5B
        ((1, 1, 1, "int8"), 131_072, 262_144),
        ((32, 1, 128, "bfloat16"), 16, 262_144),  # on the border
    ],
)
def test_default_block(shape: tuple[int, int, int, str], block_tokens: int, block_nbytes: int) -> None:
    layout = uniform(*shape)
    assert (layout.block_tokens, layout.block_nbytes) == (block_tokens, block_nbytes)


@given(token_nbytes=st.integers(1, 1 << 24))
def test_default_is_the_smallest_that_is_large_enough(token_nbytes: int) -> None:
    tokens = default_block_tokens(token_nbytes)
    assert tokens >= MIN_BLOCK_TOKENS
    assert tokens.bit_count() == 1
    assert tokens * token_nbytes >= MIN_BLOCK_NBYTES
    assert tokens == MIN_BLOCK_TOKENS or tokens // 2 * token_nbytes < MIN_BLOCK_NBYTES


def test_block_tokens_overrides() -> None:
    for block_tokens in (1, 7, 256):
        assert uniform(30, 3, 64, block_tokens=block_tokens).block_tokens == block_tokens


def test_fingerprints_differ_by_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"identity": replace(IDENTITY, namespace=b"other")},
        {"identity": replace(IDENTITY, weights="cd" * 32)},
        {"groups": (LayerGroup(3, 3, 8, 8),)},
        {"groups": (LayerGroup(2, 2, 8, 8),)},
        {"groups": (LayerGroup(2, 3, 9, 8),)},
        {"groups": (LayerGroup(2, 3, 8, 9),)},
        {"groups": (LayerGroup(2, 3, 16, 0),)},  # of the same size
        {"groups": (LayerGroup(1, 3, 8, 8), LayerGroup(1, 3, 8, 8))},  # also
        {"groups": (LayerGroup(2, 3, 8, 8), LayerGroup(1, 1, 8, 8))},
        {"groups": (LayerGroup(1, 1, 8, 8), LayerGroup(2, 3, 8, 8))},
        {"dtype": "float16"},
        {"block_tokens": 32},
        {"num_shards": 2},
        {"dtype": "float32", "groups": (LayerGroup(1, 3, 8, 8),)},
    ]
    layouts = [replace(BASE, **change) for change in changes]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert all(len(layout.fingerprint) == 32 for layout in layouts)


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert uniform(2, 3, 8, block_tokens=16).fingerprint == BASE.fingerprint
    assert uniform(32, 1, 128).fingerprint == uniform(32, 1, 128, block_tokens=16).fingerprint


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "float64"}, {"groups": ()}, {"num_shards": 0}, {"block_tokens": -1}],
    ids=str,
)
def test_wrong_layouts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        replace(BASE, **wrong)


@pytest.mark.parametrize("shape", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, -1)])
def test_wrong_groups_are_refused(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(LayoutError):
        LayerGroup(*shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_lie_where_the_contract_says(dtype: str) -> None:
    """Layer by layer, keys before values, heads before tokens: checked against offsets computed here."""
    groups = (LayerGroup(2, 3, 8, 8), LayerGroup(1, 2, 6, 4), LayerGroup(2, 1, 5, 0))
    layout = KVLayout(IDENTITY, groups, dtype, 4)
    size = DTYPES[dtype][1]
    assert layout.num_layers == 5
    assert layout.token_nbytes == (2 * 3 * 16 + 1 * 2 * 10 + 2 * 1 * 5) * size
    assert layout.block_nbytes == 4 * layout.token_nbytes
    block = bytearray(np.random.default_rng(0).bytes(layout.block_nbytes))
    flat = np.frombuffer(block, layout.np_dtype)
    at = 0
    layers = list(layout.layers(block))
    assert len(layers) == layout.num_layers
    dims = [(3, 8, 8), (3, 8, 8), (2, 6, 4), (1, 5, 0), (1, 5, 0)]
    for (keys, values), (heads, k_dim, v_dim) in zip(layers, dims, strict=True):
        assert keys.shape == (heads, 4, k_dim)
        assert values.shape == (heads, 4, v_dim)
        for array, dim in ((keys, k_dim), (values, v_dim)):
            for head in range(heads):
                for token in range(4):
                    assert array[head, token].tobytes() == flat[at : at + dim].tobytes()
                    at += dim
            assert array.size == 0 or np.shares_memory(array, flat), "a copy, not a view"
    assert at == flat.size
    first, second, third = layout.arrays(block)
    assert (first.shape, second.shape, third.shape) == ((2, 2, 3, 4, 8), (1, 80), (2, 20))
    assert first[1, 0].tobytes() == layers[1][0].tobytes()
    assert first[1, 1].tobytes() == layers[1][1].tobytes()


def test_views_of_writable_memory_write_through() -> None:
    block = bytearray(BASE.block_nbytes)
    for keys, values in BASE.layers(block):
        keys[:] = 1
        values[:] = 2
    assert set(block) == {0, 1, 2}
    (view,) = BASE.arrays(bytes(block))
    assert not view.flags.writeable


@pytest.mark.parametrize("difference", [-2, 2, -BASE.block_nbytes])
def test_a_block_of_another_size_is_refused(difference: int) -> None:
    with pytest.raises(LayoutError, match=str(BASE.block_nbytes)):
        BASE.arrays(bytes(BASE.block_nbytes + difference))


def test_a_block_of_half_a_value_is_refused() -> None:
    with pytest.raises(LayoutError):
        BASE.arrays(bytes(BASE.block_nbytes + 1))
