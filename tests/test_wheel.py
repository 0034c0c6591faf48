"""The wheel: what it needs, and that it works in an environment that has nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = {"numpy", "xxhash", "typer", "rich"}


def test_the_dependency_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[^a-z0-9]", name)[0] for name in project["dependencies"]} == NEEDED


@pytest.mark.timeout(400)
def test_the_wheel_alone(tmp_path: Path) -> None:
    """Built, put into an empty environment with its dependencies and theirs, imported, its commands shown."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"kvkeep/py.typed", "kvkeep/cli/constitution.txt"} <= set(names)
    assert not [name for name in names if not name.startswith(("kvkeep/", "kvkeep-"))]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    lock = ROOT / "requirements" / "lock.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "-c", lock, wheel], check=True, capture_output=True, cwd=tmp_path
    )
    program = "import kvkeep, sys; print(sorted({'torch', 'typer', 'rich', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([python, "-I", "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'matplotlib') if u.find_spec(n)])"
    done = subprocess.run([python, "-I", "-c", absent], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    kvkeep = tmp_path / "venv" / "bin" / "kvkeep"
    for arguments in (["--help"], ["stats", "--help"], ["version"]):
        subprocess.run([kvkeep, *arguments], check=True, capture_output=True, cwd=tmp_path)
