"""Digests of weights: by bytes, paid once, never stale."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from kvkeep.engines import weights
from kvkeep.engines.weights import CACHE_NAME, files_digest, tensors_digest, tensors_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model-1.safetensors").write_bytes(b"one" * 1000)
    (made / "model-2.safetensors").write_bytes(b"two" * 1000)
    return made


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_second_digest_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = files_digest(files(folder))
    assert (folder / CACHE_NAME).exists()
    monkeypatch.setattr(weights.hashlib, "file_digest", None)
    assert files_digest(files(folder)) == first


def test_a_copy_elsewhere_digests_alike(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    other.mkdir()
    for path in files(folder):
        (other / path.name).write_bytes(path.read_bytes())
    assert files_digest(files(other)) == files_digest(files(folder))


@pytest.mark.parametrize("how", ["replaced", "written", "written, and its mtime set back"])
def test_changed_bytes_of_the_same_size_are_seen(folder: Path, how: str) -> None:
    before = files_digest(files(folder))
    path = files(folder)[0]
    stat = path.stat()
    time.sleep(0.02)  # files' times count in the kernel's ticks
    if how == "replaced":
        (folder / "new").write_bytes(b"eno" * 1000)
        os.utime(folder / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(folder / "new", path)
    else:
        path.write_bytes(b"eno" * 1000)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (how == "written")))
    assert files_digest(files(folder)) != before


def test_a_record_of_an_older_form_costs_a_digest(folder: Path) -> None:
    before = files_digest(files(folder))
    kept = json.loads((folder / CACHE_NAME).read_text())
    for each in kept.values():  # without the ctime
        each.update(stamp=each["stamp"][:3], sha256="0" * 64)
    (folder / CACHE_NAME).write_text(json.dumps(kept))
    assert files_digest(files(folder)) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\x00"])
def test_a_damaged_record_costs_a_digest(folder: Path, content: str) -> None:
    before = files_digest(files(folder))
    (folder / CACHE_NAME).write_text(content)
    assert files_digest(files(folder)) == before


def test_a_folder_that_takes_no_record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / CACHE_NAME).mkdir()  # what no user, root neither, can replace by a file
    home = tmp_path / "home"
    first = files_digest(files(folder), fallback=home)
    assert (home / CACHE_NAME).exists()
    monkeypatch.setattr(weights.hashlib, "file_digest", None)
    assert files_digest(files(folder), fallback=home) == first


@pytest.mark.parametrize("digest", [tensors_digest, tensors_fingerprint])
def test_tensors_by_name_type_shape_and_bytes(digest: object) -> None:
    assert callable(digest)
    base = [("a", torch.arange(6.0)), ("b", torch.ones((), dtype=torch.bfloat16)), ("c", torch.zeros(0))]
    same = [base[2], base[0], base[1]]
    assert digest(base) == digest(same)
    others = [
        [("x", base[0][1]), *base[1:]],
        [("a", base[0][1].reshape(2, 3)), *base[1:]],
        [("a", base[0][1].view(torch.int32)), *base[1:]],
        [("a", base[0][1] + 1e-6), *base[1:]],
        base[:2],
    ]
    assert len({digest(base), *(digest(other) for other in others)}) == 1 + len(others)
    assert digest([("a", torch.arange(12.0)[::2])]) == digest([("a", torch.arange(12.0)[::2].contiguous())])
