"""The flag for `vllm serve`, as a shell sees it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvkeep.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["vllm-args", *(str(argument) for argument in arguments)], env={"COLUMNS": "200"})


def test_pasted_into_a_shell_it_is_one_flag_and_json(tmp_path: Path) -> None:
    place = tmp_path / "it's a directory"  # a quote and spaces: what shells trip over
    result = run("--dir", place, "--disk", "20GiB", "--memory", "2GiB")
    assert result.exit_code == 0, result.output
    flag, value = shlex.split(result.stdout)
    assert flag == "--kv-transfer-config"
    assert json.loads(value) == {
        "kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.engines.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"dir": str(place), "disk": "20GiB", "memory": "2GiB"},
    }


def test_json_alone_is_the_same_value() -> None:
    assert json.loads(run("--json").stdout) == json.loads(shlex.split(run().stdout)[1])


def test_a_file_is_named_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvkeep.toml").write_text('disk = "1GiB"\n')
    monkeypatch.chdir(tmp_path)
    value = json.loads(run("--config", "kvkeep.toml", "--json").stdout)
    assert value["kv_connector_extra_config"] == {"config": str(tmp_path / "kvkeep.toml")}


def test_any_other_option_by_its_name() -> None:
    value = json.loads(run("-o", "async_load=true", "-o", 'policy={"disk": "sieve"}', "-o", "ttl=7d", "--json").stdout)
    assert value["kv_connector_extra_config"] == {"async_load": True, "policy": {"disk": "sieve"}, "ttl": "7d"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "alined=true"], "did you mean 'aligned'"),
        (["-o", "aligned"], "NAME=VALUE"),
        (["--policy", "lur"], "did you mean 'lru'"),
        (["--disk", "3Gi"], "'3Gi' is no size"),
        (["--memory", "0", "--disk", "0"], "keeps nothing"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--config", "kvkeep.toml", "--disk", "1GiB"], "in the file that config names"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_says_what(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvkeep.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not result.stdout
