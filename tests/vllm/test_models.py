"""Kinds of models and of numbers: served right, or refused at start with a sentence that says why. Also the options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Engine, prompt

from kvkeep.errors import ConfigError

SHARED = prompt(200, seed=4)
PROMPTS = [SHARED[: 60 + 30 * n] + prompt(25 + n, seed=70 + n) for n in range(5)]


@pytest.mark.parametrize(
    ("kind", "dtype", "page"),
    [
        ("gqa", "bfloat16", 128),
        ("gqa", "float16", 32),
        ("mha", "bfloat16", 32),
        ("gemma", "float32", 32),
        ("smol", "float32", 128),
    ],
)
def test_served_like_vllms_own_prefix_cache(
    kind: str, dtype: str, page: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    extra = {"dir": str(tmp_path), "memory": "16MiB", "disk": "256MiB", "block_tokens": 16, "aligned": True}
    engine = Engine(models(kind), extra, dtype=dtype, block_size=page)
    engine.ask_each(PROMPTS, 4)
    own = engine.ask_each(PROMPTS, 4)
    assert engine.count("load") == 0
    engine.stop()
    engine = Engine(models(kind), extra, dtype=dtype, block_size=page)
    assert engine.ask_each(PROMPTS, 4) == own
    assert sum(answer.cached for answer in own) > 0
    assert engine.count("load") > 0
    assert engine.count("save") == 0


def test_latent_attention(models: Callable[[str], Path], tmp_path: Path) -> None:
    """One tensor a layer and pages of 16 tokens; vLLM has no prefix cache for it on the CPU, kvkeep has."""
    extra = {"dir": str(tmp_path), "memory": "16MiB", "disk": "256MiB", "block_tokens": 32}
    engine = Engine(models("mla"), extra, dtype="bfloat16")
    engine.ask_each(PROMPTS)
    warm = engine.ask_each(PROMPTS)
    engine.stop()
    engine = Engine(models("mla"), extra, dtype="bfloat16")
    assert engine.ask_each(PROMPTS) == warm
    assert [answer.cached for answer in warm] == [(len(each) - 1) // 32 * 32 for each in PROMPTS]


def test_other_page_sizes_find_the_same_blocks(models: Callable[[str], Path], tmp_path: Path) -> None:
    extra = {"dir": str(tmp_path), "memory": "16MiB", "disk": "64MiB", "block_tokens": 16}
    texts = []
    for page in (128, 32):
        engine = Engine(models("gqa"), extra, block_size=page)
        texts.append([answer.tokens for answer in engine.ask_each(PROMPTS)])
        assert (engine.count("save") > 0) == (page == 128)
        engine.stop()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("block_tokens", [16, 48, 512])
def test_blocks_that_do_not_fit_pages(block_tokens: int, models: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine(models("gqa"), {"dir": str(tmp_path), "block_tokens": block_tokens}, block_size=32)
    long = [*PROMPTS, prompt(1030, seed=9)]
    cold = engine.ask_each(long)
    engine.forget()
    warm = engine.ask_each(long)
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]
    assert warm[-1].cached == 1029 // block_tokens * block_tokens


@pytest.mark.parametrize("kind", ["hybrid", "sliding"])
def test_state_that_is_no_tokens_is_refused(kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be cut into blocks"):
        Engine(models(kind), {"dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"disc": "1GiB"}, "disk"),
        ({"block_token": 16}, "block_tokens"),
        ({"alligned": True}, "aligned"),
        ({"disk": "many"}, "many"),
        ({"aligned": "yes"}, "aligned is true or false, not 'yes'"),
        ({"async_load": "maybe"}, 'async_load is true, false or "auto", not'),
        ({"codec": "zipp"}, "zipp"),
        ({"config": "/nowhere/kvkeep.toml"}, "/nowhere/kvkeep.toml"),
        ({"config": "kvkeep.toml", "disk": "1GiB"}, "leave config out"),
    ],
)
def test_a_wrong_option_stops_the_start(extra: dict[str, Any], says: str, models: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=says):
        Engine(models("gqa"), extra)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"load_format": "dummy"}, "dummy"), ({"kv_cache_dtype": "fp8"}, "fp8")],
)
def test_what_cannot_be_served_is_refused(
    options: dict[str, Any], says: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, NotImplementedError), match=says):
        Engine(models("gqa"), {"dir": str(tmp_path)}, **options)


def test_blocks_that_no_request_can_fill_are_said(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    Engine(models("gqa"), {"dir": str(tmp_path), "block_tokens": 4096}, block_size=32, max_model_len=2048)
    assert "keeps nothing: block_tokens is 4096, and no request has more than 2048 tokens" in caplog.text


def test_options_from_a_file(models: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "kvkeep.toml"
    file.write_text(f'dir = "{tmp_path / "kv"}"\ndisk = "64MiB"\nmemory = "16MiB"\nblock_tokens = 32\n')
    engine = Engine(models("gqa"), {"config": str(file), "aligned": True}, block_size=64)
    engine.ask_each(PROMPTS)
    engine.forget()
    assert engine.ask(PROMPTS[-1:])[0].cached == (len(PROMPTS[-1]) - 1) // 64 * 64
    assert engine.cache.layout.block_tokens == 32
    assert (tmp_path / "kv" / "models.json").exists()


def test_metrics(models: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine(models("gqa"), {"dir": str(tmp_path), "block_tokens": 16}, block_size=32)
    engine.ask_each(PROMPTS)
    engine.forget()
    engine.ask_each(PROMPTS)
    found: dict[str, float] = {}
    for metric in engine.llm.get_metrics():
        if metric.name.startswith("vllm:kvkeep_"):
            found[metric.name] = found.get(metric.name, 0) + metric.value
    assert found["vllm:kvkeep_save"] == engine.count("save") > 0
    assert found["vllm:kvkeep_load"] == engine.count("load") > 0
    assert found["vllm:kvkeep_load_bytes"] == engine.cache.counters.nbytes("load")
    assert found["vllm:kvkeep_hit_tokens"] > 0
    assert found["vllm:kvkeep_lookup"] == 2 * len(PROMPTS)
