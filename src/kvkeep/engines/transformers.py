"""Hugging Face Transformers: ``generate()`` that does not read the same prompt twice.

``attach(model, cache)`` puts a hook before and after the model's forward and wraps ``model.generate``; ``detach``
takes them away. Within ``generate`` the hook acts on a forward whose cache is empty and whose token ids it sees: it
fills the cache with the longest prefix that is kept and lets the model compute the rest. After that forward the
prompt's blocks are kept, and at the end of ``generate`` those of the decoded tokens, so that a chat's next turn
starts where the last one ended. A hit always leaves the model the last token of the prompt, or it would have nothing
to predict from. Outside ``generate`` the model is as before.

**Batches.** A Transformers cache has one length for all rows, so a batch reuses the longest *common* past
``P = min(pad_i + hit_i)`` (rows padded on the left, ``pad_i`` slots each): a longer hit of one row would leave its
neighbours' slots unknown. Padded slots hold zeros; the mask hides them. Equal rows (beams, return sequences) are
looked up, loaded and kept once.

**Fast and exact.** Restored values are the bits that were stored. But matrix products round differently at different
shapes, so in reduced precision a suffix computed after a restored prefix can differ in rounding from one prefill in
one piece, as with every engine's own prefix cache. ``exact=True`` computes every prompt in segments of ``segment``
tokens, restores at their borders only and keeps nothing that was computed otherwise (decoded tokens, a tail), so a hit
is bit-identical to a miss. It costs 2–3 % of a prefill at 256 tokens, serves one sequence at a time, and its blocks
are used by exact mode only, on the same kind of device with the same versions and threads.

**Left alone**, with one log line a reason: models whose state cannot be cut into blocks (sliding window, recurrent,
hybrid, encoder-decoder, shared layers), caches other than :class:`~transformers.DynamicCache` (static, quantized,
offloaded) or with content, ``use_cache=False``, ``inputs_embeds``, images and other inputs beside tokens, training,
autocast, several devices, right padding or odd positions, foreign forward hooks, a prompt beyond the length at which
dynamic or long rope changes its frequencies.

**Identity** is by bytes: see :func:`describe`. It is looked at again at each call, by the tensors' addresses, versions
and a sample of their values, so switched, merged or trained adapters and loaded weights count at once. What changes
a few values behind torch's back (``parameter.data[0] = …``) may be missed: ``attach`` again after that.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
import xxhash
from huggingface_hub import try_to_load_from_cache
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvkeep.buffers import anonymous
from kvkeep.cache import KVCache
from kvkeep.engines.base import ArraySink, ArraySource
from kvkeep.engines.weights import files_digest, tensors_digest, tensors_fingerprint
from kvkeep.errors import ConfigError, KVKeepError, LayoutError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import DTYPES, KVLayout, LayerGroup

logger = logging.getLogger(__name__)

Model = TypeVar("Model")

PROBE_TOKENS = 4
SAVING_SHARE = 0.1
"""Of the time that a call has taken, what it may wait for writes before its own, if memory cannot hold all of them."""

STAGING_KEPT = 1 << 30
"""Bytes of touched memory that an attached model keeps between calls to restore into; more than that is given back."""

_KNOWN_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
}  # fmt: skip
_PLAIN = (int, float, bool, str)
_VOLATILE = {"training", "gradient_checkpointing", "max_seq_len_cached"}
_KNOWN_HOOKS = ("kvkeep.", "transformers.", "torch.", "accelerate.")
_PROBE_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)


@dataclass(slots=True)
class Report:
    """What happened to the last ``generate`` of a model. Padding and repeated rows do not count."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    saved_blocks: int = 0
    stayed_out: str = ""
    """Why kvkeep had no part in it; empty where it had."""


