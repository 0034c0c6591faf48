"""The examples run, and do what they say; the README's five lines too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
