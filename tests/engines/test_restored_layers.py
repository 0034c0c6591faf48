"""A restored prompt grows in its own memory: with the same values, and never into what somebody else holds."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import greedy, llama, prompt
from transformers.cache_utils import DynamicLayer

import kvkeep
from kvkeep.engines.transformers import attach
from kvkeep.engines.transformers.attachment import ROOM
from kvkeep.engines.transformers.staging import STAGING_KEPT, RestoredLayer, Staging, _Region


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def cache() -> Iterator[Any]:
    with kvkeep.open(None, memory="64MiB", disk=0, block_tokens=16) as opened:
        yield opened


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def pair(length: int = 5, room: int = 20) -> tuple[RestoredLayer, DynamicLayer]:
    """A restored layer and Transformers' own with the same content."""
    keys, values = torch.zeros(2, 3, room, 4), torch.zeros(2, 3, room, 4)
    keys[:, :, :length], values[:, :, :length] = tokens(length, 1), tokens(length, 2)
    plain = DynamicLayer()  # type: ignore[no-untyped-call]
    plain.update(tokens(length, 1), tokens(length, 2))
    return RestoredLayer(keys, values, length), plain


def assert_equal(one: Any, other: Any) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("steps", [[1], [3, 1, 1], [15], [16], [14, 1, 1, 1], [40]])
def test_it_holds_what_transformers_own_layer_holds(steps: list[int]) -> None:
    restored, plain = pair()
    for seed, count in enumerate(steps, 10):
        new = tokens(count, seed), tokens(count, seed + 100)
        for got, want in zip(restored.update(*new), plain.update(*new), strict=True):
            assert torch.equal(got, want)
        assert_equal(restored, plain)


def test_it_does_not_move_while_there_is_room() -> None:
    restored, _ = pair()
    before = restored.keys.data_ptr()  # type: ignore[union-attr]
    restored.update(tokens(15), tokens(15))
    assert restored.keys.data_ptr() == before  # type: ignore[union-attr]
    restored.update(tokens(1), tokens(1))
    assert restored.keys.data_ptr() != before  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"]
)
def test_after_any_other_change_nothing_is_written_in_place(change: str) -> None:
    restored, plain = pair()
    restored.update(tokens(3, 3), tokens(3, 4))
    plain.update(tokens(3, 3), tokens(3, 4))
    held = restored.keys, restored.values
    copies = [part.clone() for part in held if part is not None]
    argument = {"crop": -2, "batch_repeat_interleave": 1, "reset": None}.get(change, torch.tensor([1, 0]))
    for layer in (restored, plain):
        getattr(layer, change)(*([] if argument is None else [argument]))
        layer.update(tokens(2, 5), tokens(2, 6))
        layer.update(tokens(1, 7), tokens(1, 8))
    assert_equal(restored, plain)
    for part, want in zip(held, copies, strict=True):
        assert part is not None
        assert torch.equal(part, want)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_transformers_own_layer_and_grows_apart(how: Any) -> None:
    restored, plain = pair()
    twin = how(restored)
    assert type(twin) is DynamicLayer
    assert_equal(twin, plain)
    twin.update(tokens(2, 3), tokens(2, 4))
    restored.update(tokens(2, 5), tokens(2, 6))
    other = copy.deepcopy(plain)
    plain.update(tokens(2, 3), tokens(2, 4))
    other.update(tokens(2, 5), tokens(2, 6))
    assert_equal(twin, plain)
    assert_equal(restored, other)


def test_with_gradients_it_copies() -> None:
    restored, plain = pair()
    new = tokens(2, 3).requires_grad_(), tokens(2, 4).requires_grad_()
    with torch.enable_grad():
        restored.update(*new)
        plain.update(*new)
    assert_equal(restored, plain)
    assert restored.keys is not None
    assert restored.keys.requires_grad


def test_made_in_inference_mode_and_used_outside() -> None:
    with torch.inference_mode():
        restored, plain = pair()
    restored.update(tokens(2, 3), tokens(2, 4))
    plain.update(tokens(2, 3), tokens(2, 4))
    assert_equal(restored, plain)


def test_decoding_past_the_room(cache: Any) -> None:
    model = llama()
    ids = prompt(50)
    expected = greedy(model, ids, new=ROOM + 40)
    attach(model, cache)
    for _ in range(2):
        assert torch.equal(greedy(model, ids, new=ROOM + 40), expected)


def test_a_past_that_the_caller_holds_is_not_written_over(cache: Any) -> None:
    model = attach(llama(), cache)

    def answer(seed: int) -> Any:
        ids = prompt(100, seed=seed)
        return model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True).past_key_values

    for seed in (1, 2):
        answer(seed)
    held = answer(1)
    assert type(held.layers[0]) is RestoredLayer
    before = [(layer.keys.clone(), layer.values.clone()) for layer in held.layers]
    answer(2)
    for layer, (keys, values) in zip(held.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_memory_comes_back_when_no_tensor_lies_in_it() -> None:
    staging = Staging()
    first = staging.borrow(1 << 20)
    address = first.ctypes.data
    tensor = torch.from_numpy(first).view(torch.bfloat16)[100:]
    del first
    gc.collect()
    assert staging.borrow(1 << 20).ctypes.data != address  # still in use
    del tensor
    assert staging.borrow(1 << 20).ctypes.data == address
    assert staging.borrow(1 << 10).nbytes == 1 << 10


def test_no_more_is_kept_than_allowed() -> None:
    staging = Staging()
    large = staging.borrow(STAGING_KEPT + 1)  # never touched
    assert isinstance(large, np.ndarray)
    del large
    assert not staging._kept


def test_a_system_without_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert Staging().borrow(32 << 20).nbytes == 32 << 20


def test_memory_is_touched_before_anybody_asks() -> None:
    staging = Staging()
    staging.prepare(40 << 20)
    region = staging._kept[0]
    deadline = time.monotonic() + 20
    while region.touched < 40 << 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lent = staging.borrow(30 << 20)
    assert lent.ctypes.data == np.frombuffer(region.memory, np.uint8).ctypes.data
    assert staging.borrow(30 << 20).ctypes.data != lent.ctypes.data  # still in use


def test_touching_ahead_ends_when_the_memory_is_too_small() -> None:
    staging = Staging()
    staging.prepare(1 << 20)
    region = staging._kept[0]
    staging.borrow(2 << 20)
    assert region.lent


def test_touching_ahead_ends_when_the_memory_is_lent() -> None:
    region = _Region(64 << 20)
    region.lent = True
    region.touch_all()
    assert region.touched == 0


def test_an_attached_model_has_memory_for_what_a_restart_finds(tmp_path: Path) -> None:
    ids = prompt(100)
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB", block_tokens=16) as cache:
        model = attach(llama(), cache)
        assert not attachment_of(model)._staging._kept
        expected = greedy(model, ids)
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB", block_tokens=16) as cache:
        model = attach(llama(), cache)
        (region,) = attachment_of(model)._staging._kept
        assert torch.equal(greedy(model, ids), expected)
        assert region.lent


def attachment_of(model: Any) -> Any:
    return model.generate._attachment
