"""What the lossy codecs promise beyond the suite: errors, exact tokens, equal kernels, old frames, slow compilers.

``python tests/test_codecs_lossy.py NAME`` writes the golden frames of a new codec; those that are there never change.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep import frame, registry
from kvkeep.codecs import compiled, kernels, reference
from kvkeep.codecs.base import Codec
from kvkeep.errors import CodecError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout, LayerGroup
from kvkeep.testing.codecs import as_dtype, gaussian

GOLDEN = Path(__file__).parent / "golden" / "codecs"
LOSSY = ("int8", "uqz-hq", "uqz", "uqz-max", "int4")
EVERY = ("raw", "lossless", *LOSSY)


def layout(dtype: str, tokens: int, *groups: tuple[int, int, int, int], num_shards: int = 1) -> KVLayout:
    shape = tuple(LayerGroup(*group) for group in groups or ((2, 2, 64, 64),))
    return KVLayout(ModelIdentity("0" * 64, dtype), shape, dtype, tokens, num_shards)


def make(name: str) -> Codec:
    codec: Codec = registry.lookup("codecs", name)()
    return codec


def decoded(codec: Codec, stored: object, of: KVLayout) -> bytes:
    out = bytearray(b"\xa5" * of.block_nbytes)
    codec.decode(bytes(stored), of, memoryview(out))  # type: ignore[call-overload]
    return bytes(out)


def floats(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view(np.float32)
    return np.frombuffer(data, {"float16": "<f2", "float32": "<f4"}[dtype]).astype(np.float32)


@pytest.fixture(params=["compiled", "numpy"])
def which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.wait(60), "no compiled kernels: is there a C compiler?"
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "_current", reference)


# --- errors


@pytest.mark.parametrize(
    ("name", "limit"), [("int8", 0.011), ("uqz-hq", 0.06), ("uqz", 0.13), ("uqz-max", 0.2), ("int4", 0.13)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_error_against_the_values_rms(which: None, name: str, limit: float, dtype: str) -> None:
    of = layout(dtype, 64)
    block = as_dtype(
        np.random.default_rng(2).standard_normal(of.block_nbytes // of.np_dtype.itemsize, np.float32), dtype
    )
    codec = make(name)
    got = floats(decoded(codec, codec.encode(block, of), of), dtype)
    error = np.sqrt(np.mean((got - floats(block, dtype)) ** 2))
    assert limit / 2 < error < limit  # neither worse than promised, nor better than it can be: then it measures nothing


@pytest.mark.parametrize("name", LOSSY)
def test_channels_of_all_sizes_keep_their_accuracy(which: None, name: str) -> None:
    """Keys with a large mean in one channel and tiny ones in another: an outlier must not drown its neighbours."""
    of = layout("float32", 32, (1, 2, 64, 64))
    values = np.random.default_rng(3).standard_normal((1, 2, 2, 32, 64)).astype(np.float32)
    values[:, 0, :, :, 5] += 300.0
    codec = make(name)
    got = floats(decoded(codec, codec.encode(values.tobytes(), of), of), "float32").reshape(values.shape)
    assert np.abs(got - values)[:, 0, :, :, 5].max() < 3.0
    others = np.delete(got - values, 5, axis=-1)
    assert np.sqrt(np.mean(others**2)) < 0.25


@pytest.mark.parametrize("name", ["int4", "uqz-hq", "uqz", "uqz-max"])
def test_the_first_tokens_of_a_sequence_are_exact(which: None, name: str) -> None:
    of = layout("bfloat16", 16, (2, 2, 64, 64), (1, 1, 32, 16))
    block, codec = gaussian(of), make(name)
    got = decoded(codec, codec.encode_first(block, of), of)
    pairs = list(zip(of.layers(block), of.layers(got), strict=True))
    kept = 4 if name == "int4" else 1
    assert all(
        np.array_equal(a[:, :kept], b[:, :kept]) for before, after in pairs for a, b in zip(before, after, strict=True)
    )
    assert got != block
    assert decoded(codec, codec.encode(block, of), of) != got


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30])
def test_what_cannot_be_coded_is_kept_as_it_is(which: None, name: str, first: bool, odd: float) -> None:
    of = layout("float32", 8, (2, 2, 16, 16))
    for at in (0, of.block_nbytes // 4 - 1):
        values = np.ones(of.block_nbytes // 4, np.float32)
        values[at] = odd
        codec = make(name)
        stored = (codec.encode_first if first else codec.encode)(values.tobytes(), of)
        got = np.frombuffer(decoded(codec, stored, of), np.float32)
        if first and name != "int8" and at == 0:  # one of the exact tokens
            assert got.tobytes()[:4] == values.tobytes()[:4]
        else:
            assert got.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [64, 256])
def test_large_values_stay_finite(which: None, name: str, dtype: str, tokens: int) -> None:
    """Sums of their squares would not fit into a float."""
    of = layout(dtype, tokens, (1, 1, 256, 256))
    signs = np.random.default_rng(4).choice(np.array([-1, 1], np.float32), of.block_nbytes // of.np_dtype.itemsize)
    for exponent in range(40, 128):
        block = as_dtype(signs * np.float32(2.0**exponent), dtype)
        got = floats(decoded(make(name), make(name).encode(block, of), of), dtype)
        assert np.isfinite(got).all(), exponent
        assert got.tobytes() == floats(block, dtype).tobytes() or exponent <= 48


@pytest.mark.parametrize("name", LOSSY)
def test_no_block_grows(which: None, name: str) -> None:
    for tokens, heads, dims in itertools.product((1, 2, 5, 33), (1, 3), ((256, 256), (33, 1), (1, 0), (3, 2))):
        of = layout("float16", tokens, (1, heads, *dims))
        block, codec = gaussian(of), make(name)
        for stored in (codec.encode(block, of), codec.encode_first(block, of)):
            assert memoryview(stored).nbytes <= 8 + of.block_nbytes
            if bytes(stored)[0] == 0:
                assert decoded(codec, stored, of) == block


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_is_passed_through(name: str, dtype: str) -> None:
    of = layout(dtype, 16)
    block = np.random.default_rng(1).bytes(of.block_nbytes)
    assert decoded(make(name), make(name).encode_first(block, of), of) == block


@pytest.mark.parametrize("name", LOSSY)
def test_a_float16_block_stays_finite(which: None, name: str) -> None:
    of = layout("float16", 16, (1, 1, 32, 32))
    block = np.full(of.block_nbytes // 2, 65504, "<f2")
    block[::2] = -65504
    assert np.isfinite(np.frombuffer(decoded(make(name), make(name).encode(block.tobytes(), of), of), "<f2")).all()


# --- one arithmetic

SHAPES = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 7, 32, 64, 80, 96]),
    st.sampled_from([0, 5, 64, 72]),
)


@given(st.sampled_from([*LOSSY, "lossless"]), st.lists(SHAPES, min_size=1, max_size=2), st.integers(1, 70),
       st.sampled_from(["bfloat16", "float16", "float32"]), st.booleans(), st.integers(0, 99))  # fmt: skip
def test_compiled_and_numpy_give_the_same_bytes(
    name: str, groups: list[tuple[int, int, int, int]], tokens: int, dtype: str, first: bool, seed: int
) -> None:
    assert kernels.wait(60)
    of = layout(dtype, tokens, *groups)
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(of.block_nbytes // of.np_dtype.itemsize) * np.exp2(rng.integers(-40, 12))
    values[rng.integers(0, values.size, 1 + values.size // 50)] *= 100
    block, codec = as_dtype(np.clip(values, -6e4, 6e4).astype(np.float32), dtype), make(name)
    fast = kernels.kernels()
    assert fast is not reference
    results = []
    try:
        for kernels._current in (fast, reference):
            stored = bytes((codec.encode_first if first else codec.encode)(block, of))
            results.append((stored, decoded(codec, stored, of)))
    finally:
        kernels._current = fast
    assert results[0][0] == results[1][0], "stored"
    assert results[0][1] == results[1][1], "decoded"


@pytest.mark.parametrize(("heads", "dim"), [(1, 32), (128, 32), (1, 256), (128, 256), (8, 128)])
@pytest.mark.parametrize("name", EVERY)
def test_any_number_of_heads_and_any_dim(name: str, heads: int, dim: int) -> None:
    for tokens in (1, 16, 33):
        of = layout("bfloat16", tokens, (1, heads, dim, dim), num_shards=2)
        block = gaussian(of)
        got = floats(decoded(make(name), make(name).encode(block, of), of), "bfloat16")
        rms = np.sqrt(np.mean(floats(block, "bfloat16") ** 2))
        assert np.sqrt(np.mean((got - floats(block, "bfloat16")) ** 2)) < 0.35 * rms


# --- for ever

CASES = {
    "bf16": layout("bfloat16", 40, (2, 2, 32, 32), (1, 3, 17, 0)),
    "f16": layout("float16", 16, (2, 1, 64, 32)),
    "f32": layout("float32", 3, (1, 2, 10, 10)),
    "fp8": layout("float8_e4m3fn", 4, (1, 2, 8, 8)),
}
KEY = BlockKey(bytes(range(32)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("first", ["first", "later"])
def test_golden_frames_decode_for_ever(which: None, name: str, case: str, first: str) -> None:
    """Failing here means that stored caches are lost: a new format needs a new name."""
    of = CASES[case]
    header, payload = frame.verify((GOLDEN / f"{name}-{case}-{first}.bin").read_bytes())
    frame.check(header, KEY, of.fingerprint, of.block_nbytes)
    assert header.codec == name
    digest = hashlib.sha256(decoded(make(name), payload, of)).hexdigest()
    assert digest == json.loads((GOLDEN / "decoded.json").read_text())[f"{name}-{case}-{first}"]


def write_golden(name: str) -> None:
    GOLDEN.mkdir(exist_ok=True)
    digests = json.loads((GOLDEN / "decoded.json").read_text()) if (GOLDEN / "decoded.json").exists() else {}
    for case, of in CASES.items():
        for first in ("first", "later"):
            path = GOLDEN / f"{name}-{case}-{first}.bin"
            assert not path.exists(), f"{path} is there: golden frames never change"
            codec = make(name)
            stored = bytes((codec.encode_first if first == "first" else codec.encode)(gaussian(of, 5), of))
            head = frame.pack(KEY, of.fingerprint, name, len(stored), of.block_nbytes)
            frame.seal(head, stored)
            path.write_bytes(bytes(head) + stored)
            digests[path.stem] = hashlib.sha256(decoded(codec, stored, of)).hexdigest()
    (GOLDEN / "decoded.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


# --- damage


@pytest.mark.parametrize("name", ["uqz-hq", "uqz", "uqz-max"])
@pytest.mark.parametrize("stream", range(5))
def test_a_zip_bomb_in_any_stream_is_refused_before_it_is_unpacked(name: str, stream: int) -> None:
    import zstandard

    of, codec = layout("bfloat16", 16), make(name)
    stored = bytes(codec.encode(gaussian(of), of))
    lengths = np.frombuffer(stored, "<u4", 5, 8).copy()
    starts = [28, *(28 + np.cumsum(lengths)).tolist()]
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 24))
    parts = [stored[starts[at] : starts[at + 1]] for at in range(5)]
    parts[stream] = bomb
    lengths[stream] = len(bomb)
    with pytest.raises(CodecError, match="16777216"):
        decoded(codec, stored[:8] + lengths.tobytes() + b"".join(parts), of)


@pytest.mark.parametrize("name", LOSSY)
def test_an_unknown_mode_is_refused(name: str) -> None:
    of, codec = layout("bfloat16", 16), make(name)
    stored = bytes(codec.encode(gaussian(of), of))
    for wrong in (b"\x07" + stored[1:], stored[:3] + b"\x01" + stored[4:], b"\x02" + stored[1:]):
        with pytest.raises(CodecError):
            decoded(codec, wrong, of)


# --- the compiler

WORK = """
import sys
from pathlib import Path
from kvkeep.codecs import compiled, kernels, reference
folder = Path(sys.argv[1])
compiled._places = lambda: [folder / "kernels.so"]
compiled.compiler = lambda: sys.argv[2:] or None
from kvkeep.codecs.int8 import Int8
from kvkeep.testing.codecs import gaussian, layout
of = layout("bfloat16")
codec = Int8()
stored = bytes(codec.encode(gaussian(of), of))
print(kernels.kernels() is reference, stored.hex())
(folder / "go").touch()
print(kernels.wait())
assert bytes(codec.encode(gaussian(of), of)) == stored
"""


def run(folder: Path, *compiler: str) -> list[str]:
    """Whether the first encoding was NumPy's, its bytes, and whether there were compiled kernels in the end."""
    folder.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-W", "error", "-c", WORK, str(folder), *compiler]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nobody_waits_for_the_compiler(tmp_path: Path) -> None:
    """It does not come to an end before the first block has been encoded."""
    slow, cache = tmp_path / "slow-cc", tmp_path / "cache"
    slow.write_text(f'#!/bin/sh\nwhile [ ! -e "{cache}/go" ]; do sleep 0.05; done\nexec cc "$@"\n')
    slow.chmod(0o755)
    numpy, stored, ready = run(cache, str(slow))
    assert (numpy, ready) == ("True", "True")
    again = run(cache, "false")  # kept: not compiled again
    assert again[1:] == [stored, "True"]


