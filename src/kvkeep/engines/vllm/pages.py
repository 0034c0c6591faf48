"""vLLM's paged KV memory: where a token's keys and values lie, and copies between there and blocks.

A layer is a tensor ``[pages, heads, tokens a page, width]``. On an accelerator a token's row holds its key, then its
value. On the CPU the inside of a page depends on the instruction set (keys transposed, or packed for AMX), so it is
found out: vLLM's own kernel writes numbered values into a spare page, and where they end up is where they are. Blocks
hold the values in the order of :mod:`kvkeep.layout`, whatever the engine's, so processors and page sizes share a store.

Layers that lie at equal distances are one array ``[layers, pages, heads, tokens, dim]`` here, so that a copy is one
call for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.errors import ConfigError
from kvkeep.layout import DTYPES, KVLayout, LayerGroup

Array = npt.NDArray[Any]

_ONE = {"bfloat16": 0x3F80, "float16": 0x3C00, "float32": 0x3F800000}
"""The bits of 1.0: numbers counted from here are ordinary values, which no kernel flushes to zero."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where token ``t``, dimension ``d`` of a head's keys (or values) lies in its page: ``[tokens, dim]`` offsets."""

    keys: Array
    values: Array | None


class Stack:
    """Like layers at equal distances: keys and values by page, as views of the engine's memory."""

    def __init__(self, flat: Array, places: Places) -> None:
        """``flat``: ``[layers, pages, heads, values of a page]``."""
        self.num_layers, self.num_pages, self.heads, _ = flat.shape
        self.tokens = len(places.keys)
        self.dims = (places.keys.shape[1], 0 if places.values is None else places.values.shape[1])
        self._parts = [_Part(flat, each) for each in (places.keys, places.values) if each is not None]

    def read(self, page: int, start: int, count: int, outs: Sequence[Array], at: int) -> None:
        """Copy ``count`` tokens of ``page`` from token ``start`` to token ``at`` of ``outs`` ``[layers, heads, …]``."""
        for part, out in zip(self._parts, outs, strict=True):
            part.read(page, start, count, out[:, :, at : at + count])

    def write(self, page: int, start: int, count: int, blocks: Sequence[Array], at: int) -> None:
        """The other way round."""
        for part, block in zip(self._parts, blocks, strict=True):
            part.write(page, start, count, block[:, :, at : at + count])


class _Part:
    """Keys, or values. A view ``[layers, pages, heads, tokens, dim]`` where strides can say it, else by offsets."""

    def __init__(self, flat: Array, offsets: Array) -> None:
        self._flat = flat
        self._offsets = offsets
        tokens, dim = offsets.shape
        base = int(offsets[0, 0])
        steps = (int(offsets[1, 0]) - base if tokens > 1 else 0, int(offsets[0, 1]) - base if dim > 1 else 0)
        affine = base + steps[0] * np.arange(tokens)[:, None] + steps[1] * np.arange(dim)[None, :]
        self._view: Array | None = None
        if np.array_equal(affine, offsets):
            size = flat.strides[3]
            self._view = np.lib.stride_tricks.as_strided(
                flat[..., base:],
                shape=(*flat.shape[:3], tokens, dim),
                strides=(*flat.strides[:3], steps[0] * size, steps[1] * size),
            )

    def read(self, page: int, start: int, count: int, out: Array) -> None:
        if self._view is not None:
            out[...] = self._view[:, page, :, start : start + count]
        else:
            out[...] = self._flat[:, page][:, :, self._offsets[start : start + count]]

    def write(self, page: int, start: int, count: int, block: Array) -> None:
        if self._view is not None:
            self._view[:, page, :, start : start + count] = block
        else:
            self._flat[:, page][:, :, self._offsets[start : start + count]] = block


