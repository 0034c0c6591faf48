"""What a block's bytes mean.

A block holds ``block_tokens`` tokens of every layer, head-major: for each layer its keys ``[heads, tokens, k_dim]``,
then its values ``[heads, tokens, v_dim]``, C-contiguous, one after the other. Where keys and values are alike that is
one array ``[layers, 2, heads, tokens, dim]``. (Head-major, not token-major: engines keep heads apart, so a block goes
into their tensors in runs of ``tokens × dim`` values, at twice the speed measured for runs of ``dim``.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity, derive

Array = npt.NDArray[Any]

DTYPES: dict[str, tuple[str, int]] = {
    "float32": ("<f4", 4),
    "float16": ("<f2", 2),
    "bfloat16": ("<u2", 2),  # NumPy has no bfloat16: its bits travel as unsigned integers
    "float8_e4m3fn": ("u1", 1),
    "float8_e5m2": ("u1", 1),
    "int8": ("i1", 1),
    "uint8": ("u1", 1),
}
"""dtype name → the NumPy type its bits travel in, and bytes a value."""

MIN_BLOCK_TOKENS = 16
MIN_BLOCK_NBYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """A run of like layers. ``v_dim`` 0: the layers keep one tensor (multi-head latent attention)."""

    num_layers: int
    num_kv_heads: int
    k_dim: int
    v_dim: int

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.k_dim) < 1 or self.v_dim < 0:
            raise LayoutError(f"{self}: layers, heads and k_dim are at least 1, v_dim at least 0")

    @property
    def values_per_token(self) -> int:
        """Values that one token puts into these layers."""
        return self.num_layers * self.num_kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class KVLayout:
    """Identity, shape and type of a block. ``groups`` are this shard's layers, in the model's order.

    ``block_tokens`` defaults to the smallest power of two, at least 16, whose block holds at least 256 KiB:
    recomputing a prompt's tail costs more than loading many blocks. ``num_shards`` is the number of tensor-parallel
    ranks that share the model; each rank's heads are its own blocks, told apart by ``shard`` in the key.
    """

    identity: ModelIdentity
    groups: tuple[LayerGroup, ...]
    dtype: str
    block_tokens: int = 0
    num_shards: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LayoutError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.groups:
            raise LayoutError("a layout needs at least one LayerGroup")
        if self.num_shards < 1 or self.block_tokens < 0:
            raise LayoutError("num_shards is at least 1, block_tokens at least 1 (0 picks the default)")
        if self.block_tokens == 0:
            object.__setattr__(self, "block_tokens", default_block_tokens(self.token_nbytes))

    @classmethod
    def uniform(
        cls,
        identity: ModelIdentity,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        block_tokens: int = 0,
        num_shards: int = 1,
    ) -> KVLayout:
        """A model whose layers are all alike, keys and values of the same ``head_dim``."""
        group = LayerGroup(num_layers, num_kv_heads, head_dim, head_dim)
        return cls(identity, (group,), dtype, block_tokens, num_shards)

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.groups)

    @cached_property
    def token_nbytes(self) -> int:
        """Bytes that one token takes."""
        return sum(group.values_per_token for group in self.groups) * DTYPES[self.dtype][1]

    @cached_property
    def block_nbytes(self) -> int:
        """Bytes of a block's payload before any codec."""
        return self.token_nbytes * self.block_tokens

    @cached_property
    def np_dtype(self) -> np.dtype[Any]:
        """The NumPy type that this layout's bits travel in."""
        return np.dtype(DTYPES[self.dtype][0])

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever identity, shape, type or block size do."""
        shape = [
            f"{group.num_layers},{group.num_kv_heads},{group.k_dim},{group.v_dim}".encode() for group in self.groups
        ]
        head = f"{self.dtype} {self.block_tokens} {self.num_shards}".encode()
        return derive(b"", b"kvkeep layout 1", (self.identity.digest, head, *shape))

    def arrays(self, payload: Buffer) -> list[Array]:
        """Views of a block, one a group: ``[layers, 2, heads, tokens, dim]`` where keys and values are alike,
        else flat ``[layers, heads × tokens × (k_dim + v_dim)]``. Raises :class:`LayoutError` on a wrong size."""
        data = as_bytes(payload)
        if len(data) != self.block_nbytes:
            raise LayoutError(f"a block of this layout has {self.block_nbytes} bytes, not {len(data)}")
        flat = np.frombuffer(data, dtype=self.np_dtype)
        views: list[Array] = []
        start = 0
        for group in self.groups:
            count = group.values_per_token * self.block_tokens
            part = flat[start : start + count]
            start += count
            if group.k_dim == group.v_dim:
                shape = (group.num_layers, 2, group.num_kv_heads, self.block_tokens, group.k_dim)
                views.append(part.reshape(shape))
            else:
                views.append(part.reshape(group.num_layers, -1))
        return views

    def layers(self, payload: Buffer) -> Iterator[tuple[Array, Array]]:
        """Views of each layer's keys ``[heads, tokens, k_dim]`` and values ``[heads, tokens, v_dim]``, in order."""
        for group, view in zip(self.groups, self.arrays(payload), strict=True):
            heads, tokens = group.num_kv_heads, self.block_tokens
            for layer in view.reshape(group.num_layers, -1):
                split = heads * tokens * group.k_dim
                yield (
                    layer[:split].reshape(heads, tokens, group.k_dim),
                    layer[split:].reshape(heads, tokens, group.v_dim),
                )


def default_block_tokens(token_nbytes: int) -> int:
    """The smallest power of two, at least 16, at which a block holds at least 256 KiB."""
    tokens = MIN_BLOCK_TOKENS
    while tokens * token_nbytes < MIN_BLOCK_NBYTES:
        tokens *= 2
    return tokens
