"""``kvkeep replay`` on a small trace, and what it says to wrong input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import kvkeep
from kvkeep.cli import app

from .conftest import Pattern, layout


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twenty conversations of six turns, woven into one another; 16-token blocks."""
    lines = []
    for turn in range(6):
        for session in range(20):
            blocks = [0, *(1 + session * 100 + at for at in range(1 + 3 * turn))]
            request = {"timestamp": 1000 * len(lines), "input_length": 16 * len(blocks) + 5, "output_length": 9}
            lines.append(json.dumps(request | {"hash_ids": blocks, "block_size": 16}))
    path = tmp_path / "turns.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_json_is_a_list_of_rows(trace: Path) -> None:
    result = run("replay", trace, "--policies", "fifo", "--capacities", "5%,50,100%", "--json", "--jobs", "1")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["policy"], row["capacity"]) for row in rows[:4]] == [
        ("lru", "5%"),
        ("lru", "50"),
        ("lru", "100%"),
        ("fifo", "5%"),
    ]
    assert {row["policy"] for row in rows} == {"lru", "fifo", "opt", "unlimited"}
    for row in rows:
        assert row["trace"] == "turns"
        assert row["requests"] == 120
        assert 0 <= row["token_hit_ratio"] <= row["block_hit_ratio"] <= 1
        assert 0 <= row["compute_saved"] <= row["token_hit_ratio"]
        assert 1 <= row["capacity_blocks"] <= 321
    whole = {row["policy"]: row["token_hit_ratio"] for row in rows if row["capacity"] in ("100%", "all")}
    assert len(set(whole.values())) == 1


def test_files_of_one_name_are_told_apart(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / trace.name
    other.write_text("\n".join(trace.read_text().splitlines()[:30]))
    result = run("replay", trace, other, "--policies", "lru", "--capacities", "5%", "--jobs", "1")
    assert result.exit_code == 0, result.output
    assert "120 requests" in " ".join(result.stdout.split())
    assert "30 requests" in " ".join(result.stdout.split())


def test_a_table_for_people(trace: Path) -> None:
    result = run("replay", trace, "--capacities", "5%,20%,50%", "--policies", "sieve,fifo", "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert "120 requests" in result.stdout
    for word in ("lru", "sieve", "fifo", "opt", "unlimited", "20%", "compute"):
        assert word in result.stdout
    assert "…" not in result.stdout


def test_all_policies_at_all_capacities_fit_a_terminal(trace: Path) -> None:
    result = run("replay", trace, "--jobs", "1")
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert all(f" {name} " in result.stdout for name in ("lru", "s3fifo", "arc", "opt"))


def test_csv_and_plot(trace: Path, tmp_path: Path) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "curves.png"
    options = ("--policies", "fifo", "--capacities", "5%,50%", "--csv", table, "--plot", picture, "--jobs", "1")
    result = run("replay", trace, *options)
    assert result.exit_code == 0, result.output
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 7
    assert float(rows[0]["token_hit_ratio"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tiers(trace: Path) -> None:
    options = ("--tiers", "memory=5%,disk=50%", "--policies", "lru", "--jobs", "1")
    rows = json.loads(run("replay", trace, *options, "--json").stdout)
    by_rule = {row["write_rule"]: row for row in rows if "write_rule" in row}
    assert set(by_rule) == {"all", "predicted", "seen-twice"}
    assert by_rule["seen-twice"]["disk_written_blocks"] < by_rule["all"]["disk_written_blocks"]
    assert by_rule["all"]["memory_capacity_blocks"] == 16
    text = run("replay", trace, *options)
    assert text.exit_code == 0
    assert "written to" in text.stdout


def test_capacities_in_bytes_need_a_model(trace: Path) -> None:
    def blocks(*options: str) -> set[int]:
        arguments = ("--capacities", "1MiB", "--policies", "lru", "--json", "--jobs", "1")
        rows = json.loads(run("replay", trace, *arguments, *options).stdout)
        return {row["capacity_blocks"] for row in rows if row["policy"] == "lru"}

    assert blocks("--model", "1024") == {64}
    assert blocks("--model", "smollm2-135m") == {(1 << 20) // (16 * 22.5 * 1024)}
    result = run("replay", trace, "--capacities", "1MiB")
    assert result.exit_code == 2
    assert "--model" in result.output


def test_a_recording_of_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with kvkeep.open(memory="4MiB", trace=path) as cache:
        bound = cache.bind(layout("one"))
        for end in (32, 64, 64):
            bound.match(list(range(end)))
            bound.save(list(range(end)), Pattern())
    rows = json.loads(run("replay", path, "--capacities", "100%", "--policies", "lru", "--json", "--jobs", "1").stdout)
    assert rows[0]["requests"] == 3
    assert rows[0]["hit_tokens"] == 32 + 64
    assert run("replay", path, "--capacities", "4KiB,1MiB", "--jobs", "1").exit_code == 0


def test_two_traces_apart_and_merged(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(trace.read_text())
    options = ("--capacities", "100%", "--policies", "lru", "--json", "--jobs", "1")
    apart = json.loads(run("replay", trace, other, *options).stdout)
    assert [row["trace"] for row in apart] == ["turns"] * 3 + ["other"] * 3
    merged = json.loads(run("replay", trace, other, "--merge", *options).stdout)
    assert [row["requests"] for row in merged] == [240] * 3
    assert merged[0]["token_hit_ratio"] > apart[0]["token_hit_ratio"]
    third = tmp_path / "third.jsonl"
    third.write_text('{"timestamp": 0, "input_length": 64, "hash_ids": [1, 2], "block_size": 32}')
    merged = json.loads(run("replay", trace, third, other, "--merge", *options).stdout)
    assert [row["trace"] for row in merged] == ["turns+other"] * 3 + ["third"] * 3, "blocks of another size stay apart"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "lruu"), "did you mean 'lru'"),
        (("--capacities", "120%"), "120%"),
        (("--capacities", "5%,,10%"), "no size"),
        (("--capacities", "some"), "no size"),
        (("--capacities", "1.5"), "whole blocks (5000)"),
        (("--capacities", "1%", "--tiers", "memory=1%,disk=5%"), "leave capacities out"),
        (("--write-rules", "all"), "write rules are for several tiers"),
        (("--model", "0"), "more bytes than 0"),
        (("--tiers", "memory"), "NAME=CAPACITY"),
        (("--tiers", "memory=1%,disk=5%", "--write-rules", "some"), "write rule"),
        (("--tiers", "memory=1%,disk=5%", "--plot", "x.png"), "--plot"),
        (("--plot", "x.bmp"), ".png"),
        (("--plot", "/nowhere/x.png"), "directory"),
        (("--model", "no-such-model"), "no name that is known"),
        (("--csv", "/nowhere/x.csv", "--policies", "lru", "--capacities", "5%", "--jobs", "1"), "cannot be written"),
    ],
)
def test_wrong_options(trace: Path, options: tuple[str, ...], message: str) -> None:
    result = run("replay", trace, *options, columns=300)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"timestamp": 0, "input_len', "line 1"),
        ('{"colour": 1}', "line 1"),
        ("PNG or something", "no trace that is known"),
        ('{"prompt": "text"}', "--tokenizer"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    result = run("replay", path, columns=300)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert str(path) in result.stderr.replace("\n", "")
    assert run("replay", tmp_path / "none").exit_code == 2
