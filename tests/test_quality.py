"""The report of ``kvkeep quality``: what is kept, and which codec it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import kvkeep
from kvkeep import quality
from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import KVLayout

IDENTITY = ModelIdentity("files abc tensors-as-float32", "bfloat16", namespace=b"secret")
LAYOUT = KVLayout.uniform(IDENTITY, num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16", block_tokens=16)


def report(**kl: float) -> dict[str, object]:
    return {
        "model": "m",
        "date": "2026-11-24",
        "codecs": {name.replace("_", "-"): {"kl_mean": kl} for name, kl in kl.items()},
    }


def test_a_codec_above_the_limit_is_refused_for_this_model_only(tmp_path: Path) -> None:
    quality.save(tmp_path, IDENTITY, report(uqz=0.003, uqz_max=0.031))
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec={"disk": "uqz-max"}) as cache:
        with pytest.raises(ConfigError, match=r"uqz-max.*0\.0310.*max_kl=0\.01"):
            cache.bind(LAYOUT)
        other = ModelIdentity("files def", "bfloat16")
        cache.bind(KVLayout.uniform(other, num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16"))
    for allowed in ({"codec": "uqz"}, {"codec": "uqz-max", "force": True}, {"codec": "uqz-max", "max_kl": 0.04}):
        with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", **allowed) as cache:  # type: ignore[arg-type]
            cache.bind(LAYOUT)


def test_without_a_report_nothing_is_refused(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="1MiB", disk="8MiB", codec="uqz-max", max_kl=0.0) as cache:
        cache.bind(LAYOUT)


def test_what_does_not_change_the_model_does_not_change_its_report(tmp_path: Path) -> None:
    quality.save(tmp_path, IDENTITY, report(int4=0.5))
    for same in (
        ModelIdentity("files abc", "float32", rope="{}", numerics="vllm"),  # another engine
        ModelIdentity("files abc tensors-as-bfloat16", "bfloat16", namespace=b"another tenant"),
    ):
        assert quality.measured_kl(tmp_path, same, "int4") == 0.5
    for other in (ModelIdentity("files abcd", "bfloat16"), ModelIdentity("files abc", "bfloat16", adapters=("lora",))):
        assert quality.measured_kl(tmp_path, other, "int4") is None


def test_a_second_measurement_adds_to_the_first(tmp_path: Path) -> None:
    quality.save(tmp_path, IDENTITY, report(int4=0.5, int8=0.1))
    path = quality.save(tmp_path, IDENTITY, report(int8=0.0002))
    assert [quality.measured_kl(tmp_path, IDENTITY, name) for name in ("int4", "int8", "uqz")] == [0.5, 0.0002, None]
    assert path.stat().st_mode & 0o077 == 0
    assert "secret" not in path.read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "[" * 10_000, "nan"])
def test_a_file_that_is_no_report_refuses_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / quality.FILE).write_text(content)
    quality.check(tmp_path, IDENTITY, ["int4"])
    entry = {quality.model_key(IDENTITY): {"codecs": {"int4": {"kl_mean": "many"}}}}
    (tmp_path / quality.FILE).write_text(json.dumps(entry))
    quality.check(tmp_path, IDENTITY, ["int4"])


def test_a_pipe_in_its_place_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / quality.FILE)
    quality.check(tmp_path, IDENTITY, ["int4"])


def test_not_a_number_is_above_any_limit(tmp_path: Path) -> None:
    quality.save(tmp_path, IDENTITY, report(int4=float("nan")))
    with pytest.raises(ConfigError):
        quality.check(tmp_path, IDENTITY, ["int4"])
