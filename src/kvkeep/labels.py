"""``models.json``: what the layouts in a cache directory are called, so that ``kvkeep stats`` can name them.

Labels only: nothing is decided by them, so a file that cannot be read, or is none, is empty. Where the cache is
encrypted each entry is, so that the file says which fingerprints there are, as the frames beside it do, and no more.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvkeep.crypt import Cipher
from kvkeep.errors import FrameError
from kvkeep.layout import KVLayout

MODELS_FILE = "models.json"
MAX_NBYTES = 16 << 20


def read(directory: Path, cipher: Cipher | None = None) -> dict[bytes, dict[str, Any]]:
    """Layout fingerprint → its facts, as :func:`note` left them; what cannot be read is left out."""
    known: dict[bytes, dict[str, Any]] = {}
    for fingerprint, entry in _entries(directory).items():
        with suppress(ValueError):
            facts = _facts(fingerprint, entry, cipher)
            if facts is not None:
                known[bytes.fromhex(fingerprint)] = facts
    return known


def note(directory: Path, layout: KVLayout, description: str, cipher: Cipher | None = None) -> None:
    """Write down what ``layout``'s fingerprint stands for. No secrets: no namespace."""
    facts = {
        "description": description or f"{layout.num_layers} layers",
        "dtype": layout.dtype,
        "block_tokens": layout.block_tokens,
        "block_nbytes": layout.block_nbytes,
        "token_nbytes": layout.token_nbytes,
    }
    fingerprint = layout.fingerprint.hex()
    entries = _entries(directory)
    old = entries.get(fingerprint)
    if _facts(fingerprint, old, cipher) == facts and isinstance(old, dict) == (cipher is None):
        return
    entries[fingerprint] = _entry(fingerprint, facts, cipher)
    _write(directory, entries)


def rotate(directory: Path, cipher: Cipher) -> None:
    """Encrypt every entry with the cipher's first key, those that were not encrypted too."""
    entries = _entries(directory)
    for fingerprint, entry in entries.items():
        facts = _facts(fingerprint, entry, cipher)
        if facts is not None:
            entries[fingerprint] = _entry(fingerprint, facts, cipher)
    if entries:
        _write(directory, entries)


def _write(directory: Path, entries: dict[str, Any]) -> None:
    path = directory / MODELS_FILE
    temporary = path.with_suffix(f".{os.getpid()}.new")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)  # left by a process of this number that was killed, or planted
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="utf-8") as stream:
            json.dump(entries, stream, indent=1)
        temporary.replace(path)


def _entry(fingerprint: str, facts: dict[str, Any], cipher: Cipher | None) -> dict[str, Any] | str:
    return facts if cipher is None else cipher.encrypt_text(json.dumps(facts), context=_context(fingerprint))


def _context(fingerprint: str) -> bytes:
    return f"{MODELS_FILE} {fingerprint}".encode()


def _facts(fingerprint: str, entry: Any, cipher: Cipher | None) -> dict[str, Any] | None:
    if isinstance(entry, str) and cipher is not None:
        with suppress(FrameError, ValueError, RecursionError):
            entry = json.loads(cipher.decrypt_text(entry, context=_context(fingerprint)))
    return entry if isinstance(entry, dict) else None


def _entries(directory: Path) -> dict[str, Any]:
    """The file's content. Whoever can write to the directory may have left a pipe, a link or anything else there."""
    try:
        fd = os.open(directory / MODELS_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            usable = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_NBYTES
            found = json.loads(os.read(fd, MAX_NBYTES)) if usable else {}
        finally:
            os.close(fd)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
