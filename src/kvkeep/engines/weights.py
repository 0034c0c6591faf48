"""What a model's weights are, by their bytes.

Two digests together name a model. SHA-256 over the bytes of its files is what an attacker cannot forge; it costs
seconds, so it is paid once and kept in ``.kvkeep-digests.json`` beside the files, or, where that folder is not
writable, under the user's cache folder. A kept digest counts only while path, size, inode, mtime and ctime (which no
program can set back) are what they were. XXH3-128 over the tensors in memory (tens of GB/s) is what notices that a
model is no longer what its files say: merged adapters, another dtype, edited weights. A model without files has
SHA-256 over its tensors instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

CACHE_NAME = ".kvkeep-digests.json"


def user_cache_folder() -> Path:
    """Where digests lie whose own folder is not writable."""
    return Path.home() / ".cache" / "kvkeep-digests"


def files_digest(paths: Iterable[Path], *, fallback: Path | None = None) -> str:
    """Hex SHA-256 over the names' order and bytes of ``paths``; kept, so that a second call reads no weights.

    The paths themselves are not part of it: a copy of the same files in another folder digests alike.
    Raises ``OSError`` where a file cannot be read.
    """
    ordered = sorted(paths, key=lambda path: path.name)
    total = hashlib.sha256(b"kvkeep files 1")
    for path in ordered:
        total.update(path.name.encode() + b"\0" + bytes.fromhex(_file_digest(path, fallback or user_cache_folder())))
    return total.hexdigest()


def _file_digest(path: Path, fallback: Path) -> str:
    real = path.resolve()  # a hub's snapshot is a folder of links
    before = _stamp(real)
    homes = (real.parent / CACHE_NAME, fallback / CACHE_NAME)
    for home in homes:
        kept = _read(home).get(str(real))
        if isinstance(kept, dict) and kept.get("stamp") == before and _is_sha256(kept.get("sha256")):
            return str(kept["sha256"])
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(real) == before:  # a file that changed while it was read is not kept
        for home in homes:
            if _keep(home, str(real), {"stamp": before, "sha256": digest}):
                break
    return digest


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _is_sha256(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _read(home: Path) -> dict[str, Any]:
    """What is kept there; nothing where the file is missing, unreadable or damaged, which costs a digest."""
    try:
        found = json.loads(home.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(home: Path, key: str, value: dict[str, Any]) -> bool:
    """Add an entry by rename, so that a reader sees the old file or the new one. False where it may not write."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=home.parent, prefix=CACHE_NAME, delete=False, encoding="utf-8"
        ) as file:
            json.dump({**_read(home), key: value}, file)
        os.replace(file.name, home)
    except OSError:
        return False
    return True


def tensors_digest(named: Sequence[tuple[str, Any]]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of torch tensors."""
    return _digest(named, lambda data: hashlib.sha256(data).digest())


def tensors_fingerprint(named: Sequence[tuple[str, Any]]) -> str:
    """The same over XXH3-128 of the bytes: fast, no defence against a forger."""
    return _digest(named, lambda data: xxhash.xxh3_128_digest(data))


def _digest(named: Sequence[tuple[str, Any]], hash_bytes: Any) -> str:
    def one(item: tuple[str, Any]) -> bytes:
        name, tensor = item
        return f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode() + bytes(hash_bytes(tensor_bytes(tensor)))

    total = hashlib.sha256(b"kvkeep tensors 1")
    # Hashes of large buffers release the GIL; order is the names', whoever finishes first.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(one, sorted(named, key=lambda item: item[0])):
            total.update(part)
    return total.hexdigest()


def tensor_bytes(tensor: Any) -> memoryview:
    """A tensor's values as bytes, in C order; a copy only where it lies on another device or is not contiguous."""
    import torch  # the caller holds a tensor, so this is loaded

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"").cast("B")