class Pages:
    """All layers of a rank. ``layers``: name → vLLM's attention layer, ``caches``: name → its tensor."""

    def __init__(self, names: Sequence[str], layers: dict[str, Any], caches: dict[str, torch.Tensor]) -> None:
        self._keep_alive = caches
        places: dict[tuple[Any, ...], Places] = {}
        flats: list[Array] = []
        found: list[Places] = []
        seen: set[int] = set()
        for name in names:
            cache, layer = caches[name], layers[name]
            if cache.data_ptr() in seen:
                continue  # a layer that shares another one's cache
            seen.add(cache.data_ptr())
            kind = (type(layer.impl), getattr(layer, "isa", ""), cache.shape[1:], cache.dtype)
            if kind not in places:
                places[kind] = _places(name, layer, cache)
            found.append(places[kind])
            flats.append(_flat(name, cache))
        self.dtype = str(caches[names[0]].dtype).removeprefix("torch.")
        self.page_tokens = int(caches[names[0]].shape[2])
        groups: list[LayerGroup] = []
        self.stacks: list[tuple[int, int, Stack]] = []  # group, its first layer in the group
        for stack in (Stack(flat, each) for flat, each in _stacked(flats, found)):
            like = LayerGroup(stack.num_layers, stack.heads, *stack.dims)
            last = groups[-1] if groups else None
            if last is not None and replace(last, num_layers=like.num_layers) == like:
                groups[-1] = replace(last, num_layers=last.num_layers + like.num_layers)
            else:
                groups.append(like)
            self.stacks.append((len(groups) - 1, groups[-1].num_layers - like.num_layers, stack))
        self.groups = tuple(groups)

    def blocks(self, layout: KVLayout, first: int, tokens: tuple[int, int], base: int, ids: Sequence[int]) -> Blocks:
        """A source and sink for ``tokens`` (first, end) of a request. ``first``: the block at which a sink begins;
        ``ids``: the request's engine blocks from number ``base`` on."""
        return Blocks(self, layout, first, tokens, base, ids)


