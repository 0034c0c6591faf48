"""vLLM's paged KV memory: where a token's keys and values lie, and copies between there and blocks.

A layer is a tensor ``[pages, heads, tokens a page, width]``. On an accelerator a token's row holds its key, then its
value. On the CPU the inside of a page depends on the instruction set (keys transposed, or packed for AMX), so it is
found out: vLLM's own kernel writes numbered values into a spare page, and where they end up is where they are. Blocks
hold the values in the order of :mod:`kvkeep.layout`, whatever the engine's, so processors and page sizes share a store.

Layers that lie at equal distances are one array ``[layers, pages, heads, tokens, dim]`` here, so that a copy is one
call for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.buffers import populate_at
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
        self._names, self._caches = _unshared(names, caches)
        places: dict[tuple[Any, ...], Places] = {}
        found: list[Places] = []
        for name, cache in zip(self._names, self._caches, strict=True):
            kind = (type(layers[name].impl), getattr(layers[name], "isa", ""), cache.shape[1:], cache.dtype)
            if kind not in places:
                places[kind] = self._places(name, layers[name], cache)
            found.append(places[kind])
        self._found = found
        self.dtype = str(self._caches[0].dtype).removeprefix("torch.")
        self.page_tokens = int(self._caches[0].shape[2])
        groups: list[LayerGroup] = []
        for cache, each in zip(self._caches, found, strict=True):
            v_dim = 0 if each.values is None else each.values.shape[1]
            like = LayerGroup(1, int(cache.shape[1]), each.keys.shape[1], v_dim)
            if groups and replace(groups[-1], num_layers=1) == like:
                groups[-1] = replace(groups[-1], num_layers=groups[-1].num_layers + 1)
            else:
                groups.append(like)
        self.groups = tuple(groups)
        self._prepare()

    def _places(self, name: str, layer: Any, cache: torch.Tensor) -> Places:
        return _probed(name, layer, cache)

    def _prepare(self) -> None:
        self.stacks = self.stacks_of([_flat(name, each) for name, each in zip(self._names, self._caches, strict=True)])

    @property
    def num_pages(self) -> int:
        return int(self._caches[0].shape[0])

    @property
    def page_nbytes(self) -> int:
        """Of all layers."""
        return sum(cache[0].nbytes for cache in self._caches)

    def touch(self, first: int, end: int) -> None:
        """Have the system provide the memory of these pages, whose content stays as it is, while vLLM goes on."""
        for cache in self._caches:
            nbytes = (end - 1 - first) * cache.stride(0) * cache.element_size() + cache[0].nbytes
            if not populate_at(cache[first].data_ptr(), nbytes):
                return  # a kernel before 5.14: pages come when they are written

    def stacks_of(self, flats: list[Array]) -> list[tuple[int, int, Stack]]:
        """Group, its first layer in the group, and the layers, for all layers' pages."""
        stacks: list[tuple[int, int, Stack]] = []
        group = layer = 0
        for stack in (Stack(flat, each) for flat, each in _stacked(flats, self._found)):
            if layer == self.groups[group].num_layers:
                group, layer = group + 1, 0
            stacks.append((group, layer, stack))
            layer += stack.num_layers
        return stacks

    def blocks(self, layout: KVLayout, first: int, tokens: tuple[int, int], base: int, ids: Sequence[int]) -> Blocks:
        """A source and sink for ``tokens`` (first, end) of a request. ``first``: the block at which a sink begins;
        ``ids``: the request's engine blocks from number ``base`` on."""
        return Blocks(self, layout, first, tokens, base, ids)


