"""``make audit``: is what is installed what was pinned, unchanged since, and free of known vulnerabilities?

1. every package of this environment stands in the lock file, in this version;
2. every file of theirs has the SHA-256 that its package recorded at installation;
3. pip-audit knows no advisory about any pin (audit.py LOCK PIP_AUDIT; it lives in an environment of its own).

The third needs a network. What no database was asked about is said, never passed over as fine. Exit status: 0 if all
that could be checked is right, 1 if something is wrong, 3 with --strict if a check could not be made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

OURS = {"kvkeep"}
TOOLS = {"pip", "setuptools", "wheel"}  # come with the environment, not from the lock


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: Path) -> dict[str, str]:
    """Name → version, and a complaint about each line that pins nothing or twice."""
    found: dict[str, str] = {}
    for number, line in enumerate(lock.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)", text)
        if match is None or canonical(match[1]) in found:
            raise SystemExit(f"{lock}:{number}: not one package with one version: {text}")
        found[canonical(match[1])] = match[2]
    return found


def not_pinned(lock: dict[str, str]) -> list[str]:
    wrong = []
    for distribution in distributions():
        name, version = canonical(distribution.name), distribution.version
        if name in OURS | TOOLS:
            continue
        if name not in lock:
            wrong.append(f"{name} {version} is installed and not pinned")
        elif version.partition("+")[0] != lock[name].partition("+")[0]:
            wrong.append(f"{name} {version} is installed, {lock[name]} is pinned")
    return sorted(wrong)


def changed(distribution: Distribution) -> list[str]:
    """Files that are not what the package's RECORD says. Byte code is not recorded, and not checked."""
    wrong = []
    for file in distribution.files or []:
        if file.hash is None or file.suffix == ".pyc":
            continue
        path = Path(str(file.locate()))
        try:
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        except OSError:
            wrong.append(f"{path} of {distribution.name} is gone")
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            wrong.append(f"{path} of {distribution.name} was changed")
    return wrong


def advisories(lock: Path, pip_audit: str) -> tuple[list[str], int, str]:
    """Advisories, how many pins a database was asked about, and why not more."""
    command = [pip_audit, "--requirement", str(lock), "--no-deps", "--disable-pip", "--format", "json",
               "--progress-spinner", "off", "--timeout", "15"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        report = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], 0, str(error)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return [], 0, lines[-1][:200] if lines else f"pip-audit ended with status {done.returncode}"
    asked = [each for each in report["dependencies"] if "skip_reason" not in each]
    skipped = [each["skip_reason"] for each in report["dependencies"] if "skip_reason" in each]
    found = [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no version'}"
        for each in asked
        for flaw in each["vulns"]
    ]
    return found, len(asked), f"{len(skipped)} skipped, the first: {skipped[0]}" if skipped else ""


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--strict"]
    path = Path(arguments[0])
    lock = pins(path)
    wrong = not_pinned(lock)
    print(f"pins: {len(lock)} in {path}; {len(wrong)} installed packages differ")
    installed = [each for each in distributions() if canonical(each.name) not in OURS]
    edited = [line for each in installed for line in changed(each)]
    print(f"files: those of {len(installed)} packages against their recorded SHA-256; {len(edited)} differ")
    known, asked, why = advisories(path, arguments[1])
    if asked:
        print(f"advisories: a database was asked about {asked} of {len(lock)} pins; {len(known)} found. {why}".strip())
    else:
        print(f"advisories: NOT CHECKED, no database could be reached from here ({why})")
    for line in wrong + edited + known:
        print(f"  {line}")
    if wrong or edited or known:
        sys.exit(1)
    if "--strict" in sys.argv and asked < len(lock):
        sys.exit(3)


if __name__ == "__main__":
    main()
