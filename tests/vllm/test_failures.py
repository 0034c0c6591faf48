"""Whatever happens to the store, answers stay right: what does not load is computed, what is not saved is counted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, Engine, prompt

PAGE = 32
SHARED = prompt(230, seed=1)
KNOWN = [SHARED[: 90 + 20 * n] + prompt(40 + n, seed=60 + n) for n in range(8)]
PROMPTS = [each + prompt(50, seed=70 + n) for n, each in enumerate(KNOWN)]
"""Longer than what is stored: what is computed after a load fills blocks of its own, which are saved."""


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    return models("gqa")


@pytest.fixture(scope="module")
def reference(model: Path) -> list[tuple[int, ...]]:
    return texts(Engine(model, block_size=PAGE).ask_each(PROMPTS))


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the beginnings of the prompts."""
    directory = tmp_path_factory.mktemp("filled")
    engine = serve(model, directory)
    engine.ask_each(KNOWN)
    engine.stop()
    return directory


def serve(model: Path, directory: Path, **options: Any) -> Engine:
    extra = {"dir": str(directory), "memory": "16MiB", "disk": "64MiB", "block_tokens": 16, **options}
    return Engine(model, extra, block_size=PAGE)


def texts(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def damage(directory: Path, every: int) -> None:
    """Flip one byte in each ``every`` bytes of the data."""
    for slab in directory.glob("slab-*.data"):
        data = bytearray(slab.read_bytes())
        for at in range(every // 2, len(data), every):
            data[at] ^= 0xFF
        with slab.open("r+b") as file:
            file.write(data)


@pytest.mark.parametrize(
    ("every", "background"),
    [(20_000, False), (1_500_000, False), (1_500_000, True)],
    ids=["all blocks", "some blocks", "some blocks, in the background"],
)
def test_damaged_blocks(
    every: int, background: bool, model: Path, filled: Path, tmp_path: Path, reference: list[tuple[int, ...]]
) -> None:
    directory = tmp_path / "kv"
    shutil.copytree(filled, directory)
    damage(directory, every)
    engine = serve(model, directory, async_load=background)
    assert texts(engine.ask(PROMPTS)) == reference
    assert engine.count("corrupt") > 0
    engine.forget()
    assert texts(engine.ask(PROMPTS)) == reference
    damaged = engine.count("corrupt")
    engine.forget()
    again = engine.ask_each(PROMPTS)  # by now all is whole, and none of what was computed from damage was kept
    assert texts(again) == reference
    assert engine.count("corrupt") == damaged
    assert all(answer.cached >= (len(each) - 1) // 16 * 16 for answer, each in zip(again, PROMPTS, strict=True))
    engine.stop()
    assert texts(serve(model, directory).ask_each(PROMPTS)) == reference


def test_a_disk_that_cannot_be_read(
    model: Path, filled: Path, tmp_path: Path, reference: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "kv"
    shutil.copytree(filled, directory)
    engine = serve(model, directory)

    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert texts(engine.ask(PROMPTS)) == reference
    assert engine.count("store_error") > 0


def test_the_directory_is_removed(model: Path, filled: Path, tmp_path: Path, reference: list[tuple[int, ...]]) -> None:
    directory = tmp_path / "kv"
    shutil.copytree(filled, directory)
    engine = serve(model, directory)
    assert texts(engine.ask(PROMPTS[:3])) == reference[:3]
    shutil.rmtree(directory)
    for _ in range(2):
        engine.forget()
        assert texts(engine.ask(PROMPTS)) == reference


def test_a_full_disk(
    model: Path, tmp_path: Path, reference: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    engine = serve(model, tmp_path)
    assert texts(engine.ask(PROMPTS)) == reference
    engine.cache.flush()
    assert engine.count("dropped", tier="disk") > 0
    engine.forget()
    assert texts(engine.ask(PROMPTS)) == reference  # from memory
    assert engine.count("load", tier="memory") > 0


def test_a_store_that_is_too_small(model: Path, tmp_path: Path, reference: list[tuple[int, ...]]) -> None:
    engine = serve(model, tmp_path, memory="300KiB", disk="600KiB")
    for _ in range(2):
        assert texts(engine.ask(PROMPTS)) == reference
        engine.forget()
    assert engine.count("evict") > 0


def test_other_weights_under_the_same_path(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("gqa"), folder)
    engine = serve(folder, tmp_path / "kv")
    first = engine.ask(PROMPTS[:1])
    engine.stop()
    shutil.copy(models("gqa-2") / "model.safetensors", folder)
    engine = serve(folder, tmp_path / "kv")
    second = engine.ask(PROMPTS[:1])
    assert engine.count("load") == 0
    assert second[0].tokens != first[0].tokens
    shutil.copy(models("gqa") / "model.safetensors", folder)
    engine = serve(folder, tmp_path / "kv")
    assert texts(engine.ask(PROMPTS[:1])) == texts(first)
    assert engine.count("load") > 0


def test_weights_that_were_changed_in_place(model: Path, filled: Path, reference: list[tuple[int, ...]]) -> None:
    """``reset_prefix_cache(reset_connector=True)`` is what one calls then: nothing old is found, new is."""
    engine = serve(model, filled)
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    for cached in (False, True):
        (answer,) = engine.ask(PROMPTS[-1:])
        assert (answer.tokens, answer.cached > 0) == (reference[-1], cached)
        assert (engine.count("load") > 0) == cached
        engine.forget()
    engine.stop()
    assert serve(model, filled).ask(PROMPTS[-1:])[0].cached > 0  # the files' own
