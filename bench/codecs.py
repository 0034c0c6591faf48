"""Codecs: bits and speed on a real model's KV, the kernels against their alternatives, and TTFT end to end.

KV of SmolLM2-135M (texts of ``kvkeep quality``, 1,024 tokens each) as bfloat16. GB/s are of the decoded block, of one
core's CPU time, the best of some passes; × is against a memcpy of the decoded block in the same run. TTFT: 2,080 tokens
and a suffix of 32, float32, from a cold disk and (where a Redis can be started) from Redis, one thread of the model.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kvkeep
from bench.report import console, show
from bench.ttft import SUFFIX, Engine
from kvkeep import registry
from kvkeep.cli.losses import default_texts
from kvkeep.codecs import kernels, reference
from kvkeep.codecs.values import Shape
from kvkeep.errors import ConfigError

CODECS = ("raw", "lossless", "int8", "uqz-hq", "uqz", "uqz-max", "int4")
PREFIX = 2080
PASSES = 5


def cpu_seconds(passes: int, work: Callable[[int], Any], count: int) -> float:
    """The sum over ``range(count)`` of each one's least time."""
    least = np.full(count, np.inf)
    for _ in range(passes):
        for at in range(count):
            begin = time.thread_time()
            work(at)
            least[at] = min(least[at], time.thread_time() - begin)
    return float(least.sum())


def model_kv(engine: Engine, tokens: int = 1024) -> np.ndarray:
    """``[texts, layers, 2, heads, tokens, dim]``, float32."""
    found = []
    for text in list(default_texts())[::3]:
        ids = engine.tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        cache = engine.new_cache()
        with engine.torch.inference_mode():
            engine.model(ids, past_key_values=cache, logits_to_keep=1)
        pairs = [engine.torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        found.append(engine.torch.stack(pairs).numpy())
    return np.stack([kv[..., : min(kv.shape[-2] for kv in found), :] for kv in found])


def cut(kv: np.ndarray, dtype: str, block_tokens: int) -> tuple[kvkeep.KVLayout, list[bytes]]:
    """Its layout, and its blocks without the first of each text."""
    identity = kvkeep.ModelIdentity(weights="bench", kv_dtype=dtype)
    layout = kvkeep.KVLayout.uniform(
        identity, num_layers=30, num_kv_heads=3, head_dim=64, dtype=dtype, block_tokens=block_tokens
    )
    upper = (kv.view(np.uint32) + 0x8000) >> 16
    values = upper.astype("<u2") if dtype == "bfloat16" else kv.astype(layout.np_dtype)
    blocks = [
        np.ascontiguousarray(one[..., at : at + block_tokens, :]).tobytes()
        for one in values
        for at in range(block_tokens, one.shape[-2] - block_tokens + 1, block_tokens)
    ]
    return layout, blocks


def speeds(kv: np.ndarray) -> None:
    rows = []
    compiled = kernels.kernels()
    for dtype, block_tokens, which in [
        ("bfloat16", 16, compiled), ("bfloat16", 64, compiled), ("bfloat16", 256, compiled),
        ("bfloat16", 64, reference), ("float16", 64, compiled), ("float32", 64, compiled),
    ]:  # fmt: skip
        layout, blocks = cut(kv, dtype, block_tokens)
        if which is reference:
            blocks = blocks[:6]
        room = memoryview(bytearray(layout.block_nbytes))
        nbytes = len(blocks) * layout.block_nbytes

        def copy(at: int, room: memoryview = room, blocks: list[bytes] = blocks) -> None:
            room[:] = blocks[at]

        base = nbytes / 1e9 / cpu_seconds(PASSES, copy, len(blocks))
        kernels._current = which
        for name in CODECS[1:]:
            codec = registry.lookup("codecs", name)()
            stored = [bytes(codec.encode(block, layout)) for block in blocks]
            encode = cpu_seconds(3, lambda at, c=codec, b=blocks, of=layout: c.encode(b[at], of), len(blocks))
            decode = cpu_seconds(
                PASSES, lambda at, c=codec, s=stored, of=layout, to=room: c.decode(s[at], of, to), len(blocks)
            )
            bits = sum(map(len, stored)) * 8 / (nbytes / layout.np_dtype.itemsize)
            kind = "C" if which is compiled else "NumPy"
            rate = nbytes / 1e9 / decode
            rows.append(
                [f"{dtype}, {block_tokens} tokens, {kind}", name, f"{bits:.2f}", f"{nbytes / 1e9 / encode:.2f}",
                 f"{rate:.2f}", f"{rate / base:.2f}", f"{base:.1f}"]
            )  # fmt: skip
        kernels._current = compiled
    columns = ["KV, block, kernels", "codec", "bits", "encode GB/s", "decode GB/s", "× memcpy", "memcpy GB/s"]
    show("codecs", "Codecs on SmolLM2's KV, one core", columns, rows)


def alternatives(kv: np.ndarray) -> None:
    """int8's decoding, the same bytes in every way; the first call apart."""
    layout, blocks = cut(kv, "bfloat16", 64)
    shape = Shape(30, 3, 64, 64, 64)
    stored = []
    for block in blocks:
        stored.append(np.zeros(reference.int8_nbytes(shape), np.uint8))
        assert kernels.kernels().int8_encode(np.frombuffer(block, "<u2"), stored[-1], shape, "bfloat16")
    want = np.empty(shape.num_values, np.uint16)
    reference.int8_decode(stored[0], want, shape, "bfloat16")
    ways: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
        "NumPy": lambda s, x: reference.int8_decode(s, x, shape, "bfloat16"),
        "C (AVX2 where the compiler has it)": lambda s, x: kernels.kernels().int8_decode(s, x, shape, "bfloat16"),
        "torch": with_torch(shape),
    }
    try:
        ways["numba"] = with_numba(shape)
    except ImportError:
        console.print("numba is not installed: its row is left out")
    rows = []
    room = np.empty_like(want)
    source = blocks[0]
    base = cpu_seconds(50, lambda at: np.copyto(room, np.frombuffer(source, "<u2")), 1)
    for name, decode in ways.items():
        begin = time.perf_counter()
        decode(stored[0], room)
        first = time.perf_counter() - begin
        equal = bool(np.array_equal(room, want))
        seconds = cpu_seconds(PASSES, lambda at, d=decode: d(stored[at], room), len(stored)) / len(stored)
        rows.append(
            [name, f"{first * 1000:.1f}", f"{layout.block_nbytes / 1e9 / seconds:.2f}", f"{base / seconds:.2f}",
             "yes" if equal else "NO"]
        )  # fmt: skip
    columns = ["int8, bfloat16, blocks of 64 tokens", "first call ms", "decode GB/s", "× memcpy", "same bytes"]
    show("codecs-kernels", "One kernel, four ways", columns, rows)


