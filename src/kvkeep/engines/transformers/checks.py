"""What can be served, and what is left alone: questions to a model and to the inputs of one forward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PROBE_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
_KNOWN_HOOKS = ("kvkeep.", "transformers.", "torch.", "accelerate.")


def unservable(model: Any) -> str:
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
    except PROBE_ERRORS as error:
        return f"it has no cache of its own: {error}"
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if odd:
        return f"the state of {', '.join(odd)} cannot be cut into blocks"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "it is spread over several devices"
    if next(model.parameters()).device.type == "meta":
        return "its weights are not in memory"
    return ""


def left_pads(mask: torch.Tensor | None, ids: torch.Tensor) -> list[int]:
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


def plain_positions(positions: torch.Tensor | None, ids: torch.Tensor, pads: list[int]) -> bool:
    """Whether each row counts 0, 1, 2, … from its first token. What a padded slot says does not matter."""
    if positions is None:
        return not any(pads)
    if positions.dim() != 2 or positions.shape[1] != ids.shape[1] or positions.shape[0] not in (1, len(pads)):
        return False
    found = positions.cpu().expand(len(pads), -1)
    want = torch.arange(ids.shape[1]) - torch.tensor(pads)[:, None]
    return bool(((found == want) | (want < 0)).all())


def rope_limit(config: Any) -> float:
    """Tokens up to which the rope's frequencies do not depend on the length of the prompt."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if not kinds & {"dynamic", "longrope"}:
        return float("inf")
    original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return float(original or text.max_position_embeddings)


def foreign_hook(model: Any) -> str:
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


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding: expert models group tokens, so that even the same shape may round differently."""
    if torch.equal(one, other):
        return True
    tolerance = 1e-4 if one.dtype == torch.float32 else 2e-2
    return float((one.float() - other.float()).abs().max()) <= tolerance * float(one.float().abs().max())
