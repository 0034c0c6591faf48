"""The demo: its verdict on made-up answers, all of it on a real server, and what a Ctrl-C leaves behind: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import kvkeep.cli.demo_vllm as demo_module
from kvkeep.cli import app
from kvkeep.cli.demo_vllm import Answer, Row

COMMAND = [sys.executable, "-m", "kvkeep.cli", "demo-vllm"]


def row(**restart: Any) -> Row:
    facts = {"seconds": 0.2, "text": "yes", "prompt_tokens": 100, "cached_tokens": 96, **restart}
    cold = Answer(4.0, "yes", 100, 0)
    return Row("q", cold, Answer(0.3, "yes", 100, 64), cold, Answer(**facts))


@pytest.mark.parametrize(
    ("restart", "status"),
    [({}, 0), ({"text": "no"}, 1), ({"cached_tokens": 0}, 1)],
    ids=["good", "differs", "nothing reused"],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_exit_status_and_output(
    restart: dict[str, Any], status: int, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "measure", lambda *_: [row(), row(**restart)])
    result = CliRunner().invoke(app, ["demo-vllm", "--model", "any", *flags])
    assert result.exit_code == status, result.output
    if flags:
        (line,) = result.stdout.splitlines()
        facts = json.loads(line)
        assert facts["same_answers"] is ("text" not in restart)
        assert (facts["cold_seconds"], facts["prefix_cache_seconds"], facts["restart_seconds"]) == (4.0, 0.3, 0.2)
    else:
        assert "NO" in result.stdout or "text" not in restart


def test_a_server_that_does_not_start_is_explained(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--model", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "vllm serve ended" in done.stderr
    assert "config.json" in done.stderr or str(tmp_path) in done.stderr
    assert not done.stdout


def test_the_whole_demo(tmp_path: Path) -> None:
    """A short document: the servers' starts are what takes long."""
    document = tmp_path / "short.txt"
    document.write_text(" ".join(f"Room {number} is for guest {number * 7 % 100}." for number in range(40)))
    done = subprocess.run(
        [*COMMAND, "--json", "--document", str(document), "--new-tokens", "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["same_answers"] is True
    assert all(
        prompt - 32 <= cached < prompt
        for prompt, cached in zip(facts["prompt_tokens"], facts["restart_cached_tokens"], strict=True)
    )
    assert facts["restart_seconds"] < facts["cold_seconds"]
    assert "question 3 of 3" in done.stderr  # progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_the_demo_ends_its_server(number: signal.Signals) -> None:
    demo = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = psutil.Process(demo.pid)

    def servers() -> list[psutil.Process]:
        return [child for child in process.children(recursive=True) if "serve" in child.cmdline()]

    deadline = time.monotonic() + 120
    while not servers():
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)
    family = process.children(recursive=True)
    os.kill(demo.pid, number)
    assert demo.wait(60) != 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert gone or alive
