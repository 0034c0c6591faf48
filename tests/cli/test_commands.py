"""stats, verify and clear on a real directory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import kvkeep
from kvkeep.cli import app

from .conftest import TOKENS, Pattern, layout


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def damage(directory: Path) -> None:
    """Flip one bit in the payload of one of model one's blocks."""
    for path in directory.glob("slab-*.data"):
        data = bytearray(path.read_bytes())
        at = data.find(bytes([2]) * 256)
        if at >= 0:
            data[at] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError("no block found")


def cached(directory: Path, model: str, tokens: list[int]) -> int:
    with kvkeep.open(directory, memory="4MiB", disk="16MiB") as cache:
        return cache.bind(layout(model)).match(tokens).num_blocks


def test_stats_counts_each_model(directory: Path) -> None:
    result = run("stats", directory, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["blocks"] == 6
    assert [(row["model"], row["blocks"], row["tokens"]) for row in facts["models"]] == [("one", 4, 64), ("two", 2, 32)]
    assert facts["nbytes_on_disk"] >= sum(row["nbytes"] for row in facts["models"]) > 6 * layout("one").block_nbytes
    assert all(abs(row["newest"] - time.time()) < 60 for row in facts["models"])


def test_stats_is_a_table_for_people(directory: Path) -> None:
    text = run("stats", directory).stdout
    assert "one" in text
    assert "6 blocks" in text


def test_stats_without_models_file_still_counts(directory: Path) -> None:
    (directory / "models.json").write_text("[")
    facts = json.loads(run("stats", directory, "--json").stdout)
    assert [row["model"] for row in facts["models"]] == ["unknown", "unknown"]
    assert facts["blocks"] == 6


def test_verify_of_a_whole_directory(directory: Path) -> None:
    result = run("verify", directory)
    assert result.exit_code == 0, result.output
    assert "6 blocks" in result.stdout
    assert "0 damaged" in result.stdout


def test_verify_finds_and_fixes_damage(directory: Path) -> None:
    damage(directory)
    result = run("verify", directory, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["causes"] == {"checksum": 1}
    result = run("verify", directory, "--fix", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["dropped"] == 1
    assert run("verify", directory).exit_code == 0
    assert json.loads(run("stats", directory, "--json").stdout)["blocks"] == 5


def test_a_directory_in_use_is_left_to_its_owner(directory: Path) -> None:
    with kvkeep.open(directory, memory="4MiB", disk="16MiB") as cache:
        bound = cache.bind(layout("one"))
        assert run("verify", directory).exit_code == 0
        damage(directory)
        result = run("verify", directory, "--fix")
        assert result.exit_code == 1
        assert "held by another process" in result.stdout
        assert run("clear", directory, "--all").exit_code == 1
        assert bound.match(TOKENS).num_blocks == 4
        assert bound.save(list(range(100, 132)), Pattern()) == 2


def test_clear_of_a_model_that_is_not_there_names_those_that_are(directory: Path) -> None:
    result = run("clear", directory, "--model", "onne")
    assert result.exit_code == 2
    assert "one, two" in result.stderr
    assert json.loads(run("stats", directory, "--json").stdout)["blocks"] == 6


def test_clear_all(directory: Path) -> None:
    result = run("clear", directory, "--all")
    assert result.exit_code == 0, result.output
    assert "dropped 6 blocks" in result.stdout
    assert cached(directory, "one", TOKENS) == 0


@pytest.mark.parametrize("by_layout", [False, True])
def test_clear_a_model(directory: Path, by_layout: bool) -> None:
    result = run("clear", directory, "--model", layout("one").fingerprint.hex()[:12] if by_layout else "one")
    assert "dropped 4 blocks" in result.stdout
    assert cached(directory, "one", TOKENS) == 0
    assert cached(directory, "two", TOKENS[:32]) == 2


def test_clear_what_is_old(directory: Path) -> None:
    assert "dropped 0 blocks" in run("clear", directory, "--older-than", "1h").stdout
    time.sleep(0.05)
    assert "dropped 6 blocks" in run("clear", directory, "--older-than", "0.01s").stdout


def test_clear_needs_to_be_told_what(directory: Path) -> None:
    for arguments in ([], ["--all", "--model", "one"], ["--older-than", "soon"]):
        assert run("clear", directory, *arguments).exit_code == 2
    assert cached(directory, "one", TOKENS) == 4


def test_commands_make_no_file_where_they_only_look(directory: Path) -> None:
    before = sorted(os.listdir(directory))
    run("stats", directory)
    run("verify", directory)
    assert sorted(os.listdir(directory)) == before


@pytest.mark.parametrize("command", ["stats", "verify", "clear"])
def test_a_directory_that_is_not_there(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path / "no", *(["--all"] if command == "clear" else []))
    assert result.exit_code == 2
    assert "there is no cache at" in result.stderr
    assert not (tmp_path / "no").exists()


def test_the_directory_comes_from_the_configuration(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kvkeep.toml"
    file.write_text(f'dir = "{directory}"\n')
    monkeypatch.setenv("KVKEEP_CONFIG", str(file))
    assert json.loads(run("stats", "--json").stdout)["blocks"] == 6
    file.write_text(f'dri = "{directory}"\n')
    result = run("stats")
    assert result.exit_code == 2
    assert "'dir'" in result.stderr


@pytest.mark.parametrize("command", ["demo", "stats", "verify", "clear", "version"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_version() -> None:
    assert run("version").stdout.strip() == f"kvkeep {kvkeep.__version__}"