def attach(model: Model, cache: KVCache, *, exact: bool = False, segment: int = 256, wait: float = 0.0) -> Model:
    """Make ``model.generate`` reuse and keep prefixes in ``cache``; returns ``model``, a PEFT model too.

    ``exact``: a hit is bit-identical to a miss (see the module). ``segment``: its tokens, rounded up to whole blocks.
    ``wait``: seconds to wait while another thread, process or machine reads the same prefix, to load it then.
    A model that cannot be served is returned as it was, with a warning in the log that says why. Raises
    :class:`ConfigError` for what is no Transformers model, or one that is attached already, or whose measured quality
    the cache's codec passes the limit of.
    """
    base = _base(model)
    if not hasattr(cache, "bind"):
        raise ConfigError(f"cache is what kvkeep.open returns, not {cache!r}")
    if segment < 1:
        raise ConfigError(f"segment is at least 1 token, not {segment}")
    if not 0 <= wait < float("inf"):
        raise ConfigError(f"wait is a number of seconds, not {wait}")
    if _attachment(base) is not None:
        raise ConfigError("this model is attached already: detach(model) first")
    attachment = _Attachment(base, cache, segment if exact else 0, wait)
    reason = _unservable(base) or attachment.identify()
    if reason:
        logger.warning("kvkeep leaves %s alone: %s", type(base).__name__, reason)
        return model
    attachment.install()
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach`; nothing happens to a model that is not attached."""
    attachment = _attachment(_base(model))
    if attachment is not None:
        attachment.remove()
    return model


def report(model: Any) -> Report | None:
    """What happened to the last ``generate``; None before the first, or for a model that is not attached."""
    attachment = _attachment(_base(model))
    return attachment.last if attachment is not None else None


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
    staging: memoryview | None = None
    claims: ExitStack = field(default_factory=ExitStack)  # on what is missing, until it is saved


class _Attachment:
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
        self._staging: memoryview | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        self.model.generate = _Generate(self)
        self._handles = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop("generate", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attachment:
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
            self._give_back(call)
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
        self._give_back(call)
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
        call.pads = _left_pads(kwargs.get("attention_mask"), ids)
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
        views = self._stage(call, len(pads), past)
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
            stacked = self._stacked(call, len(pads), past)
            sink = ArraySink(call.layout, target if stacked is None else stacked[:, :, row, :, pad:past])
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
        self._fill(call, len(pads), past, loaded)
        return loaded

    def _stage(self, call: _Call, batch: int, past: int) -> list[tuple[Any, Any]]:
        """Borrow memory for ``past`` tokens; NumPy views of each layer, ``[batch, heads, past, dim]``."""
        layout = call.layout
        nbytes = layout.token_nbytes * batch * past
        with self._lock:
            call.staging, self._staging = self._staging, None
        if call.staging is None or call.staging.nbytes < nbytes:
            call.staging = anonymous(nbytes + nbytes // 2)  # the next turn of a chat needs a little more
        return _carve(np.frombuffer(call.staging, layout.np_dtype), layout, batch, past)

    def _stacked(self, call: _Call, batch: int, past: int) -> Any:
        """The same memory as ``[layers, 2, batch, heads, past, dim]`` where all layers are alike."""
        layout = call.layout
        assert call.staging is not None
        group = layout.groups[0]
        if len(layout.groups) > 1 or group.k_dim != group.v_dim:
            return None
        shape = (group.num_layers, 2, batch, group.num_kv_heads, past, group.k_dim)
        return np.frombuffer(call.staging, layout.np_dtype, int(np.prod(shape))).reshape(shape)

    def _fill(self, call: _Call, batch: int, past: int, loaded: int) -> None:
        """Hand the staged tensors to the cache's layers, all or none."""
        assert call.staging is not None
        layout = call.layout
        dtype = getattr(torch, layout.dtype)
        device = next(self.model.parameters()).device
        flat = torch.frombuffer(call.staging, dtype=dtype)
        pairs = []
        for keys, values in _carve(flat, layout, batch, past):
            if loaded < past:
                keys = keys[:, :, :loaded].contiguous()
                values = None if values is None else values[:, :, :loaded].contiguous()
            values = keys[..., :0] if values is None else values
            pairs.append((keys.to(device), values.to(device)))
        layers = call.kv.layers
        while len(layers) < len(pairs):
            layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
        for layer, (keys, values) in zip(layers, pairs, strict=True):
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = dtype, device
            layer.is_initialized = True

    def _give_back(self, call: _Call) -> None:
        """Keep the staging memory for the next call, if no layer uses it any more (an update copies it out)."""
        memory, call.staging = call.staging, None
        if memory is None or memory.nbytes > STAGING_KEPT:
            return
        start = np.frombuffer(memory, np.uint8).ctypes.data
        for layer in call.kv.layers:
            for tensor in (layer.keys, layer.values):
                if tensor is not None and start <= tensor.data_ptr() < start + memory.nbytes:
                    return  # the tensor keeps the memory alive
        with self._lock:
            if self._staging is None or self._staging.nbytes < memory.nbytes:
                self._staging = memory

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
        if type(kv) is not DynamicCache or kv.offloading or any(type(layer) is not DynamicLayer for layer in kv.layers):
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
        pads = _left_pads(kwargs.get("attention_mask"), ids)
        if not pads:
            return "the attention mask is not plain left padding"
        if self.segment and (ids.shape[0] > 1 or pads[0]):
            return "exact mode serves one sequence without padding"
        if not _plain_positions(kwargs.get("position_ids"), ids, pads):
            return "position_ids are not those of the tokens"
        if ids.shape[1] > _rope_limit(self.model.config):
            return "the prompt is longer than the length at which this model's rope changes"
        foreign = _foreign_hook(self.model)
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
            state = _state(self.model, self._samples)
            if state == self._state:
                return self._bound
            self._broken = ""
            shape = self._probe()
            self._bound = (None, None) if shape is None else self._bind_as(*shape)
            self._samples = _samples(self.model)
            self._state = _state(self.model, self._samples)
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
        except _PROBE_ERRORS as error:
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
            if not _alike(keys[:, :, :2], others[:, :, :2]):
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


class _Generate:
    """``model.generate`` of an attached model."""

    def __init__(self, attachment: _Attachment) -> None:
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


def describe(model: Any, *, kv_dtype: str, segment: int = 0, namespace: bytes = b"") -> ModelIdentity:
    """The identity of ``model`` as it stands.

    Weights: SHA-256 of its files, where it came from a folder or the hub's cache, with a fast digest of its tensors
    in memory; of its tensors alone otherwise. Adapters: each active adapter's tensors and scales. Numerics: class,
    config, attention, and every plain attribute of every module (a norm's epsilon, a hand-made adapter's scale).
    In exact mode (``segment``) also what rounding depends on. Raises :class:`LayoutError` for tensors that cannot
    be read.
    """
    weights, adapters = _split_tensors(model)
    files = _weight_files(model)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    numerics: dict[str, Any] = {
        "class": type(model).__name__,
        "config": config,
        "attention": model.config._attn_implementation,
        "attributes": xxhash.xxh3_128_hexdigest(repr(sorted(_attributes(model))).encode()),
    }
    if segment:
        numerics["exact"] = [
            segment, torch.__version__, transformers.__version__, torch.get_num_threads(),
            torch.get_float32_matmul_precision(), torch.backends.cpu.get_cpu_capability(), _device_name(model),
        ]  # fmt: skip
    try:
        if files:
            digest = f"files {files_digest(files)} {tensors_fingerprint(weights)}"
        else:
            digest = f"tensors {tensors_digest(weights)}"
        active = tuple(tensors_digest(part) + scale for part, scale in adapters)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # meta or wrapped tensors without bytes
        raise LayoutError(f"the bytes of its weights cannot be read: {error}") from error
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None)
    return ModelIdentity(
        weights=digest,
        kv_dtype=kv_dtype,
        adapters=active,
        rope=json.dumps(rope, sort_keys=True, default=str),
        numerics=json.dumps(numerics, sort_keys=True, default=str),
        namespace=namespace,
    )


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_tuner(module: Any) -> bool:
    """Whether this is a layer of PEFT's; recognised by what its class offers, so that PEFT need not be there."""
    return hasattr(type(module), "adapter_layer_names") and hasattr(type(module), "active_adapters")


def _tuners(model: Any) -> dict[str, Any]:
    """PEFT's layers by name."""
    return {name: module for name, module in model.named_modules() if _is_tuner(module)}


def _adapter_of(name: str, tuners: dict[str, Any]) -> tuple[str, Any] | None:
    """(adapter, its layer) that a tensor or module belongs to: what a layer of PEFT holds by adapter."""
    if not tuners:
        return None
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        tuner = tuners.get(".".join(parts[:depth]))
        if tuner is not None and hasattr(getattr(tuner, parts[depth], None), "keys"):
            return parts[depth + 1], tuner
    return None


def _plain_name(name: str) -> str:
    """A tensor's or module's name as it was before PEFT wrapped it."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _split_tensors(
    model: Any,
) -> tuple[list[tuple[str, torch.Tensor]], list[tuple[list[tuple[str, torch.Tensor]], str]]]:
    """The base's tensors, and for each adapter in use its tensors and scales."""
    tuners = _tuners(model)
    base: list[tuple[str, torch.Tensor]] = []
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors(model):
        owner = _adapter_of(name, tuners)
        if owner is None:
            base.append((_plain_name(name), tensor))
        elif _in_use(owner[1], owner[0]):
            parts.setdefault(owner[0], []).append((name.replace(f".{owner[0]}", "", 1), tensor))
    order: dict[str, None] = {}
    for tuner in tuners.values():
        order.update(dict.fromkeys(name for name in tuner.active_adapters if name in parts))
    scales = {name: repr([_scales(tuner, name) for tuner in tuners.values() if _in_use(tuner, name)]) for name in order}
    return base, [(parts[name], scales[name]) for name in order]


def _in_use(tuner: Any, adapter: str) -> bool:
    merged = getattr(tuner, "merged_adapters", ())  # merged: in the base's bytes
    return adapter in tuner.active_adapters and not tuner.disable_adapters and adapter not in merged


def _scales(tuner: Any, adapter: str) -> list[tuple[str, Any]]:
    """Plain values that a layer holds by adapter: scaling, rank, use_dora, …"""
    return sorted(
        (name, table[adapter])
        for name, table in vars(tuner).items()
        if isinstance(table, dict) and isinstance(table.get(adapter), int | float | bool | str)
    )


def _attributes(model: Any) -> Iterator[tuple[str, str, str]]:
    """(module, attribute, value) of all that is plain; a module's class counts as one."""
    tuners = _tuners(model)
    for name, module in model.named_modules():
        if name in tuners or _adapter_of(f"{name}.", tuners) or _adapter_of(f"{name}.x.", tuners):
            continue
        plain = _plain_name(name)
        yield plain, "", type(module).__name__
        for key, value in vars(module).items():
            if type(value) in _PLAIN and key not in _VOLATILE and not key.startswith("_"):
                yield plain, key, repr(value)


def _state(model: Any, samples: list[np.ndarray[Any, Any]]) -> tuple[Any, ...]:
    """Differs whenever the identity may. One walk over the modules, no pass over the weights: it is on every call."""
    found: list[Any] = []
    for module in model.modules():
        held = vars(module)
        found.append(type(module))
        found += [
            value
            for key, value in held.items()
            if type(value) in _PLAIN and key not in _VOLATILE and not key.startswith("_")
        ]
        for tensor in (*held["_parameters"].values(), *held["_buffers"].values()):
            if tensor is not None:
                version = -1 if tensor.is_inference() else tensor._version
                found.append((tensor.data_ptr(), version, tensor.dtype))
        if _is_tuner(module):
            found += (tuple(module.active_adapters), bool(module.disable_adapters))
            found.append(tuple(getattr(module, "merged_adapters", ())))
            found += [tuple(_scales(module, name)) for name in module.active_adapters]
    sample = xxhash.xxh3_128()
    for view in samples:
        sample.update(view.tobytes())
    return tuple(found), model.config._attn_implementation, sample.digest()


def _samples(model: Any) -> list[np.ndarray[Any, Any]]:
    """64 bytes of each weight, spread over it, as views: what ``parameter.data`` changes has no version."""
    views = []
    for _, tensor in _tensors(model):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
            views.append(flat[:: (flat.size // 64) | 1])
    return views


def _weight_files(model: Any) -> list[Path]:
    """The files that the weights came from, as far as they are known. Their tensors are looked at too."""
    name = str(model.name_or_path)
    if not name:
        return []
    folder = Path(name)
    if not folder.is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        if not revision:
            return []
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(found, str):
            return []
        folder = Path(found).parent
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _unservable(model: Any) -> str:
    """Why no call of this model can be served, as far as its config and class tell."""
    if not model.can_generate():
        return "it does not generate"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder keeps two caches"
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "use_bidirectional_attention", None):
        return "its tokens see ahead"
    try:
        layers = DynamicCache(config=config).layers
    except _PROBE_ERRORS as error:
        return f"it has no cache of its own: {error}"
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if odd:
        return f"the state of {', '.join(odd)} cannot be cut into blocks"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "it is spread over several devices"
    if next(model.parameters()).device.type == "meta":
        return "its weights are not in memory"
    return ""


def _left_pads(mask: torch.Tensor | None, ids: torch.Tensor) -> list[int]:
    """Padded slots on the left of each row; empty where the mask is anything else."""
    batch, length = ids.shape
    if mask is None:
        return [0] * batch
    if mask.shape != ids.shape:
        return []
    visible = mask.cpu() != 0
    pads = length - visible.sum(dim=1)
    plain = torch.arange(length) >= pads[:, None]
    if not torch.equal(plain, visible) or bool((pads >= length).any()):
        return []
    return [int(pad) for pad in pads]


def _plain_positions(positions: torch.Tensor | None, ids: torch.Tensor, pads: list[int]) -> bool:
    """Whether each row counts 0, 1, 2, … from its first token. What a padded slot says does not matter."""
    if positions is None:
        return not any(pads)
    if positions.dim() != 2 or positions.shape[1] != ids.shape[1] or positions.shape[0] not in (1, len(pads)):
        return False
    found = positions.cpu().expand(len(pads), -1)
    want = torch.arange(ids.shape[1]) - torch.tensor(pads)[:, None]
    return bool(((found == want) | (want < 0)).all())


def _rope_limit(config: Any) -> float:
    """Tokens up to which the rope's frequencies do not depend on the length of the prompt."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if not kinds & {"dynamic", "longrope"}:
        return float("inf")
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return float(original or text.max_position_embeddings)


def _foreign_hook(model: Any) -> str:
    """A forward hook inside the model whose effect is not in the identity (steering, mixed adapters)."""
    for module in model.modules():
        if not module._forward_hooks and not module._forward_pre_hooks:
            continue
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            function = getattr(hook, "func", hook)
            owner = getattr(function, "__module__", None) or type(function).__module__
            if not f"{owner}.".startswith(_KNOWN_HOOKS):
                return f"{owner}.{getattr(function, '__qualname__', type(function).__name__)}"
    return ""


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding: expert models group tokens, so that even the same shape may round differently."""
    if torch.equal(one, other):
        return True
    tolerance = 1e-4 if one.dtype == torch.float32 else 2e-2
    return float((one.float() - other.float()).abs().max()) <= tolerance * float(one.float().abs().max())


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


def _carve(flat: Any, layout: KVLayout, batch: int, tokens: int) -> list[tuple[Any, Any]]:
    """Views of each layer's keys and values ``[batch, heads, tokens, dim]`` in flat memory, NumPy's or torch's."""
    views: list[tuple[Any, Any]] = []
    offset = 0
    for group in layout.groups:
        for _ in range(group.num_layers):
            pair: list[Any] = []
            for dim in (group.k_dim, group.v_dim):
                count = batch * group.num_kv_heads * tokens * dim
                part = flat[offset : offset + count].reshape(batch, group.num_kv_heads, tokens, dim) if dim else None
                pair.append(part)
                offset += count
            views.append((pair[0], pair[1]))
    return views


def _device_name(model: Any) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _base(model: Any) -> Any:
    """The Transformers model itself, out of a PEFT model."""
    inner: Callable[[], Any] | None = (
        None if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", None)
    )
    base = inner() if inner is not None else model
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(f"a {type(model).__name__} is no Transformers model")
    return base


def _attachment(model: Any) -> _Attachment | None:
    found = model.__dict__.get("generate")
    return found._attachment if isinstance(found, _Generate) else None
