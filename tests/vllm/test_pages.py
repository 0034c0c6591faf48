"""Copies between pages and blocks where this machine has no engine for them: packed pages, and another device's."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvkeep.buffers import PAGE as SYSTEM_PAGE
from kvkeep.buffers import anonymous, populate
from kvkeep.engines.vllm.pages import Ahead, DevicePages, Pages
from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import KVLayout

HEADS, DIM, PAGE, BLOCK = 2, 8, 32, 16
IDS = [5, 2, 7, 3, 1]  # a request's pages, in order
TOKENS = PAGE * len(IDS)


class Packed:
    """A kernel that packs pairs of a key's dimensions, as those for AMX do: ``[dim / 2, tokens, 2]``."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        heads, tokens, width = cache.shape[1:]
        dim = width // 2
        flat = cache.view(-1, heads, 2, tokens * dim)
        for row, slot in enumerate(slots.tolist()):
            page, token = divmod(slot, tokens)
            for head in range(heads):
                flat[page, head, 0].view(dim // 2, tokens, 2)[:, token] = key[row, head].view(dim // 2, 2)
                flat[page, head, 1].view(tokens, dim)[token] = value[row, head]


class Strange:
    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache[...] = 1.0


def layout_of(pages: Pages) -> KVLayout:
    return KVLayout(ModelIdentity("w", "float32"), pages.groups, pages.dtype, block_tokens=BLOCK)


def random_kv() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[layers, tokens, heads, dim]``."""
    torch.manual_seed(1)
    return torch.randn(3, TOKENS, HEADS, DIM), torch.randn(3, TOKENS, HEADS, DIM)


def check(pages: Pages, empty: Pages, caches: dict[str, torch.Tensor], fresh: dict[str, torch.Tensor]) -> None:
    """``caches`` hold :func:`random_kv` at IDS: blocks of it have the layout's form, and come back as they were."""
    keys, values = random_kv()
    layout = layout_of(pages)
    source = pages.blocks(layout, 0, (0, TOKENS), 0, IDS)
    blocks = []
    for index in range(TOKENS // BLOCK):
        data = memoryview(bytearray(layout.block_nbytes))
        source.read(index, data)
        here = slice(index * BLOCK, (index + 1) * BLOCK)
        for layer, (k, v) in enumerate(layout.layers(data)):
            assert np.array_equal(k, keys[layer, here].transpose(0, 1).numpy())
            assert np.array_equal(v, values[layer, here].transpose(0, 1).numpy())
        blocks.append(data)
    low, high = PAGE + 4, TOKENS - 3  # begins and ends inside pages and blocks
    sink = empty.blocks(layout, low // BLOCK, (low, high), 1, IDS[1:])
    for index, data in enumerate(blocks[low // BLOCK :]):
        sink.write(index, data)
    sink.flush()
    again = empty.blocks(layout, 0, (0, TOKENS), 0, IDS)
    for index, data in enumerate(blocks):
        found = memoryview(bytearray(layout.block_nbytes))
        again.read(index, found)
        inside = [low <= token < high for token in range(index * BLOCK, (index + 1) * BLOCK)]
        for (k, v), (got_k, got_v) in zip(layout.layers(data), layout.layers(found), strict=True):
            assert np.array_equal(np.where(np.array(inside)[:, None], k, 0), got_k)
            assert np.array_equal(np.where(np.array(inside)[:, None], v, 0), got_v)
    untouched = sorted(set(range(8)) - set(IDS))
    assert all(not cache[untouched].any() for cache in fresh.values())


def test_packed_pages() -> None:
    layers = {str(n): SimpleNamespace(impl=Packed(), num_kv_heads=HEADS) for n in range(3)}
    full, fresh = (dict(zip(layers, torch.zeros(3, 8, HEADS, PAGE, 2 * DIM), strict=True)) for _ in range(2))
    keys, values = random_kv()
    slots = torch.tensor([page * PAGE + token for page in IDS for token in range(PAGE)])
    for layer, cache in enumerate(full.values()):
        Packed().do_kv_cache_update(None, keys[layer], values[layer], cache, slots)
    check(Pages(list(layers), layers, full), Pages(list(layers), layers, fresh), full, fresh)


def test_pages_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator, on the CPU: rows of key and value, tokens outside heads, a small window."""
    monkeypatch.setattr(DevicePages, "WINDOW", 2)
    layers = {str(n): SimpleNamespace(impl=None, head_size=DIM, head_size_v=DIM) for n in range(3)}

    def empty() -> dict[str, torch.Tensor]:
        return {name: torch.zeros(8, PAGE, HEADS, 2 * DIM).transpose(1, 2) for name in layers}

    full, fresh = empty(), empty()
    keys, values = random_kv()
    for layer, cache in enumerate(full.values()):
        rows = torch.cat([keys[layer], values[layer]], dim=-1).view(len(IDS), PAGE, HEADS, 2 * DIM)
        cache[IDS] = rows.transpose(1, 2)
    check(DevicePages(list(layers), layers, full), DevicePages(list(layers), layers, fresh), full, fresh)


def test_pages_that_are_not_understood() -> None:
    layers = {"0": SimpleNamespace(impl=Strange(), num_kv_heads=HEADS)}
    with pytest.raises(ConfigError, match="does not read"):
        Pages(["0"], layers, {"0": torch.zeros(4, HEADS, PAGE, 2 * DIM)})


def touched(cache: torch.Tensor) -> list[bool]:
    """Of each page of vLLM's, whether the system has given its last byte any memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = ctypes.c_ubyte()
    found = []
    for page in cache:
        address = page.data_ptr() + page.nbytes - 1
        here = ctypes.c_void_p(address - address % SYSTEM_PAGE)
        assert libc.mincore(here, ctypes.c_size_t(1), ctypes.byref(state)) == 0
        found.append(bool(state.value & 1))
    return found


def test_pages_are_touched_ahead_of_use_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    if not populate(anonymous(SYSTEM_PAGE), 0, SYSTEM_PAGE):
        pytest.skip("this kernel does not touch memory on demand")
    width = 1 << 20  # values a token: a page is several huge pages, so that it shares few with others
    shape = (8, 1, 2, width)
    size = 8 * 2 * width * 4
    # The first layer begins in the middle of a system page, as an allocator's memory may.
    memory = [anonymous(size + SYSTEM_PAGE)[start : start + size] for start in (64, 0)]
    caches = {
        name: torch.frombuffer(each, dtype=torch.float32).view(shape) for name, each in zip("ab", memory, strict=True)
    }
    caches["a"][0, 0, 0, :4] = torch.arange(4.0)
    layers = {name: SimpleNamespace(head_size=width // 2, impl=None) for name in caches}
    pages = DevicePages(list(layers), layers, caches)
    assert (pages.num_pages, pages.page_nbytes) == (8, 2 * 2 * width * 4)
    monkeypatch.setattr(Ahead, "NBYTES", 3 * pages.page_nbytes)
    ahead = Ahead(pages, lambda: None)
    ahead._thread.submit(int).result()
    assert touched(caches["b"])[:7] == [True] * 3 + [False] * 4  # the last one may share with the other layer
    ahead.reach([1, 3])
    ahead._thread.submit(int).result()
    assert touched(caches["a"])[:6] == [True] * 6
    assert touched(caches["b"])[:7] == [True] * 6 + [False]
    ahead.reach([7, 0])
    ahead._thread.submit(int).result()
    ahead.close()
    for cache in caches.values():
        assert all(touched(cache))
    assert caches["a"][0, 0, 0, :5].tolist() == [0, 1, 2, 3, 0]
    assert caches["a"].sum() == 6
    assert not caches["b"].any()
