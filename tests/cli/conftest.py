"""A directory with two models' blocks in it."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvkeep

TOKENS = list(range(64))


class Pattern:
    """A source whose block ``index`` is filled with ``index + 1``."""

    def read(self, index: int, out: memoryview) -> None:
        out[:] = bytes([index + 1]) * len(out)


def layout(weights: str) -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights=weights, kv_dtype="float32")
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Four blocks of model ``one``, two of model ``two``; nobody holds them."""
    path = tmp_path / "kept"
    with kvkeep.open(path, memory="4MiB", disk="16MiB", codec="raw") as cache:
        for name, tokens in (("one", TOKENS), ("two", TOKENS[:32])):
            assert cache.bind(layout(name), description=name).save(tokens, Pattern()) == len(tokens) // 16
        assert cache.flush(10)
    return path
