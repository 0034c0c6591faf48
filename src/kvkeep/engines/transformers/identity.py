"""Which model this is, by its bytes: weights, adapters, and all that shapes its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from huggingface_hub import try_to_load_from_cache

from kvkeep.engines.weights import files_digest, tensors_digest, tensors_fingerprint
from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity

_PLAIN = (int, float, bool, str)
_VOLATILE = {"training", "gradient_checkpointing", "max_seq_len_cached"}


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


def state_of(model: Any, samples: list[np.ndarray[Any, Any]]) -> tuple[Any, ...]:
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


def samples_of(model: Any) -> list[np.ndarray[Any, Any]]:
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


def _device_name(model: Any) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