def scales(stored: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps of the keys and of the values, and the numbers ``[layers, 2, heads, tokens, dim]``."""
    levels, tops, v_levels, k_tops, numbers = reference._int8_parts(stored, shape)
    level = np.empty((*levels.shape[:2], shape.k_dim), np.int32)
    level[..., ::2], level[..., 1::2] = levels & 15, levels >> 4
    keys = ((2 * k_tops[:, :, None].astype(np.int32) - level) << 22).view(np.float32) * np.float32(1 / 127)
    values = ((tops.astype(np.int32)[:, None, None] - v_levels) << 20).view(np.float32) * np.float32(1 / 127)
    whole = numbers.view(np.int8).reshape(shape.layers, 2, shape.heads, shape.tokens, shape.k_dim)
    return keys, values, whole


def with_torch(shape: Shape) -> Callable[[np.ndarray, np.ndarray], None]:
    import torch

    torch.set_num_threads(1)

    def decode(stored: np.ndarray, x: np.ndarray) -> None:
        keys, values, whole = (torch.from_numpy(part) for part in scales(stored, shape))
        floats = torch.empty(whole.shape, dtype=torch.float32)
        torch.mul(whole[:, 0], keys[:, :, None], out=floats[:, 0])
        torch.mul(whole[:, 1], values[..., None], out=floats[:, 1])
        # torch rounds ties to even where the codec rounds them away from zero, so the bits are made by hand.
        words = floats.view(torch.int32)
        torch.from_numpy(x.view(np.int16)).view(whole.shape).copy_(words.add_(0x8000).bitwise_right_shift_(16))

    return decode


def with_numba(shape: Shape) -> Callable[[np.ndarray, np.ndarray], None]:
    import numba

    half, shift = np.uint32(0x8000), np.uint32(16)

    @numba.njit(nogil=True)
    def row(numbers, step, floats, out):  # type: ignore[no-untyped-def]
        for at in range(out.size):
            floats[at] = np.float32(numbers[at]) * step[at]
        bits = floats.view(np.uint32)
        for at in range(out.size):
            out[at] = np.uint16((bits[at] + half) >> shift)

    @numba.njit(nogil=True)
    def whole_block(keys, values, numbers, out):  # type: ignore[no-untyped-def]
        layers, _, heads, tokens, dim = numbers.shape
        floats = np.empty(dim, np.float32)
        step = np.empty(dim, np.float32)
        for layer in range(layers):
            for head in range(heads):
                for token in range(tokens):
                    row(numbers[layer, 0, head, token], keys[layer, head], floats, out[layer, 0, head, token])
                    step[:] = values[layer, head, token]
                    row(numbers[layer, 1, head, token], step, floats, out[layer, 1, head, token])

    def decode(stored: np.ndarray, x: np.ndarray) -> None:
        keys, values, numbers = scales(stored, shape)
        whole_block(keys, values, numbers, x.reshape(numbers.shape))

    return decode


def cool(folder: str) -> None:
    """Take a directory's files out of the page cache; needs no rights."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ttft(engine: Engine) -> None:
    """From a cold disk and from Redis, for each codec, and whether the first token is that of the run without cache."""
    from kvkeep.engines.transformers import attach, detach

    ids = engine.prompt(PREFIX)
    engine.first_token(engine.prompt(16))
    cold, token = min(engine.first_token(ids) for _ in range(2))
    rows = [["", "no cache", "", "", f"{cold:.3f}", f"{cold:.3f}", "1.0", "yes"]]

    def one(tier: str, name: str, options: dict[str, Any], prepare: Callable[[], None]) -> None:
        codec = {"disk": name, "remote": name}
        with kvkeep.open(**options, memory="256MiB", codec=codec) as cache:
            attach(engine.model, cache)
            engine.first_token(ids[:, :PREFIX])
            cache.flush(60)
            events = cache.stats().events
            stored = sum(int(event["nbytes"]) for event in events if (event["event"], event["tier"]) == ("put", tier))
            detach(engine.model)
        got = []
        for _ in range(3):
            prepare()
            with kvkeep.open(**options, memory="256MiB", codec=codec) as cache:
                attach(engine.model, cache)
                engine.first_token(engine.ids[:, :1])
                kernels.wait()
                time.sleep(0.5)  # memory is touched ahead in the background
                got.append(engine.first_token(ids))
                detach(engine.model)
        seconds = [pair[0] for pair in got]
        rows.append(
            [tier, name, f"{stored / 1e6:.1f}", f"{stored * 8 / (PREFIX * 30 * 2 * 3 * 64):.2f}", f"{min(seconds):.3f}",
             f"{statistics.median(seconds):.3f}", f"{cold / min(seconds):.1f}",
             "yes" if {pair[1] for pair in got} == {token} else "no"]
        )  # fmt: skip

    for name in CODECS:
        folder = tempfile.mkdtemp(prefix="kvkeep-bench-", dir=Path.home())
        try:
            one("disk", name, {"path": folder, "disk": "1GiB"}, lambda f=folder: cool(f))
        finally:
            shutil.rmtree(folder)
    try:
        from kvkeep.testing.servers import redis_server
    except ImportError:
        console.print("no Redis can be started here: its rows are left out")
    else:
        for name in CODECS:
            with redis_server(maxmemory="512mb") as server:
                one("remote", name, {"path": server.url}, lambda: None)
    columns = ["tier", "codec", "MB", "bits", "TTFT s, best", "median", "× no cache", "same token"]
    show("codecs-ttft", f"SmolLM2-135M, float32, {PREFIX} + {SUFFIX} tokens", columns, rows)


def main() -> None:
    try:
        if not kernels.wait(60):
            console.print("no C compiler: all rows are NumPy's")
        engine = Engine()
        kv = model_kv(engine)
        speeds(kv)
        alternatives(kv)
        del kv
        ttft(engine)
    except ConfigError as error:
        console.print(str(error))
