"""The examples run, and do what they say; the README's five lines too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvkeep.testing.servers import RedisServer

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_own_engine(tmp_path: Path) -> None:
    program = ROOT / "examples" / "own_engine.py"
    assert run(program, tmp_path) == ["blocks kept: 7", "tokens loaded: 896", "bit for bit: True"]
    assert run(program, tmp_path)[0] == "blocks kept: 0"


@pytest.mark.model
def test_chat(tiny_model: Path, tmp_path: Path) -> None:
    program = ROOT / "examples" / "chat.py"
    first, second = run(program, tiny_model, tmp_path / "kept")
    assert first.startswith("0 of ")
    assert not second.startswith("0 of ")
    assert not run(program, tiny_model, tmp_path / "kept")[0].startswith("0 of ")


COMPUTED_FIRST = (
    "computed: A × B, A + B, A - B, X W + b, 9 elements, search 'rivers', features of 7, features of 7, "
    "price of ACME, price of ACME"
)
COMPUTED_AGAIN = "computed: features of 7, price of ACME, price of ACME"
PATIENT = "?lookup_timeout=20&load_timeout=20&save_timeout=20"


@pytest.mark.parametrize("where", ["memory", "directory", "server"])
def test_values(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    """Matrix work whole and by element, search results, features and a live price; on a server as the issue asks."""
    program = ROOT / "examples" / "values.py"
    place = {"memory": [], "directory": [str(tmp_path)]}.get(where)
    if place is None:
        place = [request.getfixturevalue("redis_shared").url + PATIENT]
    lines = run(program, *place)
    assert lines[0].startswith("C[1] = [11.4 13.6 15.8]")
    assert "price: 101.5 101.5 102.25" in lines
    assert lines[-1] == COMPUTED_FIRST
    if where != "memory":
        time.sleep(2.1)  # the price, which may be stale for a second, has gone
        assert run(program, *place)[-1] == COMPUTED_AGAIN


@pytest.mark.model
def test_embeddings(redis_shared: RedisServer) -> None:
    """A real encoder of the BERT type: each sentence is encoded once, also by the next process."""
    program = ROOT / "examples" / "embeddings.py"
    first = run(program, redis_shared.url + PATIENT)
    assert first == [
        "encoded: 4", "shape: (4, 384) float32", "nearest: Which river crosses the most countries?",
        "same sentence, same vector: True",
    ]  # fmt: skip
    assert run(program, redis_shared.url + PATIENT) == ["encoded: 0", *first[1:]]


@pytest.mark.model
def test_two_processes(tiny_model: Path) -> None:
    lines = run(ROOT / "examples" / "two_processes.py", tiny_model)
    cached = [int(re.search(r"(\d+) of (\d+) tokens", line)[1]) for line in lines]  # type: ignore[index]
    assert [line.split(":")[0] for line in lines] == [
        "A reads", "B reuses", "another question", "Redis is dead", "Redis is dead", "a newcomer without Redis",
    ]  # fmt: skip
    assert cached[0] == 0
    assert min(cached[1:5]) > 1000
    assert "from remote" in lines[1]
    assert cached[5] == 0


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readmes_five_lines(readme: str) -> None:
    """The names exist and are called as they can be called."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    block = re.search(r"```python\n(import kvkeep\n.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 5
    assert lines[2] == 'cache = kvkeep.open("~/.cache/kvkeep", memory="2GiB", disk="20GiB")'
    compile(block[1], readme, "exec")


def test_readmes_are_twins() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    blocks = [re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) for text in texts]
    assert [kind for kind, _ in blocks[0]] == [kind for kind, _ in blocks[1]]
    commands = [[code for kind, code in found if kind == "sh"] for found in blocks]
    assert commands[0] == commands[1]


def test_what_extending_md_shows_passes_its_suites(tmp_path: Path) -> None:
    """Its code as it stands, in one file, run by pytest."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    program = tmp_path / "test_extending.py"
    program.write_text("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    summary = run("-m", "pytest", "-q", "-p", "no:cacheprovider", program)[-1]
    assert re.fullmatch(r"\d+ passed in .*", summary), summary
    assert int(summary.split()[0]) > 40