class Ahead:
    """Touches pages on the CPU before vLLM first writes into them.

    vLLM's pool is memory that nobody has written yet, and a fresh page costs up to ten times the copy into it: a hit in
    a new server would wait for that. vLLM hands out pages in ascending order at first, so a bounded piece of the pool
    ahead of the highest one in use is enough.
    """

    NBYTES = 512 << 20

    def __init__(self, pages: Pages, unpin: Callable[[], None]) -> None:
        """``unpin``: lets the calling thread run beside those that compute."""
        self._pages = pages
        self._width = max(2, self.NBYTES // pages.page_nbytes)
        self._end = 0
        self._thread = ThreadPoolExecutor(1, "kvkeep-touch", initializer=unpin)
        self.reach([0])

    def reach(self, ids: Sequence[int]) -> None:
        """vLLM uses these pages now."""
        end = min(max(ids, default=0) + self._width, self._pages.num_pages)
        if end - self._end >= self._width // 2 or self._end < end == self._pages.num_pages:
            self._thread.submit(self._pages.touch, self._end, end)
            self._end = end

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class DevicePages(Pages):
    """Pages in an accelerator's memory: they are copied here and back, a window of them at a time."""

    WINDOW = 64

    def _places(self, name: str, layer: Any, cache: torch.Tensor) -> Places:
        """A token's row holds its key, then its value: vLLM's common form ``[pages, heads, tokens, width]``."""
        _, _, tokens, width = cache.shape
        k_dim = width if hasattr(layer, "kv_lora_rank") else layer.head_size
        v_dim = width - k_dim
        if (
            v_dim not in (0, getattr(layer, "head_size_v", k_dim))
            or str(cache.dtype).removeprefix("torch.") not in _ONE
        ):
            raise ConfigError(f"{name}: rows of {width} {cache.dtype} values are not a key and a value of {k_dim}")
        rows = np.arange(tokens)[:, None] * width
        return Places(rows + np.arange(k_dim), rows + np.arange(k_dim, width) if v_dim else None)

    def _prepare(self) -> None:
        pass  # each use has a window of its own

    def blocks(self, layout: KVLayout, first: int, tokens: tuple[int, int], base: int, ids: Sequence[int]) -> Blocks:
        return DeviceBlocks(self, layout, first, tokens, base, ids)

    def window(self) -> tuple[list[torch.Tensor], list[tuple[int, int, Stack]]]:
        """Memory here for some pages of all layers."""
        host = [torch.zeros((self.WINDOW, *cache.shape[1:]), dtype=cache.dtype) for cache in self._caches]
        return host, self.stacks_of([_flat(name, each) for name, each in zip(self._names, host, strict=True)])

    def fetch(self, ids: Sequence[int], host: list[torch.Tensor]) -> None:
        """From the device."""
        for cache, here in zip(self._caches, host, strict=True):
            here[: len(ids)].copy_(cache[torch.tensor(ids, device=cache.device)])

    def push(self, ids: Sequence[int], host: list[torch.Tensor]) -> None:
        """To the device; done when it returns, whichever thread asks."""
        for cache, here in zip(self._caches, host, strict=True):
            cache[torch.tensor(ids, device=cache.device)] = here[: len(ids)].to(cache.device)
        if self._caches[0].device.type != "cpu":
            torch.accelerator.synchronize()


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
        for at_page, start, count, at in self._runs(index):
            page = self._reach(at_page, write=False)
            for (_, _, stack), outs in zip(self._stacks, arrays, strict=True):
                stack.read(page, start, count, outs, at)

    def write(self, index: int, payload: memoryview) -> None:
        arrays = self._arrays(payload)
        for at_page, start, count, at in self._runs(self._first + index):
            page = self._reach(at_page, write=True)
            for (_, _, stack), blocks in zip(self._stacks, arrays, strict=True):
                stack.write(page, start, count, blocks, at)

    def flush(self) -> None:
        """What was written is in the engine's memory when this returns."""

    @property
    def _stacks(self) -> list[tuple[int, int, Stack]]:
        return self._pages.stacks

    def _reach(self, at_page: int, *, write: bool) -> int:
        """The request's page number ``base + at_page``, as the stacks count it."""
        return self._ids[at_page]

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
            [part[layer : layer + stack.num_layers] for part in groups[group]] for group, layer, stack in self._stacks
        ]

    def _runs(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """Place of the page in ``ids``, first token in it, tokens, first token in the block."""
        size, width = self._layout.block_tokens, self._pages.page_tokens
        low, high = self._tokens
        token, end = max(index * size, low), min((index + 1) * size, high)
        while token < end:
            start = token % width
            count = min(width - start, end - token)
            yield token // width - self._base, start, count, token - index * size
            token += count


class DeviceBlocks(Blocks):
    """The same through a window of pages here. Blocks come in order, so each page is copied once."""

    def __init__(
        self, pages: DevicePages, layout: KVLayout, first: int, tokens: tuple[int, int], base: int, ids: Sequence[int]
    ) -> None:
        super().__init__(pages, layout, first, tokens, base, ids)
        self._device = pages
        self._host, self._window = pages.window()
        self._begin = self._end = 0  # of the window, in ids
        self._dirty = False

    def flush(self) -> None:
        if self._dirty:
            self._device.push(self._ids[self._begin : self._end], self._host)
            self._dirty = False

    @property
    def _stacks(self) -> list[tuple[int, int, Stack]]:
        return self._window

    def _reach(self, at_page: int, *, write: bool) -> int:
        if not self._begin <= at_page < self._end:
            self.flush()
            self._begin, self._end = at_page, min(at_page + self._device.WINDOW, len(self._ids))
            self._device.fetch(self._ids[self._begin : self._end], self._host)
        self._dirty |= write
        return at_page - self._begin


def _unshared(names: Sequence[str], caches: dict[str, torch.Tensor]) -> tuple[list[str], list[torch.Tensor]]:
    """The layers that have a cache of their own: some share another one's."""
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(caches[name].data_ptr(), name)
    return list(first.values()), [caches[name] for name in first.values()]


def _flat(name: str, cache: torch.Tensor) -> Array:
    """``[pages, heads, values of a page]`` in the bits' type, a view."""
    pages, heads, tokens, width = cache.shape
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


def _probed(name: str, layer: Any, cache: torch.Tensor) -> Places:
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