class Blocks:
    """A :class:`kvkeep.cache.KVSource` (indices count from the prompt's start) and
    :class:`~kvkeep.cache.KVSink` (indices count from ``first``). Tokens outside of ``tokens`` are not touched."""

    def __init__(
        self, pages: Pages, layout: KVLayout, first: int, tokens: tuple[int, int], base: int, ids: Sequence[int]
    ) -> None:
        self._pages, self._layout = pages, layout
        self._first, self._tokens, self._base, self._ids = first, tokens, base, ids

    def read(self, index: int, out: memoryview) -> None:
        arrays = self._arrays(out)
        for page, start, count, at in self._runs(index):
            for (_, _, stack), outs in zip(self._pages.stacks, arrays, strict=True):
                stack.read(page, start, count, outs, at)

    def write(self, index: int, payload: memoryview) -> None:
        arrays = self._arrays(payload)
        for page, start, count, at in self._runs(self._first + index):
            for (_, _, stack), blocks in zip(self._pages.stacks, arrays, strict=True):
                stack.write(page, start, count, blocks, at)

    def _arrays(self, data: memoryview) -> list[list[Array]]:
        """Of each stack, the block's keys and values ``[layers, heads, tokens, dim]``."""
        flat = np.frombuffer(data, dtype=self._layout.np_dtype)
        tokens = self._layout.block_tokens
        groups: list[list[Array]] = []
        at = 0
        for group in self._layout.groups:
            size = group.values_per_token * tokens
            rows = flat[at : at + size].reshape(group.num_layers, -1)
            at += size
            split = group.num_kv_heads * tokens * group.k_dim
            shape = (group.num_layers, group.num_kv_heads, tokens)
            parts = [rows[:, :split].reshape(*shape, group.k_dim)]
            if group.v_dim:
                parts.append(rows[:, split:].reshape(*shape, group.v_dim))
            groups.append(parts)
        return [
            [part[layer : layer + stack.num_layers] for part in groups[group]]
            for group, layer, stack in self._pages.stacks
        ]

    def _runs(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """Page, first token in it, tokens, first token in the block."""
        size, width = self._layout.block_tokens, self._pages.page_tokens
        low, high = self._tokens
        token, end = max(index * size, low), min((index + 1) * size, high)
        while token < end:
            start = token % width
            count = min(width - start, end - token)
            yield self._ids[token // width - self._base], start, count, token - index * size
            token += count


def _flat(name: str, cache: torch.Tensor) -> Array:
    """``[pages, heads, values of a page]`` in the bits' type, a view."""
    pages, heads, tokens, width = cache.shape
    if cache.device.type != "cpu":
        raise ConfigError(f"{name}: its cache lies on {cache.device}; only the CPU's memory is served so far")
    if cache.stride(3) != 1 or cache.stride(2) != width or (heads > 1 and cache.stride(1) != tokens * width):
        raise ConfigError(f"{name}: its cache has strides {cache.stride()}, so a page is not in one piece")
    dtype = str(cache.dtype).removeprefix("torch.")
    if dtype not in _ONE:
        raise ConfigError(f"{name}: a KV cache of {dtype} is not served, only {', '.join(_ONE)}")
    bits = {2: torch.int16, 4: torch.int32}[cache.element_size()]
    return np.asarray(cache.view(bits).numpy()).view(DTYPES[dtype][0]).reshape(pages, heads, tokens * width)


def _stacked(flats: list[Array], places: list[Places]) -> list[tuple[Array, Places]]:
    """Runs of like layers at equal distances as one array each, ``[layers, pages, heads, values]``."""
    runs: list[tuple[Array, Places]] = []
    at = 0
    while at < len(flats):
        first = flats[at]
        address = first.__array_interface__["data"][0]
        end, step = at + 1, 0
        while end < len(flats) and flats[end].shape == first.shape and places[end] is places[at]:
            distance = flats[end].__array_interface__["data"][0] - address
            step = step or distance
            if distance != step * (end - at) or flats[end].strides != first.strides:
                break
            end += 1
        stacked = np.lib.stride_tricks.as_strided(first, (end - at, *first.shape), (step, *first.strides))
        runs.append((stacked, places[at]))
        at = end
    return runs


def _places(name: str, layer: Any, cache: torch.Tensor) -> Places:
    """Ask the layer's own kernel: write token numbers, then dimension numbers, into a page of its own."""
    _, heads, tokens, width = cache.shape
    mla = not hasattr(layer, "num_kv_heads") or hasattr(layer, "kv_lora_rank")
    by_token = _written(layer, cache, heads, tokens, width, mla, lambda t, d: t)
    by_dim = _written(layer, cache, heads, tokens, width, mla, lambda t, d: d)
    # Keys carry odd numbers, values even ones: 2 × number + (key: 1).
    size = tokens * width
    dim = width if mla else width // 2
    parts = []
    for kind in (1,) if mla else (1, 0):
        mine = (by_token >= 0) & (by_token % 2 == kind)
        offsets = np.full((tokens, dim), -1)
        at = np.flatnonzero(mine)
        if len(at) == tokens * dim:
            offsets[by_token[at] // 2, by_dim[at] // 2] = at
        if (offsets < 0).any() or len(at) * (1 if mla else 2) != size:
            raise ConfigError(
                f"{name}: {type(layer.impl).__name__} keeps its pages in a form that kvkeep does not read"
            )
        parts.append(offsets)
    return Places(parts[0], None if mla else parts[1])


def _written(
    layer: Any, cache: torch.Tensor, heads: int, tokens: int, width: int, mla: bool, number: Any
) -> npt.NDArray[np.int64]:
    """What a page's first head holds after the kernel wrote 2 × number(token, dim) + (key: 1) everywhere; else -1."""
    dtype = str(cache.dtype).removeprefix("torch.")
    one = _ONE[dtype]
    bits = {2: torch.int16, 4: torch.int32}[cache.element_size()]
    page = torch.zeros((1, heads, tokens, width), dtype=cache.dtype)
    slots = torch.arange(tokens)

    def rows(dim: int, begin: int, odd: int) -> torch.Tensor:
        values = [[one + 2 * number(t, begin + d) + odd for d in range(dim)] for t in range(tokens)]
        return torch.tensor(values, dtype=bits).view(cache.dtype)[:, None, :].expand(tokens, heads, dim).contiguous()

    if mla:
        rank = layer.kv_lora_rank
        page_in = page.view(1, tokens, width)  # H is 1
        scale = torch.ones(1)
        layer.impl.do_kv_cache_update(
            rows(rank, 0, 1)[:, 0], rows(width - rank, rank, 1), page_in, slots, layer.kv_cache_dtype, scale
        )
    else:
        layer.impl.do_kv_cache_update(layer, rows(width // 2, 0, 1), rows(width // 2, 0, 0), page, slots)
    held = np.asarray(page.view(bits).numpy()).reshape(heads, tokens * width)[0].astype(np.int64) - one
    return np.where((held >= 0) & (held < 4 * max(tokens, width)), held, -1)
