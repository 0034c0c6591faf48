"""Hooks on one model, and what one run of ``generate`` does: restore before the first forward, keep after it."""

from __future__ import annotations

import functools
import logging
import threading
import time
import types
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvkeep.cache import KVCache
from kvkeep.engines.base import ArraySink, ArraySource
from kvkeep.engines.transformers.checks import (
    PROBE_ERRORS,
    alike,
    foreign_hook,
    left_pads,
    plain_positions,
    rope_limit,
)
from kvkeep.engines.transformers.identity import describe, samples_of, state_of
from kvkeep.engines.transformers.staging import STAGING_AHEAD, RestoredLayer, Staging, carve, keep_freed_memory, stacked
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.layout import DTYPES, KVLayout, LayerGroup

logger = logging.getLogger("kvkeep.engines.transformers")

PROBE_TOKENS = 4
ROOM = 256
"""Tokens: room behind a restored prompt, for what is decoded."""

SAVING_SHARE = 0.1
"""Of the time that a call has taken, what it may wait for writes before its own, if memory cannot hold all of them."""

_KNOWN_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
}  # fmt: skip
_LAYERS = (DynamicLayer, RestoredLayer)


@dataclass(slots=True)
class Report:
    """What happened to the last ``generate`` of a model. Padding and repeated rows do not count."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    saved_blocks: int = 0
    stayed_out: str = ""
    """Why kvkeep had no part in it; empty where it had."""


@dataclass(slots=True)
class _Call:
    """One run of ``generate`` in one thread."""

    prompt_limit: int | None  # tokens of the prompt, where generate was given them
    report: Report = field(default_factory=Report)
    started: float = field(default_factory=time.monotonic)
    begun: bool = False
    over: bool = False  # kvkeep has no further part in this run
    kv: Any = None
    bound: Any = None
    layout: Any = None
    pads: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # the first of each set of equal rows
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (tokens before, input ids) of each forward
    length: int = 0  # tokens in the cache after the last forward
    kept: list[int] = field(default_factory=list)  # of each of `rows`: tokens that need not be saved again
    mark: torch.Tensor | None = None  # the first layer's keys after the last forward
    claims: ExitStack = field(default_factory=ExitStack)  # on what is missing, until it is saved


class Attachment:
    """Hooks on one model. All state of a run is the run's; threads may generate at once."""

    def __init__(self, model: Any, cache: KVCache, segment: int, wait: float) -> None:
        self.model = model
        self.cache = cache
        self.segment = segment
        self.wait = wait
        self.last: Report | None = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._state: Any = None
        self._samples: list[np.ndarray[Any, Any]] = []
        self._bound: tuple[Any, KVLayout | None] = (None, None)
        self._broken = ""
        self._logged: set[str] = set()
        self._staging = Staging()
        self._handles: list[Any] = []

    def install(self) -> None:
        keep_freed_memory()
        self._prepare_staging()
        self.model.generate = Generate(self)
        self._handles = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def _prepare_staging(self) -> None:
        """Memory for the first prompt that is found; nothing where nothing is stored yet."""
        layout = self._bound[1]
        stored = sum(tier.usage[1] for tier in self.cache.store.tiers)
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if layout is not None and stored and longest:
            token = layout.token_nbytes
            self._staging.prepare(min((longest + ROOM) * token, 2 * (stored + ROOM * token), STAGING_AHEAD))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop("generate", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self  # a copied model's hooks find that they are not their model's, and do nothing

    # --- generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        inputs: Any = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        ids = isinstance(inputs, torch.Tensor) and inputs.dim() == 2
        call = _Call(int(inputs.shape[1]) if ids else None)
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            result = type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self._local.call = outer
            call.claims.close()
        if not self.segment:
            self._keep(call, call.length)
        self.last = call.report
        return result

    def before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        call: _Call | None = getattr(self._local, "call", None)
        if call is None or call.over or module is not self.model or getattr(self._local, "busy", False):
            return None
        if call.begun:
            self._follow(call, args, kwargs)
            return None
        call.begun = True
        self.last = call.report
        reason = self._objection(call, args, kwargs)
        if not reason:
            try:
                call.bound, call.layout = self._bind()
            except (KVKeepError, OSError) as error:
                reason = f"the model cannot be identified: {error}"
            layers = kwargs["past_key_values"].layers if not reason else []
            if call.layout is not None and layers and len(layers) != call.layout.num_layers:
                reason = "the model runs on some of its layers only"  # as an assistant that exits early
            reason = reason or self._broken
        if reason:
            call.over, call.report.stayed_out = True, reason
            self._log_once(reason)
            return None
        return args, self._begin(call, kwargs)

    def after(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call: _Call | None = getattr(self._local, "call", None)
        if call is None or call.over or module is not self.model or getattr(self._local, "busy", False):
            return
        past, ids = call.seen[-1]
        first = len(call.seen) == 1 or call.mark is None
        call.length = past + ids.shape[1]
        if call.kv.get_seq_length() != call.length:
            call.over = True  # this forward did not simply append: nothing is known about the cache any more
            return
        call.mark = call.kv.layers[0].keys
        prompt = call.length if call.prompt_limit is None else call.prompt_limit
        if self.segment:
            if first:
                self._keep(call, min(prompt, call.length) // self.segment * self.segment)
                call.over = True
        elif past < prompt:
            self._keep(call, min(prompt, call.length))
        if call.over or call.length >= prompt:
            call.claims.close()

    def _begin(self, call: _Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Fill the empty cache as far as it goes; returns the arguments for the rest of the prompt."""
        ids: torch.Tensor = kwargs["input_ids"]
        call.kv = kwargs["past_key_values"]
        call.pads = left_pads(kwargs.get("attention_mask"), ids)
        tokens = ids.cpu().numpy()
        first_of: dict[tuple[int, bytes], int] = {}
        twins = [first_of.setdefault((pad, tokens[row].tobytes()), row) for row, pad in enumerate(call.pads)]
        call.rows = sorted(set(twins))
        prompt = min(ids.shape[1], call.prompt_limit or ids.shape[1])
        limit = min(prompt - 1, ids.shape[1] - max(1, int(kwargs.get("logits_to_keep", 1))))
        past = 0
        try:
            self._claim(call, tokens, limit)
            past = self._restore(call, tokens, twins, limit)
        except (KVKeepError, OSError) as error:
            self._log_once(f"a prefix could not be loaded: {error}")
        call.kept = [max(0, past - call.pads[row]) for row in call.rows]
        call.report.prompt_tokens = sum(prompt - call.pads[row] for row in call.rows)
        call.report.cached_tokens = sum(call.kept)
        while self.segment and ids.shape[1] - past > self.segment:
            self._forward(_slice(kwargs, past, past + self.segment))
            past += self.segment
        call.seen = [(0, ids)] if past == 0 else [(0, ids[:, :past]), (past, ids[:, past:])]
        return _slice(kwargs, past, ids.shape[1])

    def _follow(self, call: _Call, args: Any, kwargs: dict[str, Any]) -> None:
        """A later forward: note its tokens, or give up where somebody else has been at the cache.

        Cropping (assisted decoding) leaves the tensor where it was; what reorders rows makes a new one.
        """
        ids, kv = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or ids is None or kv is not call.kv or not self._untouched(call):
            call.over = True
            return
        call.seen.append((kv.get_seq_length(), ids))

    def _untouched(self, call: _Call) -> bool:
        keys, mark = call.kv.layers[0].keys, call.mark
        return (
            mark is not None
            and isinstance(keys, torch.Tensor)
            and keys.data_ptr() == mark.data_ptr()
            and keys.stride() == mark.stride()
            and keys.shape[0] == mark.shape[0]
            and keys.shape[2] <= mark.shape[2]
        )

    # --- load and save

    def _claim(self, call: _Call, tokens: Any, limit: int) -> None:
        """Claim what is missing of each prompt, or wait until somebody else has read it."""
        deadline = time.monotonic() + self.wait
        size = call.layout.block_tokens
        begun: set[bytes] = set()
        for row in call.rows if self.wait else ():
            prompt = tokens[row, call.pads[row] : limit]
            if prompt[:size].tobytes() not in begun:  # else we would wait for ourselves
                begun.add(prompt[:size].tobytes())
                call.claims.enter_context(call.bound.claim(prompt, wait=max(0.0, deadline - time.monotonic())))

    def _restore(self, call: _Call, tokens: Any, twins: list[int], limit: int) -> int:
        bound, pads = call.bound, call.pads
        size = call.layout.block_tokens
        unit = self.segment or 1
        if limit < 1:
            return 0
        matches = {row: bound.match(tokens[row, pads[row] : limit]) for row in call.rows}
        past: int = min(pads[row] + matches[row].num_tokens for row in call.rows) // unit * unit
        if past <= min(pads):
            return 0
        room = tokens.shape[1] + ROOM
        flat = self._staging.borrow(call.layout.token_nbytes * len(pads) * room)
        bits = flat.view(call.layout.np_dtype)
        views, whole = carve(bits, call.layout, len(pads), room), stacked(bits, call.layout, len(pads), room)
        loaded = past
        for row in call.rows:
            pad = pads[row]
            for keys, values in views:
                keys[row, :, :pad] = 0
                if values is not None:
                    values[row, :, :pad] = 0
            if past <= pad:  # all of this row's part is padding
                continue
            target = [(k[row, :, pad:past], None if v is None else v[row, :, pad:past]) for k, v in views]
            sink = ArraySink(call.layout, target if whole is None else whole[:, :, row, :, pad:past])
            with bound.lease(matches[row].first(-(-(past - pad) // size))) as lease:
                loaded = min(loaded, pad + bound.load(lease, sink))
        loaded = loaded // unit * unit
        if loaded <= min(pads):
            return 0
        for row, twin in enumerate(twins):
            if row != twin:
                for keys, values in views:
                    keys[row] = keys[twin]
                    if values is not None:
                        values[row] = values[twin]
        self._fill(call, flat, len(pads), room, loaded)
        return loaded

    def _fill(self, call: _Call, flat: Any, batch: int, room: int, loaded: int) -> None:
        """Hand the first ``loaded`` of the staged tokens to the cache's layers, all or none."""
        dtype = getattr(torch, call.layout.dtype)
        device = next(self.model.parameters()).device
        pairs = carve(torch.from_numpy(flat).view(dtype), call.layout, batch, room)
        layers: list[DynamicLayer] = []
        for keys, values in pairs:
            if device.type == "cpu" and values is not None:
                layers.append(RestoredLayer(keys, values, loaded))
                continue
            layer = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.keys = keys[:, :, :loaded].to(device)
            layer.values = layer.keys[..., :0] if values is None else values[:, :, :loaded].to(device)
            layer.dtype, layer.device, layer.is_initialized = dtype, device, True
            layers.append(layer)
        call.kv.layers[:] = layers

    def _keep(self, call: _Call, length: int) -> None:
        """Save the first ``length`` slots of the cache, as far as they are full blocks that were not saved."""
        if call.over or call.mark is None or not self._untouched(call):
            return
        length = min(length, call.kv.get_seq_length())
        layout = call.layout
        size = layout.block_tokens
        tokens: Any = None
        for slot, row in enumerate(call.rows):
            pad = call.pads[row]
            start = call.kept[slot] // size * size
            if (length - pad) // size * size <= start:
                continue
            if tokens is None:
                tokens = _join(call.seen)[:, :length].cpu().numpy()
            call.kept[slot] = length - pad
            source = _LayerSource(layout, call.kv.layers, row, pad + start, length, start)
            try:
                patience = SAVING_SHARE * (time.monotonic() - call.started)
                taken = call.bound.save(tokens[row, pad:], source, start=start, patience=patience)
            except (KVKeepError, OSError) as error:
                self._log_once(f"a prefix could not be saved: {error}")
                return
            call.report.saved_blocks += int(taken or 0)

    def _forward(self, kwargs: dict[str, Any]) -> Any:
        self._local.busy = True
        try:
            return self.model(**kwargs)
        finally:
            self._local.busy = False

    # --- may this call be served?

    def _objection(self, call: _Call, args: Any, kwargs: dict[str, Any]) -> str:
        ids, kv = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if args or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or kwargs.get("inputs_embeds") is not None:
            return "the token ids are not known (inputs_embeds?)"
        if kwargs.get("use_cache") is False or kv is None:
            return "use_cache is off"
        if type(kv) is not DynamicCache or kv.offloading or any(type(layer) not in _LAYERS for layer in kv.layers):
            return f"a {type(kv).__name__} of this kind cannot be filled"
        if kv.get_seq_length() > 0:
            return "past_key_values came with content"
        if self.model.training or torch.is_grad_enabled():
            return "the model is training or gradients are on"
        if torch.is_autocast_enabled(ids.device.type):
            return "autocast is on"
        unknown = [
            name for name, value in kwargs.items()
            if name not in _KNOWN_ARGUMENTS and not (value is None or value is False)
        ]  # fmt: skip
        if unknown:
            return f"inputs or outputs beside tokens: {', '.join(sorted(unknown))}"
        keep = kwargs.get("logits_to_keep")
        if not isinstance(keep, int | None) or (keep is None and call.prompt_limit is None):
            return "it is not known which logits are asked for"
        pads = left_pads(kwargs.get("attention_mask"), ids)
        if not pads:
            return "the attention mask is not plain left padding"
        if self.segment and (ids.shape[0] > 1 or pads[0]):
            return "exact mode serves one sequence without padding"
        if not plain_positions(kwargs.get("position_ids"), ids, pads):
            return "position_ids are not those of the tokens"
        if ids.shape[1] > rope_limit(self.model.config):
            return "the prompt is longer than the length at which this model's rope changes"
        foreign = foreign_hook(self.model)
        if foreign:
            return f"a forward hook may change values: {foreign}"
        return ""

    def _log_once(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("kvkeep stays out of generate() of %s: %s", type(self.model).__name__, reason)

    # --- identity

    def _bind(self) -> tuple[Any, KVLayout | None]:
        """The cache, bound to the model as it is now, and its layout; (None, None) where the model turned out odd."""
        with self._lock:
            state = state_of(self.model, self._samples)
            if state == self._state:
                return self._bound
            self._broken = ""
            shape = self._probe()
            self._bound = (None, None) if shape is None else self._bind_as(*shape)
            self._samples = samples_of(self.model)
            self._state = state_of(self.model, self._samples)
            return self._bound

    def _bind_as(self, groups: tuple[LayerGroup, ...], dtype: str) -> tuple[Any, KVLayout]:
        namespace, size = self.cache.namespace, self.cache.block_tokens
        layout = KVLayout(describe(self.model, kv_dtype=dtype, namespace=namespace), groups, dtype, size)
        if self.segment:
            self.segment = -(-self.segment // layout.block_tokens) * layout.block_tokens
            identity = describe(self.model, kv_dtype=dtype, segment=self.segment, namespace=namespace)
            layout = KVLayout(identity, groups, dtype, size)
        name = Path(str(self.model.name_or_path)).name or type(self.model).__name__
        return self.cache.bind(layout, description=name), layout

    def identify(self) -> str:
        """Pay for the identity now, not in the first ``generate``; why the model cannot be served, if so."""
        device = next(self.model.parameters()).device
        if self.model.training or torch.is_autocast_enabled(device.type):
            return ""  # not the state in which it will generate
        try:
            self._bind()
        except ConfigError:
            raise  # a codec that is refused for this model
        except (KVKeepError, OSError) as error:
            return f"the model cannot be identified: {error}"
        return self._broken

    def _probe(self) -> tuple[tuple[LayerGroup, ...], str] | None:
        """The shapes and type of the cache, read off two tiny forwards that also show that no token sees ahead."""
        device = next(self.model.parameters()).device
        texts = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]], device=device)
        caches: list[Any] = []
        try:
            for text in texts:
                kv = DynamicCache(config=self.model.config.get_text_config(decoder=True))
                with torch.no_grad():
                    self._forward({"input_ids": text[None], "past_key_values": kv, "use_cache": True})
                caches.append(kv)
        except PROBE_ERRORS as error:
            self._broken = f"a probe of {PROBE_TOKENS} tokens failed: {error}"
            return None
        groups: list[LayerGroup] = []
        dtypes = set()
        for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
            if type(one) is not DynamicLayer or not one.is_initialized or one.get_seq_length() != PROBE_TOKENS:
                self._broken = "its cache does not hold each token in each layer"
                return None
            keys: Any = one.keys
            values: Any = one.values
            others: Any = other.keys
            if not alike(keys[:, :, :2], others[:, :, :2]):
                self._broken = "its tokens see ahead"
                return None
            if values.numel() and values.shape[:3] != keys.shape[:3]:
                self._broken = "its keys and values differ in heads"
                return None
            dtypes |= {str(keys.dtype).removeprefix("torch."), str(values.dtype).removeprefix("torch.")}
            shape = (int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]) if values.numel() else 0)
            last = groups[-1] if groups else None
            if last is not None and (last.num_kv_heads, last.k_dim, last.v_dim) == shape:
                groups[-1] = LayerGroup(last.num_layers + 1, *shape)
            else:
                groups.append(LayerGroup(1, *shape))
        if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
            self._broken = f"its cache holds {', '.join(sorted(dtypes))}"
            return None
        return tuple(groups), dtypes.pop()


class Generate:
    """``model.generate`` of an attached model."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        functools.update_wrapper(self, attachment.model.generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._attachment.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self._attachment.model
        return types.MethodType(type(model).generate, memo.get(id(model), model))


class _LayerSource:
    """Blocks of one row of the layers' tensors; from another device only what is read is copied."""

    def __init__(self, layout: KVLayout, layers: Any, row: int, begin: int, end: int, start: int) -> None:
        self._layout, self._layers, self._row = layout, layers, row
        self._begin, self._end, self._start = begin, end, start
        self._arrays: ArraySource | None = None

    def read(self, index: int, out: memoryview) -> None:
        if self._arrays is None:
            pairs = [tuple(self._part(tensor) for tensor in (layer.keys, layer.values)) for layer in self._layers]
            self._arrays = ArraySource(self._layout, pairs, start=self._start)
        self._arrays.read(index, out)

    def _part(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor.detach()[self._row, :, self._begin : self._end].cpu() if tensor.shape[-1] else None


def _slice(kwargs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """The arguments of a forward over tokens ``begin`` … ``end - 1``; a mask also covers what went before."""
    if begin == 0 and end == kwargs["input_ids"].shape[1]:
        return kwargs
    part = dict(kwargs)
    for name in ("input_ids", "position_ids", "cache_position"):
        if part.get(name) is not None:
            part[name] = part[name][..., begin:end]
    if part.get("attention_mask") is not None:
        part["attention_mask"] = part["attention_mask"][:, :end]
    return part


def _join(seen: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The tokens in the cache: each forward appended to what was left of those before it."""
    parts: list[torch.Tensor] = []
    length = 0
    for past, ids in seen:
        while length > past:
            cut = min(length - past, parts[-1].shape[1])
            parts[-1] = parts[-1][:, : parts[-1].shape[1] - cut]
            length -= cut
            if parts[-1].shape[1] == 0:
                parts.pop()
        parts.append(ids)
        length += ids.shape[1]
    return torch.cat(parts, dim=1)
