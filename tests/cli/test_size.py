"""``kvkeep size``: recommendations that follow from prices and targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvkeep.errors import ConfigError
from kvkeep.keys import block_keys
from kvkeep.sim import models
from kvkeep.trace import Recorder

from .conftest import layout
from .test_replay import run, trace

__all__ = ["trace"]  # a fixture

OPTIONS = ("--model", "131072", "--policies", "lru", "--jobs", "1")


def recommended(trace: Path, *options: str) -> dict[str, Any]:
    result = run("size", "--trace", trace, *OPTIONS, *options, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_words_and_figures(trace: Path) -> None:
    result = run("size", "--trace", trace, *OPTIONS, "--memory-price", "3", "--disk-price", "0.1")
    assert result.exit_code == 0, result.output
    for words in ("of memory", "policy", "expected hit ratio", "TTFT saved", "the next GiB of memory", "kvkeep.open("):
        assert words in result.stdout


def test_figures_agree_with_one_another(trace: Path) -> None:
    found = recommended(trace, "--memory-price", "100", "--disk-price", "0.01")
    assert found["disk_bytes"] > 0
    assert {one["write_rule"] for one in found["outcomes"]} == {"all", "predicted", "seen-twice"}
    assert found["token_hit_ratio"] == pytest.approx(found["memory_hit_ratio"] + found["disk_hit_ratio"])
    assert found["token_hit_ratio"] <= found["ceiling"]
    assert found["ttft"] < found["ttft_without"]
    assert found["ttft_saved"] == pytest.approx(found["ttft_without"] - found["ttft"])
    assert found["net_a_month"] == pytest.approx(found["worth_a_month"] - found["cost_a_month"])
    gib = 1 << 30
    cost = (100 * found["memory_bytes"] + 0.01 * found["disk_bytes"]) / gib
    assert found["cost_a_month"] == pytest.approx(cost, rel=1e-6)
    assert found["next_memory"]["cost_a_month"] == 100


def test_prices_move_the_recommendation(trace: Path) -> None:
    cheap = recommended(trace, "--memory-price", "0.01", "--disk-price", "0.01")
    dear = recommended(trace, "--memory-price", "3000", "--disk-price", "3000")
    assert cheap["token_hit_ratio"] == pytest.approx(cheap["ceiling"], abs=0.01)
    assert dear["cost_a_month"] > 0
    assert dear["token_hit_ratio"] < cheap["token_hit_ratio"]
    assert dear["net_a_month"] < cheap["net_a_month"]


def test_a_cache_that_never_pays_is_called_that(trace: Path) -> None:
    result = run("size", "--trace", trace, *OPTIONS, "--gpu-price", "0")
    assert result.exit_code == 0
    assert "No cache pays" in result.stdout


def test_a_target_is_reached_for_the_least_money(trace: Path) -> None:
    low, high = recommended(trace, "--target-hit-ratio", "0.3"), recommended(trace, "--target-hit-ratio", "0.6")
    assert low["token_hit_ratio"] >= 0.3
    assert high["token_hit_ratio"] >= 0.6
    assert low["cost_a_month"] < high["cost_a_month"]
    result = run("size", "--trace", trace, *OPTIONS, "--target-hit-ratio", "0.99", columns=200)
    assert result.exit_code == 2
    assert "out of reach" in result.stderr


def test_limits_hold(trace: Path) -> None:
    found = recommended(trace, "--max-disk", "0", "--max-memory", "100MiB")
    assert found["disk_bytes"] == 0
    assert found["memory_bytes"] <= 100 << 20
    assert len(found["outcomes"]) == 1


def test_what_the_disk_endures_holds(trace: Path) -> None:
    """By another write rule, else without a disk."""
    prices = ("--memory-price", "100", "--disk-price", "0.01")
    free = recommended(trace, *prices)
    fills = {one["write_rule"]: one["disk_fills_a_day"] for one in free["outcomes"]}
    assert fills["seen-twice"] < 0.9 * fills[free["write_rule"]]
    spared = recommended(trace, *prices, "--disk-fills", str(0.9 * fills["all"]))
    assert (spared["write_rule"], spared["disk_bytes"]) == ("seen-twice", free["disk_bytes"])
    none = recommended(trace, *prices, "--disk-fills", "0.0001")
    assert none["disk_bytes"] == none["disk_fills_a_day"] == 0 < none["memory_bytes"]


def test_what_the_disk_endures_holds_for_a_target_too(trace: Path) -> None:
    """By a larger disk, else without one, else not at all, which is said."""
    options = ("--memory-price", "100", "--target-hit-ratio", "0.6")
    free = recommended(trace, *options)
    larger, none = (
        recommended(trace, *options, "--disk-fills", str(share * free["disk_fills_a_day"])) for share in (0.9, 0.5)
    )
    assert larger["disk_bytes"] > free["disk_bytes"] > none["disk_bytes"] == 0
    assert larger["disk_fills_a_day"] <= 0.9 * free["disk_fills_a_day"]
    assert min(one["token_hit_ratio"] for one in (free, larger, none)) >= 0.6
    limits = ("--disk-fills", "0", "--max-memory", "20MiB")
    result = run("size", "--trace", trace, *OPTIONS, *options, *limits, columns=200)
    assert result.exit_code == 2
    assert "out of reach within these limits" in result.stderr


def test_a_recording_of_several_sizes_of_blocks(tmp_path: Path) -> None:
    """That whose blocks are the model's, else the one that was asked for more; and the other is named."""
    recorder = Recorder(tmp_path / "t.jsonl")
    small, large = block_keys(layout("a"), range(64)), block_keys(layout("b"), range(160))
    for now in range(3):
        recorder.lookup(small, num_tokens=64, hit_blocks=0, block_tokens=16, block_nbytes=1600, now=now)
        recorder.lookup(large, num_tokens=160, hit_blocks=0, block_tokens=16, block_nbytes=3200, now=now)
    recorder.close()
    options = ("--trace", tmp_path / "t.jsonl", "--policies", "lru", "--jobs", "1")
    for model, others in (("131072", "1600 bytes a block"), ("100", "3200 bytes a block")):
        result = run("size", *options, "--model", model, columns=300)
        assert result.exit_code == 0, result.output
        assert f"left out: t (16 tokens, {others})" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "unknown-model"),
        ("--model", "0"),
        ("--model", "9" * 400),
        ("--model", "131072", "--max-memory", "0", "--jobs", "1", "--policies", "lru"),
        ("--model", "131072", "--max-memory", "lots"),
        ("--model", "131072", "--max-memory", "1B", "--jobs", "1", "--policies", "lru"),
        ("--model", "131072", "--target-hit-ratio", "1.5"),
        ("--model", "131072", "--policies", "nothing"),
        ("--model", "131072", "--memory-price", "-1"),
        (),
    ],
)
def test_wrong_options(trace: Path, options: tuple[str, ...]) -> None:
    result = run("size", "--trace", trace, *options)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr


