"""The demo: its arithmetic on made-up results, all of it on a tiny model, and on the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import kvkeep.cli.demo as demo_module
from kvkeep.cli import app
from kvkeep.cli.demo import QUESTIONS, MeasureError, Row, measure, show, tabulate
from kvkeep.cli.measure import Job

FIELDS = [
    "question", "prompt_tokens", "cached_tokens", "cold_seconds", "memory_seconds", "restart_seconds", "same_answer",
]  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


def results(**changes: Any) -> list[dict[str, Any]]:
    """One question's results in three phases; ``changes`` go into the restart's."""
    base = {"question": 0, "prompt_tokens": 100, "cached_tokens": 64, "seconds": 0.5, "tokens": [1, 2], "answer": "a"}
    return [
        {**base, "phase": "cold", "seconds": 5.0, "cached_tokens": 0},
        {**base, "phase": "memory"},
        {**base, "phase": "restart", **changes},
    ]


def run(out: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["demo", "--out", str(out), *arguments])


def test_rows_have_exactly_the_fields_that_are_promised() -> None:
    (row,) = tabulate(["q"], results(cached_tokens=80))
    assert list(asdict(row)) == FIELDS
    assert row.cached_tokens == 64
    assert row.same_answer


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, 0), ({"tokens": [1, 3]}, 1), ({"cached_tokens": 0}, 1)],
    ids=["good", "differs", "none"],
)
def test_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], status: int) -> None:
    made = results(**changes)
    monkeypatch.setattr(demo_module, "measure", lambda job, progress: [r for r in made if r["phase"] in job.phases])
    result = run(tmp_path, "--question", "q", "--json")
    assert result.exit_code == status, result.output
    assert [row["same_answer"] for row in json.loads(result.stdout)["questions"]] == ["tokens" not in changes]


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--model", str(tmp_path / "no-such-folder"))
    assert result.exit_code == 2
    assert "could not run" in result.stderr
    assert "there is no model at" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_without_a_model_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    result = run(tmp_path / "out", "--model", str(tmp_path / "folder"))
    assert result.exit_code == 2
    assert "there is no model in" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("document", ["no-such-file", ".", "latin"])
def test_a_document_that_cannot_be_read_is_said(tmp_path: Path, document: str) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    result = run(tmp_path / "out", "--document", str(tmp_path / document))
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr.replace("\n", "")


def test_the_table_shows_all_of_it_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("问题" * 20, 13_521, 13_504, 168.88, 19.87, 14.43, same_answer=True)
    show([row], {0: "an answer"}, "model", Console(width=80))
    out = capsys.readouterr().out
    assert all(figure in out for figure in ("13,521", "13,504", "168.88 s", "19.87 s", "14.43 s", "8× / 12×", "yes"))
    assert "answer" in out.split("an answer")[0]


def test_a_measuring_process_that_dies_is_an_error() -> None:
    with pytest.raises(MeasureError, match="phases"):
        measure(Job(phases=5, model="", document="", questions=[], directory="", new_tokens=1), print)  # type: ignore[arg-type]


def test_one_question_is_chinese_with_the_example() -> None:
    assert any("「今天天气很好，适合出门」" in question for question in QUESTIONS)


@pytest.mark.model
def test_demo_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--model", str(tiny_model), "--new-tokens", "4", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures == json.loads((tmp_path / "demo.json").read_text())
    assert list(figures) == ["questions", "model"]
    assert [row["question"] for row in figures["questions"]] == list(QUESTIONS)
    for row in figures["questions"]:
        assert list(row) == FIELDS
        assert 3000 <= row["cached_tokens"] < row["prompt_tokens"]
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


@pytest.mark.model
@pytest.mark.timeout(600)
def test_demo_on_the_real_model(tmp_path: Path) -> None:
    """One question only: the whole demo is `make demo`."""
    command = [sys.executable, "-m", "kvkeep.cli", "demo", "--out", str(tmp_path), "--question", QUESTIONS[0], "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["questions"]
    assert row["same_answer"]
    assert row["cached_tokens"] >= 3000
    assert max(row["memory_seconds"], row["restart_seconds"]) < row["cold_seconds"] / 3
