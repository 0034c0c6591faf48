"""What a model's tokens weigh: bytes of KV, and the arithmetic of a prefill. From its ``config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError, nearest
from kvkeep.layout import DTYPES


@dataclass(frozen=True, slots=True)
class ModelSize:
    """``token_flops``: of a prompt's token without attention. ``pair_flops``: of attention, for ``n²`` of a prompt."""

    name: str
    token_nbytes: float
    token_flops: float
    pair_flops: float

    @property
    def attention_tokens(self) -> float:
        """The prompt length at which attention costs as much as the rest."""
        return self.token_flops / self.pair_flops


def load(model: str, *, kv_dtype: str = "") -> ModelSize:
    """``model``: a folder with a ``config.json``, such a file, a name of :data:`KNOWN`, or bytes a token.

    ``kv_dtype``: of the kept values; empty: the model's own. Raises :class:`ConfigError`.
    """
    if model.replace(".", "", 1).isdecimal():
        if not 0 < float(model) < math.inf:
            raise ConfigError(f"--model {model}: a token has more bytes than 0, and not infinitely many")
        return ModelSize(f"{model} bytes a token", float(model), *_LLAMA_8B_FLOPS)
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return from_config(path.parent.name, config, kv_dtype=kv_dtype)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: no configuration of a Transformers model: {error!r}") from error
    name = model.rpartition("/")[2].lower().removesuffix("-instruct")
    if name not in KNOWN:
        raise ConfigError(
            f"--model {model}: no folder or file, no bytes a token, and no name that is known; "
            f"{nearest(name, list(KNOWN))}"
        )
    return from_config(name, KNOWN[name], kv_dtype=kv_dtype)


def from_config(name: str, config: dict[str, Any], *, kv_dtype: str = "") -> ModelSize:
    """Raises ``KeyError`` where a figure is missing, :class:`ConfigError` for an unknown type."""
    config = config.get("text_config") or config
    dtype = kv_dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"type {dtype!r} is not one of {', '.join(DTYPES)}")
    hidden = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    heads = config.get("num_attention_heads") or config["n_head"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    types = config.get("layer_types") or ["full_attention"] * layers
    kept = sum(kind != "linear_attention" for kind in types)
    if not kept:
        raise ConfigError("none of its layers keeps keys and values")
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    values = 2 * kv_heads * head_dim
    if rank := config.get("kv_lora_rank"):  # multi-head latent attention keeps one tensor
        rope, v_dim = config["qk_rope_head_dim"], config["v_head_dim"]
        head_dim = config["qk_nope_head_dim"] + rope
        values = rank + rope
        query = config.get("q_lora_rank") or hidden
        attention = (query != hidden) * hidden * query + query * heads * head_dim + hidden * values
        attention += rank * heads * (head_dim - rope + v_dim) + heads * v_dim * hidden
    weights = layers * (attention + 3 * hidden * _inner_size(config, hidden))
    pairs = 2.0 * kept * heads * head_dim  # two products of two operations each, for half of the pairs
    return ModelSize(name, float(kept * values * DTYPES[dtype][1]), 2.0 * weights, pairs)


def _inner_size(config: dict[str, Any], hidden: int) -> int:
    """Width of the MLP that a token passes, all its experts together."""
    if experts := config.get("num_experts_per_tok"):
        shared = config.get("n_shared_experts") or 0
        return int((experts + shared) * (config.get("moe_intermediate_size") or config["intermediate_size"]))
    return int(config.get("intermediate_size") or 4 * hidden)


def _dense(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _dense(576, 1536, 30, 9, 3, 64),
    "llama-3.2-1b": _dense(2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": _dense(3072, 8192, 28, 24, 8),
    "llama-3.1-8b": _dense(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _dense(8192, 28672, 80, 64, 8),
    "llama-3.3-70b": _dense(8192, 28672, 80, 64, 8),
    "mistral-7b-v0.3": _dense(4096, 14336, 32, 32, 8),
    "mixtral-8x7b-v0.1": {**_dense(4096, 14336, 32, 32, 8), "num_experts_per_tok": 2},
    "qwen2.5-0.5b": _dense(896, 4864, 24, 14, 2, 64),
    "qwen2.5-7b": _dense(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _dense(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _dense(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _dense(8192, 29568, 80, 64, 8),
    "qwen3-8b": _dense(4096, 12288, 36, 32, 8),
    "qwen3-32b": _dense(5120, 25600, 64, 64, 8),
    "deepseek-v3": {
        **_dense(7168, 18432, 61, 128, 128),
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "q_lora_rank": 1536,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
    },
}
"""Shapes of well-known models, as their published configurations give them, in 16 bits."""

_LLAMA_8B = from_config("llama-3.1-8b", KNOWN["llama-3.1-8b"])
_LLAMA_8B_FLOPS = (_LLAMA_8B.token_flops, _LLAMA_8B.pair_flops)
"""What a prefill costs where only bytes are given."""
