"""Tiny random models, one of each kind that matters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 256


def llama(seed: int = 0, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Grouped queries, rope, 3 layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": None,
            "bos_token_id": None,
            **options,
        }
    )
    return quiet(LlamaForCausalLM(config).to(dtype).eval())


def gpt2(seed: int = 0) -> Any:
    """As many KV heads as heads, learned positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return quiet(GPT2LMHeadModel(config).eval())


def quiet(model: Any) -> Any:
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(length: int, seed: int = 1) -> torch.Tensor:
    """``[1, length]`` tokens, none of them the padding's."""
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, new: int = 12, **options: Any) -> torch.Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))  # else token 0 counts as padding
    result: torch.Tensor = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    return result