def test_without_a_compiler_numpy_does_the_same(tmp_path: Path) -> None:
    with_one, without = run(tmp_path / "one", "cc"), run(tmp_path / "other")
    assert with_one[1] == without[1]
    assert without[2] == "False"


def test_their_thread_imports_nothing() -> None:
    """A module that is half imported when a process forks stays so in the child: who needs it waits for ever."""
    script = (
        "import sys; from kvkeep.codecs import kernels; before = set(sys.modules); kernels.wait(60)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_child_that_was_forked_meanwhile_gets_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.wait(60)
    monkeypatch.setattr(kernels, "_current", reference)  # as if the thread were still at it
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"compiled" if kernels.wait(60) else b"NumPy")
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        assert stream.read() == b"compiled"
    assert os.waitpid(child, 0)[1] == 0


def test_a_compiler_that_fails_is_no_failure(tmp_path: Path) -> None:
    assert run(tmp_path / "cache", "false")[2] == "False"


def test_a_library_that_others_may_write_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.wait(60)
    path = tmp_path / "kernels.so"
    monkeypatch.setattr(compiled, "_places", lambda: [path])
    tmp_path.chmod(0o700)
    assert compiled.build() == path
    assert compiled.library() == path
    path.chmod(0o777)
    assert compiled.library() is None
    path.chmod(0o755)
    tmp_path.chmod(0o777)
    assert compiled.library() is None
    tmp_path.chmod(0o700)
    path.unlink()
    path.symlink_to("/dev/null")
    assert compiled.library() is None or os.geteuid() == 0


def test_where_values_lie_is_known_for_every_array() -> None:
    whole = np.arange(100, dtype="<u2")
    arrays = [whole, whole[7:], np.frombuffer(bytes(50), np.uint8)[3:], whole[:0], np.zeros((3, 4), np.float32)]
    for array in arrays * 100:
        assert compiled._at(array) == array.__array_interface__["data"][0]


def test_a_library_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled.library() or compiled.build()
    assert path is not None
    broken = compiled.Compiled(path)
    assert compiled.agrees(broken)
    whole = broken.int8_decode

    def wrong(stored: compiled.Array, x: compiled.Array, s: compiled.Shape, dtype: str) -> None:
        whole(stored, x, s, dtype)
        x.view(np.uint8)[3] ^= 1

    monkeypatch.setattr(broken, "int8_decode", wrong)
    assert not compiled.agrees(broken)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_golden(argument)