def test_models_by_name_folder_and_bytes(tmp_path: Path) -> None:
    llama = models.load("meta-llama/Llama-3.1-8B-Instruct")
    assert llama.token_nbytes == 131072
    assert llama.token_flops == pytest.approx(2 * 6.98e9, rel=0.01)  # 8.03e9 weights without the two embeddings
    assert models.load("deepseek-v3").token_nbytes == 61 * 576 * 2
    assert models.load("deepseek-v3").token_flops == pytest.approx(2 * 37e9, rel=0.05)
    assert models.load("131072").token_nbytes == 131072
    config = {**models.KNOWN["qwen3-8b"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert models.load(str(tmp_path)).token_nbytes == 2 * models.load("qwen3-8b").token_nbytes
    assert models.load(str(tmp_path / "config.json"), kv_dtype="float8_e4m3fn").token_nbytes == 36 * 2 * 8 * 128
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no configuration"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_types": ["linear_attention"] * 36}))
    with pytest.raises(ConfigError, match="none of its layers keeps"):
        models.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"did you mean 'qwen2.5-7b'"):
        models.load("qwen2.5-7")


def test_a_real_models_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2).save_pretrained(
        tmp_path
    )
    size = models.load(str(tmp_path))
    assert size.token_nbytes in (3 * 2 * 2 * 16 * 2, 3 * 2 * 2 * 16 * 4)  # the type is the configuration's default
