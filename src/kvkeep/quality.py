"""What lossy codecs cost a model: the report that ``kvkeep quality`` leaves in a cache directory, and its limit.

``quality.json`` holds one report a model, under the digest of its weights' bytes and adapters (so the engine, the type
of its KV and the tenant do not matter). Where there is one, a cache refuses a codec whose KL divergence on this model
is above ``max_kl``. Numbers only, no secrets. A file that cannot be read is no report.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.stores.disk import make_directory

FILE = "quality.json"
DEFAULT_DIR = Path("~/.cache/kvkeep").expanduser()
"""Where a cache without a directory looks."""

MAX_NBYTES = 16 << 20
MAX_KL = 0.01
"""Nats a token. Bfloat16 arithmetic alone costs about 0.001; at 0.01 one greedy token in thirty is another."""


def model_key(identity: ModelIdentity) -> str:
    """What a report is kept under. Of ``files DIGEST …`` the two words that all engines agree on."""
    parts = (" ".join(identity.weights.split()[:2]), *identity.adapters)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepare(directory: Path) -> None:
    """Make the directory. Raises ``OSError`` where :meth:`save` could keep no report."""
    make_directory(directory)
    fd, temporary = tempfile.mkstemp(prefix=f".{FILE}-", dir=directory)
    os.close(fd)
    os.unlink(temporary)
    if (directory / FILE).is_dir():
        raise IsADirectoryError(f"{directory / FILE} is a folder, where the report should be kept")


def save(directory: Path, identity: ModelIdentity, report: Mapping[str, Any]) -> Path:
    """Keep ``report``: ``{"model", "date", "codecs": {NAME: {"kl_mean", …}}}``. Codecs measured before stay in it."""
    reports = _read(directory)
    key = model_key(identity)
    before = reports.get(key, {})
    codecs = before.get("codecs", {}) if isinstance(before, dict) else {}
    reports[key] = {**report, "codecs": {**codecs, **report["codecs"]}}
    make_directory(directory)
    path = directory / FILE
    fd, temporary = tempfile.mkstemp(prefix=f".{FILE}-", dir=directory)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            json.dump(reports, stream, indent=1)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink()
        raise
    return path


def measured_kl(directory: Path, identity: ModelIdentity, codec: str) -> float | None:
    """Mean KL divergence in nats a token; None where nobody has measured this codec on this model."""
    try:
        return float(_read(directory)[model_key(identity)]["codecs"][codec]["kl_mean"])
    except (KeyError, TypeError, ValueError):
        return None


def check(directory: Path, identity: ModelIdentity, codecs: Iterable[str], max_kl: float = MAX_KL) -> None:
    """Raise :class:`ConfigError` for a codec that is measured to cost this model more than ``max_kl``."""
    for codec in codecs:
        kl = measured_kl(directory, identity, codec)
        if kl is not None and not kl <= max_kl:
            raise ConfigError(
                f"codec {codec!r} changes what this model says: KL {kl:.4f} nats a token (kvkeep quality, see"
                f" {directory / FILE}), the limit is max_kl={max_kl:g}. Choose another codec, raise max_kl, or give"
                " force=True"
            )


def _read(directory: Path) -> dict[str, Any]:
    """The file's content. Whoever can write to the directory may have left a pipe or anything else there."""
    with suppress(OSError, ValueError, RecursionError):
        fd = os.open(directory / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as stream:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_NBYTES:
                found = json.load(stream)
                if isinstance(found, dict):
                    return found
    return {}
