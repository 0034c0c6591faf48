"""An engine under test, and the tiny models it serves."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group
from vllm.inputs import TokensPrompt

VOCABULARY = 512


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt. ``logprobs`` are those of the chosen tokens, exact."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int


class Engine:
    """vLLM in this process; with kvkeep where ``extra`` says how. Only one runs at a time: a new one ends the last."""

    running: ClassVar[Engine | None] = None

    def __init__(self, model: Path, extra: dict[str, Any] | None = None, **options: Any) -> None:
        if Engine.running is not None:
            Engine.running.stop()
        if extra is not None:
            options["kv_transfer_config"] = {
                "kv_connector": "KVKeepConnector",
                "kv_connector_module_path": "kvkeep.engines.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": extra,
            }
        options = {
            "skip_tokenizer_init": True, "max_model_len": 2048, "enforce_eager": True, "dtype": "float32",
            "kv_cache_memory_bytes": 128 << 20, "disable_log_stats": False, **options,
        }  # fmt: skip
        try:
            self.llm = LLM(str(model), **options)
        except BaseException:
            ensure_kv_transfer_shutdown()
            cleanup_dist_env_and_memory()
            raise
        Engine.running = self

    def ask(self, prompts: list[list[int]], max_tokens: int = 8, **sampling: Any) -> list[Answer]:
        """Greedy answers, all at once."""
        sampling = {"temperature": 0, "logprobs": 1, "detokenize": False, "ignore_eos": True, **sampling}
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.llm.generate(asked, SamplingParams(max_tokens=max_tokens, **sampling), use_tqdm=False)
        return [_answer(output) for output in outputs]

    def ask_each(self, prompts: list[list[int]], max_tokens: int = 8, **sampling: Any) -> list[Answer]:
        """One after the other."""
        return [self.ask([prompt], max_tokens, **sampling)[0] for prompt in prompts]

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    @property
    def cache(self) -> Any:
        return get_kv_transfer_group()._worker._cache

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def count(self, event: str, **which: str) -> int:
        """Events in the worker so far."""
        return self.cache.counters.count(event, **which)

    def stop(self) -> None:
        Engine.running = None
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()


def _answer(output: Any) -> Answer:
    (one, *_) = output.outputs
    chosen = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
    return Answer(tuple(one.token_ids), tuple(chosen), output.num_cached_tokens)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens; a longer prompt of the same seed begins with the shorter one."""
    source = random.Random(seed)
    return [source.randrange(3, VOCABULARY) for _ in range(length)]


def write_model(folder: Path, kind: str) -> Path:
    """A model with random weights; ``kind`` may end in ``-2`` and so on for other weights."""
    name, _, seed = kind.partition("-")
    if name == "smol":
        from kvkeep.cli.smollm2 import folder as smollm2

        return smollm2()
    torch.manual_seed(int(seed or 0))
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config: Any
    match name:
        case "gqa":
            config = transformers.LlamaConfig(**common, num_key_value_heads=2, head_dim=32)
        case "mha":
            config = transformers.Qwen2Config(**common, num_key_value_heads=4)
        case "sliding":
            config = transformers.MistralConfig(**common, num_key_value_heads=2, head_dim=32, sliding_window=96)
        case "gemma":
            config = transformers.Gemma3TextConfig(
                **common, num_key_value_heads=2, head_dim=32, sliding_window=64,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"], query_pre_attn_scalar=32,
            )  # fmt: skip
        case "mla":
            config = transformers.DeepseekV3Config(
                **common, num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=64, qk_rope_head_dim=64,
                qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                moe_intermediate_size=64, n_shared_experts=1, first_k_dense_replace=3,
            )  # fmt: skip
        case "hybrid":
            config = transformers.Lfm2Config(
                **common, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_multiple_of=32,
                conv_L_cache=3, conv_dim=128, block_dim=128,
            )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # larger than usual, so that greedy answers are no ties
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder
