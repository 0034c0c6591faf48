"""``make audit`` says what is not pinned, what was changed, which advisories there are, and what it could not ask."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_file_pins_each_package_once(audit: ModuleType) -> None:
    lock = audit.pins(ROOT / "requirements" / "lock.txt")
    assert {"numpy", "xxhash", "cryptography", "pip-audit"} <= set(lock)


@pytest.mark.parametrize("line", ["numpy>=2", "numpy", "numpy==1\nNumPy==2", "numpy==1; python_version>'3'", "-e ."])
def test_a_lock_file_that_pins_nothing(audit: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "lock.txt").write_text(f"# pins\nxxhash==1.0\n{line}\n")
    with pytest.raises(SystemExit, match=r"lock\.txt:[34]: not one package with one version"):
        audit.pins(tmp_path / "lock.txt")


def test_what_is_installed_and_not_pinned(audit: ModuleType) -> None:
    lock = audit.pins(ROOT / "requirements" / "lock.txt")
    del lock["numpy"]
    lock["xxhash"] = "0.0.1"
    wrong = " ".join(audit.not_pinned(lock))
    assert "numpy" in wrong
    assert "0.0.1 is pinned" in wrong


def test_a_file_that_was_changed(audit: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (tmp_path / "thing.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("y = 1\n")
    right = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).rstrip(b"=").decode()
    names = ("thing.py", "other.py", "gone.py")
    record = "".join(f"{name},sha256={right},6\n" for name in names)
    (folder / "RECORD").write_text(record + "thing-1.0.dist-info/RECORD,,\n")
    wrong = audit.changed(PathDistribution(folder))
    assert [Path(line.split(" of ")[0]).name for line in wrong] == ["other.py", "gone.py"]
    assert wrong[0].endswith("was changed")
    assert wrong[1].endswith("is gone")


def fake(tmp_path: Path, program: str) -> str:
    script = tmp_path / "pip-audit"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    return str(script)


def test_advisories(audit: ModuleType, tmp_path: Path) -> None:
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]},
            {"name": "b", "version": "1", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        ]
    }
    found = audit.advisories(tmp_path, fake(tmp_path, f"print({json.dumps(json.dumps(report))})\nraise SystemExit(1)"))
    assert found == (["a 1: CVE-1, fixed in 2"], 2, "1 skipped, the first: not found")


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit('ConnectionError: no route')",
        f"print({json.dumps(json.dumps({'dependencies': [{'name': 'a', 'skip_reason': 'no route'}]}))})",
    ],
)
def test_no_database(audit: ModuleType, tmp_path: Path, program: str) -> None:
    """pip-audit itself says "no known vulnerabilities" where it could ask nobody."""
    known, asked, why = audit.advisories(tmp_path, fake(tmp_path, program))
    assert (known, asked) == ([], 0)
    assert "no route" in why
    assert audit.advisories(tmp_path, str(tmp_path / "none"))[1] == 0
