"""A small layout, and blocks whose content follows from their key, so that a wrong byte shows wherever it turns up."""

from __future__ import annotations

import hashlib

import numpy as np

from kvkeep import KVLayout, ModelIdentity, block_keys

LAYOUT = KVLayout.uniform(
    ModelIdentity(weights="test", kv_dtype="float32"),
    num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32", block_tokens=16,
)  # fmt: skip


def content(key: bytes, nbytes: int = LAYOUT.block_nbytes) -> bytes:
    """The only right payload for ``key``."""
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


class Source:
    """Gives each block of ``tokens`` its content, and counts how often it is asked."""

    def __init__(self, tokens: list[int], layout: KVLayout = LAYOUT) -> None:
        self.keys = block_keys(layout, tokens)
        self.asked: list[int] = []

    def read(self, index: int, out: memoryview) -> None:
        self.asked.append(index)
        out[:] = content(self.keys[index], len(out))


class Sink:
    """Collects blocks; :meth:`check` fails on a wrong byte or a gap."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def write(self, index: int, payload: memoryview) -> None:
        assert index == len(self.got), "blocks come in order, without gaps"
        self.got.append(bytes(payload))

    def check(self, tokens: list[int], layout: KVLayout = LAYOUT) -> int:
        for key, payload in zip(block_keys(layout, tokens), self.got, strict=False):
            assert payload == content(key, layout.block_nbytes)
        return len(self.got)
