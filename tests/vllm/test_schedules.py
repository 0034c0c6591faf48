"""Whatever the scheduler does (chunks, preemption, aborts, many requests at once), answers stay those of plain vLLM.

The reference is the same engine without kvkeep. Here hits end between vLLM's blocks, so splits differ from its own and
tokens are compared, not log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Engine, prompt
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

PAGE = 32
LONG = 24
"""Tokens of the answers."""

PROMPTS = [
    *(prompt(150, seed=1)[: 70 + 5 * n] + prompt(20 + 9 * n, seed=50 + n) for n in range(12)),
    *(prompt(n, seed=n) for n in (15, 16, 17, 31, 32, 33, 95, 96, 97, 127, 128, 129, 240, 300)),
]
Texts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def reference(models: Callable[[str], Path]) -> Texts:
    engine = Engine(models("gqa"), block_size=PAGE)
    return [answer.tokens for answer in engine.ask_each(PROMPTS, LONG)]


def serve(models: Callable[[str], Path], directory: Path, options: dict[str, Any], **engine: Any) -> Engine:
    extra = {"dir": str(directory), "memory": "32MiB", "disk": "256MiB", "block_tokens": 16, **options}
    return Engine(models("gqa"), extra, **{"block_size": PAGE, **engine})


def texts(engine: Engine, prompts: list[list[int]] = PROMPTS, max_tokens: int = LONG) -> Texts:
    return [answer.tokens for answer in engine.ask(prompts, max_tokens)]


@pytest.mark.parametrize(
    ("options", "engine_options"),
    [
        ({}, {"max_num_batched_tokens": 64, "max_num_seqs": 8}),
        ({"async_load": True}, {"max_num_batched_tokens": 128, "max_num_seqs": 6}),
        ({"share": False}, {"enable_prefix_caching": False, "max_num_seqs": 8}),
    ],
    ids=["chunked prefill", "loads in the background", "no prefix cache of vLLM's"],
)
def test_many_requests_at_once(
    options: dict[str, Any], engine_options: dict[str, Any], models: Callable[[str], Path], tmp_path: Path,
    reference: Texts,
) -> None:  # fmt: skip
    engine = serve(models, tmp_path, options, **engine_options)
    assert texts(engine) == reference
    engine.forget()
    saved = engine.count("save")
    again = engine.ask(PROMPTS, LONG)
    assert [answer.tokens for answer in again] == reference
    assert engine.count("load") > 0
    assert engine.count("save") == saved  # all of it was there
    # All but the prompt's last token and what no block is full of.
    assert all(answer.cached >= (len(each) - 1) // 16 * 16 for answer, each in zip(again, PROMPTS, strict=True))
    engine.cache.flush()
    engine = serve(models, tmp_path, options, **engine_options)
    assert texts(engine) == reference
    assert engine.count("save") == 0


def test_preemption(models: Callable[[str], Path], tmp_path: Path, reference: Texts) -> None:
    small = {"num_gpu_blocks_override": 25, "max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False}
    engine = serve(models, tmp_path, {}, **small)
    assert texts(engine) == reference
    engine.forget()
    assert texts(engine) == reference
    preempted = sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preempted > 0
    assert engine.count("load") > 0


def test_the_cache_is_reset_while_requests_run(models: Callable[[str], Path], tmp_path: Path, reference: Texts) -> None:
    engine = serve(models, tmp_path, {}, max_num_seqs=8)
    found = step_by_step(engine, lambda step, core: step % 7 == 3 and core.reset_prefix_cache(True))
    assert found == dict(enumerate(reference))


def test_aborted_requests(models: Callable[[str], Path], tmp_path: Path, reference: Texts) -> None:
    for options in ({}, {"async_load": True}):
        engine = serve(models, tmp_path, options, max_num_batched_tokens=64, max_num_seqs=8)
        for _ in range(2):
            found = step_by_step(
                engine, lambda step, core: core.abort_request([str(step)]) if step < 20 and step % 3 == 0 else None
            )
            assert len(found) >= len(reference) - 7
            assert all(reference[number] == text for number, text in found.items())
            engine.forget()
        assert not engine.scheduler.connector._scheduler._prompts
        assert not engine.scheduler.connector._scheduler._computing
        assert engine.scheduler.kv_cache_manager.block_pool.get_usage() == 0


def test_several_answers_and_the_prompts_log_probabilities(
    models: Callable[[str], Path], tmp_path: Path, reference: Texts
) -> None:
    engine = serve(models, tmp_path, {})
    sampling = {"max_tokens": 5, "detokenize": False, "ignore_eos": True}
    for _ in range(2):
        asked = [TokensPrompt(prompt_token_ids=each) for each in PROMPTS[:6]]
        (first, *_) = outputs = engine.llm.generate(
            asked, SamplingParams(n=3, temperature=0.8, seed=5, **sampling), use_tqdm=False
        )
        assert all(len(output.outputs) == 3 for output in outputs)
        assert len({tuple(each.token_ids) for each in first.outputs}) > 1
        scored = engine.llm.generate(
            asked, SamplingParams(prompt_logprobs=1, **sampling, temperature=0), use_tqdm=False
        )
        assert [tuple(output.outputs[0].token_ids) for output in scored] == [text[:5] for text in reference[:6]]
        assert all(len(output.prompt_logprobs) == len(each) for output, each in zip(scored, PROMPTS[:6], strict=True))
        engine.forget()


def test_a_request_waits_for_one_that_computes_its_prefix(models: Callable[[str], Path], tmp_path: Path) -> None:
    shared = prompt(600, seed=3)
    prompts = [shared + prompt(20, seed=200 + n) for n in range(4)]
    computed = {}
    for share in (True, False):
        engine = serve(
            models, tmp_path / str(share), {"share": share}, enable_prefix_caching=False,
            max_num_batched_tokens=2048, max_num_seqs=4,
        )  # fmt: skip
        answers = engine.ask(prompts, 4)
        computed[share] = sum(len(each) - answer.cached for each, answer in zip(prompts, answers, strict=True))
    assert computed[False] >= 2048  # as many as a step takes
    assert computed[True] == 620 + 3 * (620 - 592)


def step_by_step(engine: Engine, meanwhile: Callable[[int, Any], Any]) -> dict[int, tuple[int, ...]]:
    """Serve PROMPTS, with something done between steps; the answers by number."""
    core = engine.llm.llm_engine
    sampling = SamplingParams(max_tokens=LONG, temperature=0, detokenize=False, ignore_eos=True)
    for number, each in enumerate(PROMPTS):
        core.add_request(str(number), TokensPrompt(prompt_token_ids=each), sampling)
    found: dict[int, tuple[int, ...]] = {}
    step = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished and output.outputs[0].finish_reason == "length":
                found[int(output.request_id)] = tuple(output.outputs[0].token_ids)
        step += 1
        meanwhile(step, core)
        assert step < 5000
    return found
