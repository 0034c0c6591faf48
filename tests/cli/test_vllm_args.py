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
    for how in (("--config", "kvkeep.toml"), ("-o", "config=kvkeep.toml")):
        value = json.loads(run(*how, "--json").stdout)
        assert value["kv_connector_extra_config"] == {"config": str(tmp_path / "kvkeep.toml")}


def test_paths_are_full_however_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has another working directory than this shell."""
    monkeypatch.chdir(tmp_path)
    value = json.loads(run("-o", "dir=kv", "-o", "trace=requests.jsonl", "--json").stdout)
    assert value["kv_connector_extra_config"] == {
        "dir": str(tmp_path / "kv"),
        "trace": str(tmp_path / "requests.jsonl"),
    }


def test_an_address_that_only_the_server_can_read() -> None:
    value = json.loads(run("--remote", "env:REDIS_URL_OF_THE_SERVER", "-o", "encryption=env:KEY", "--json").stdout)
    assert value["kv_connector_extra_config"]["remote"] == "env:REDIS_URL_OF_THE_SERVER"


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
        (["--disk", "20"], "20 bytes are too few"),
        (["--remote", "http://x"], "begin with http://; known: redis,"),
        (["--remote", "redis//x"], "has no ://"),
        (["-o", "encryption=5"], 'encryption is "env:NAME" or "file:PATH"'),
        (["-o", 'encryption=["env:KEY", "plainkey"]'], 'encryption is "env:NAME" or "file:PATH"'),
        (["-o", "encryption=plainkey"], 'encryption is "env:NAME" or "file:PATH"'),
        (["--memory", "2GiB", "-o", "memory=1GiB"], "memory is given twice"),
        (["-o", "disk=1GiB", "-o", "disk=2GiB"], "disk is given twice"),
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
    assert "plainkey" not in result.stderr  # it may be the key itself
    assert not result.stdout
