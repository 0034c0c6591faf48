"""What ``kvkeep quality`` measures: a model's predictions after a prefix that went through a codec.

Each prompt is read once. Its KV, in the type that it is served in, is cut into blocks, coded and decoded by each codec
and put back; the model then predicts the text's next tokens (teacher-forced), and writes greedily. All is compared with
what it predicts from the same KV uncoded, so the arithmetic's own noise is in neither. The model computes in float32.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvkeep import registry
from kvkeep.cache import KVCache
from kvkeep.cli.measure import locate
from kvkeep.codecs.base import Codec
from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.layout import KVLayout, LayerGroup
from kvkeep.opening import open as open_cache

SHORTEST = 64
"""Tokens of the shortest prefix that says anything."""

FOLLOWING = 64
"""Tokens predicted after each prefix."""

REPEATS = 3

Progress = Callable[[str], None]


@dataclass(slots=True)
class Loss:
    """One codec on all prompts. Lists have an entry a prompt."""

    bits: float = 0.0
    encode_gbs: float = 0.0
    decode_gbs: float = 0.0
    kl: list[float] = field(default_factory=list)
    worst_token_kl: float = 0.0
    top1: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    load_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Prompt:
    """Its blocks ``[count, nbytes]``, what is left of its KV, and what comes after it."""

    blocks: npt.NDArray[np.uint8]
    kv: list[tuple[Any, Any]]
    following: Any


class Model:
    """A Transformers model and its tokenizer, which is there first: what it says of the texts need not wait for the
    weights. Raises :class:`ConfigError` for what cannot be measured."""

    def __init__(self, name: str, kv_dtype: str, threads: int, progress: Progress) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read at import; Transformers' own switch spares GGUF's bars
        try:
            import huggingface_hub
            import torch
            import transformers
        except ImportError as error:
            raise ConfigError("kvkeep quality needs a model's library: pip install 'kvkeep[transformers]'") from error
        log: Any = transformers.utils.logging  # untyped
        log.set_verbosity_error()
        log.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self.torch, self.new_cache = torch, transformers.DynamicCache
        self._auto: Any = transformers.AutoModelForCausalLM
        self._name = name
        self._source, self._options = locate(name)
        with self._loading():
            if not Path(self._source).exists():
                # One question first: without a network the hub tries each of many files for half a minute.
                progress(f"asking huggingface.co for {self._source}")
                huggingface_hub.hf_hub_download(self._source, "config.json")
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self._source, **self._options)
        self.kv_dtype = kv_dtype
        self._kv_type: Any = getattr(torch, kv_dtype)

    def load(self) -> None:
        """Read the weights, before anything else is asked than :meth:`count`."""
        with self._loading():
            self.model: Any = self._auto.from_pretrained(self._source, dtype=self.torch.float32, **self._options)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ConfigError(f"{self._name} cannot be loaded: {lines[0]}") from error

    def count(self, text: str) -> int:
        """Tokens of ``text``."""
        return len(self.tokenizer(text).input_ids)

    def identity(self) -> ModelIdentity:
        from kvkeep.engines.transformers import describe

        return describe(self.model, kv_dtype=self.kv_dtype)

    def layout(self, identity: ModelIdentity, block_tokens: int) -> KVLayout:
        """Of this model's KV, from a short run."""
        with self.torch.inference_mode():
            cache = self.new_cache()
            self.model(self.torch.zeros((1, 2), dtype=self.torch.long), past_key_values=cache)
        groups: list[LayerGroup] = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.dim() != 4:
                raise ConfigError("this model keeps a state that cannot be cut into blocks")
            one = LayerGroup(1, keys.shape[1], keys.shape[3], values.shape[3])
            if groups and (groups[-1].num_kv_heads, groups[-1].k_dim, groups[-1].v_dim) == (
                one.num_kv_heads, one.k_dim, one.v_dim
            ):  # fmt: skip
                one = LayerGroup(groups.pop().num_layers + 1, one.num_kv_heads, one.k_dim, one.v_dim)
            groups.append(one)
        return KVLayout(identity, tuple(groups), self.kv_dtype, block_tokens)

    def prompt(self, text: str, layout: KVLayout, tokens: int) -> Prompt | None:
        """Read ``text``'s first ``tokens`` tokens; None where it is too short."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids[:, : tokens + FOLLOWING]
        length = ids.shape[1] - FOLLOWING
        count = length // layout.block_tokens
        if length < SHORTEST or not count:
            return None
        cache: Any = self.new_cache()
        with self.torch.inference_mode():
            self.model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
        kv = [(layer.keys.to(self._kv_type), layer.values.to(self._kv_type)) for layer in cache.layers]
        blocks = np.empty((count, layout.block_nbytes), np.uint8)
        for index, block in enumerate(blocks):
            for (keys, values), (to_k, to_v) in zip(kv, layout.layers(memoryview(block)), strict=True):
                span = slice(index * layout.block_tokens, (index + 1) * layout.block_tokens)
                to_k[...] = self._bits(keys[0, :, span], layout)
                to_v[...] = self._bits(values[0, :, span], layout)
        return Prompt(blocks, kv, ids[:, length:])

    def replaced(self, prompt: Prompt, blocks: npt.NDArray[np.uint8], layout: KVLayout) -> list[tuple[Any, Any]]:
        """The prompt's KV with these blocks in it."""
        kv = [(keys.clone(), values.clone()) for keys, values in prompt.kv]
        for index, block in enumerate(blocks):
            span = slice(index * layout.block_tokens, (index + 1) * layout.block_tokens)
            for (keys, values), (from_k, from_v) in zip(kv, layout.layers(memoryview(block)), strict=True):
                keys[0, :, span] = self._values(from_k)
                values[0, :, span] = self._values(from_v)
        return kv

    def predict(self, kv: list[tuple[Any, Any]], following: Any) -> Any:
        """Log-probabilities ``[tokens, vocabulary]`` after each of ``following``."""
        with self.torch.inference_mode():
            logits = self.model(following, past_key_values=self._cache([kv])).logits[0]
            return logits.double().log_softmax(-1)

    def write(self, kvs: list[list[tuple[Any, Any]]], following: Any, count: int) -> Any:
        """``count`` greedy tokens after each of ``kvs`` and the first token of ``following``, all in one batch."""
        cache = self._cache(kvs)
        token = following[:, :1].repeat(len(kvs), 1)
        written = []
        with self.torch.inference_mode():
            for _ in range(count):
                token = self.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                written.append(token)
        return self.torch.cat(written, dim=1)

    def _cache(self, kvs: list[list[tuple[Any, Any]]]) -> Any:
        cache = self.new_cache()
        for number in range(len(kvs[0])):
            keys, values = (self.torch.cat([kv[number][at] for kv in kvs]).float() for at in (0, 1))
            cache.update(keys, values, number)
        return cache

    def _bits(self, part: Any, layout: KVLayout) -> npt.NDArray[Any]:
        whole = part.contiguous()
        if layout.dtype == "bfloat16":
            return np.asarray(whole.view(self.torch.int16).numpy()).view(layout.np_dtype)
        return np.asarray(whole.numpy())

    def _values(self, bits: npt.NDArray[Any]) -> Any:
        if self.kv_dtype == "bfloat16":
            return self.torch.from_numpy(bits.view(np.int16)).view(self._kv_type)
        return self.torch.from_numpy(bits)


def measure(
    model: Model,
    layout: KVLayout,
    texts: list[str],
    codecs: list[str],
    *,
    tokens: int,
    greedy: int,
    remote: str | None,
    progress: Progress,
) -> tuple[dict[str, Loss], int]:
    """Each codec's losses, and how many prompts were long enough. Raises :class:`ConfigError` if none was."""
    losses = {name: Loss() for name in codecs}
    made = {name: _make(name) for name in codecs}
    seconds = {name: np.zeros(2) for name in codecs}
    blocks_seen: list[npt.NDArray[np.uint8]] = []
    stored_nbytes = dict.fromkeys(codecs, 0)
    for number, text in enumerate(texts, 1):
        progress(f"prompt {number} of {len(texts)}: reading")
        # Prompts of different lengths: a half, two thirds, … of `tokens`.
        prompt = model.prompt(text, layout, tokens * (2 + number % 3) // 4)
        if prompt is None:
            continue
        blocks_seen.append(prompt.blocks)
        exact = model.predict(prompt.kv, prompt.following)
        truth = prompt.following[0, 1:]
        kvs = [prompt.kv]
        for name in codecs:
            progress(f"prompt {number} of {len(texts)}: {name}")
            back, nbytes, took = _through(made[name], prompt.blocks, layout)
            stored_nbytes[name] += nbytes
            seconds[name] += took
            kvs.append(model.replaced(prompt, back, layout))
            after = model.predict(kvs[-1], prompt.following)
            kl = (exact.exp() * (exact - after)).sum(-1)
            loss = losses[name]
            loss.kl.append(max(0.0, float(kl.mean())))
            loss.worst_token_kl = max(loss.worst_token_kl, float(kl.max()))
            loss.top1.append(float((exact.argmax(-1) == after.argmax(-1)).double().mean()))
            pick = truth[:, None]
            loss.nats.append(float((exact[:-1].gather(1, pick) - after[:-1].gather(1, pick)).mean()))
        if greedy:
            progress(f"prompt {number} of {len(texts)}: writing")
            written = model.write(kvs, prompt.following, greedy)
            for name, row in zip(codecs, written[1:], strict=True):
                same = (row == written[0]).long().cumprod(0).sum()
                losses[name].greedy.append(int(same))
    if not blocks_seen:
        raise ConfigError(
            f"no text has {SHORTEST + FOLLOWING} tokens and a whole block of {layout.block_tokens}:"
            " give longer ones with --texts"
        )
    raw = sum(blocks.nbytes for blocks in blocks_seen)
    for name, loss in losses.items():
        loss.bits = stored_nbytes[name] / raw * 8 * layout.np_dtype.itemsize
        loss.encode_gbs, loss.decode_gbs = (raw / 1e9 / seconds[name]).tolist()
    whole = np.concatenate(blocks_seen)
    for name in codecs:
        progress(f"loading {min(len(whole), 2048 // layout.block_tokens) * layout.block_tokens} tokens, {name}")
        losses[name].load_seconds = load_seconds(name, whole[: max(1, 2048 // layout.block_tokens)], layout, remote)
    return losses, len(blocks_seen)


def load_seconds(
    codec: str, blocks: npt.NDArray[np.uint8], layout: KVLayout, remote: str | None = None
) -> dict[str, float]:
    """Seconds to load these blocks from each tier, stored in ``codec``: memory, a cold disk, and the server if any."""
    rows = _Rows(blocks)
    tokens = list(range(len(blocks) * layout.block_tokens))
    # Nobody meets these blocks: they are another tenant's.
    layout = replace(layout, identity=replace(layout.identity, namespace=os.urandom(32)))
    memory, disk = blocks.nbytes + (64 << 20), 2 * blocks.nbytes + (64 << 20)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="kvkeep-quality-") as folder:
        with open_cache(folder, memory=memory, disk=disk, codec=codec, remote=remote, ttl={"remote": "10m"}) as cache:
            bound = cache.bind(layout)
            bound.save(tokens, rows)
            cache.flush()
            seconds["memory"] = min(_load(bound, tokens, rows) for _ in range(REPEATS))
        for path in Path(folder).rglob("*"):  # out of the page cache; needs no rights
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open_cache(folder, memory=0, disk=disk, codec=codec) as cache:
            seconds["disk"] = _load(cache.bind(layout), tokens, rows)
        if remote is not None:
            with open_cache(remote, memory=0, codec=codec) as cache:
                seconds["remote"] = _load(cache.bind(layout), tokens, rows)
    return seconds


class _Rows:
    """Source and sink over blocks."""

    def __init__(self, blocks: npt.NDArray[np.uint8]) -> None:
        self._blocks = blocks
        self._out = np.zeros_like(blocks)

    def read(self, index: int, out: memoryview) -> None:
        np.frombuffer(out, np.uint8)[:] = self._blocks[index]

    def write(self, index: int, payload: memoryview) -> None:
        self._out[index] = np.frombuffer(payload, np.uint8)


def _load(cache: KVCache, tokens: list[int], rows: _Rows) -> float:
    begin = time.perf_counter()
    with cache.lease(cache.match(tokens)) as lease:
        loaded = cache.load(lease, rows)
    took = time.perf_counter() - begin
    if loaded != len(tokens):
        raise ConfigError(f"{loaded} of {len(tokens)} tokens could be loaded back: is the disk full?")
    return took


def _make(name: str) -> Codec:
    codec: Codec = registry.lookup("codecs", name)()
    return codec


def _through(
    codec: Codec, blocks: npt.NDArray[np.uint8], layout: KVLayout
) -> tuple[npt.NDArray[np.uint8], int, npt.NDArray[np.float64]]:
    """The blocks as they come back, their stored bytes, and seconds to encode and to decode (the best of three)."""
    back = np.empty_like(blocks)
    nbytes, seconds = 0, np.zeros(2)
    for index, block in enumerate(blocks):
        encode = codec.encode if index else codec.encode_first
        stored, took = _best(encode, memoryview(block), layout)
        seconds[0] += took
        nbytes += memoryview(stored).nbytes
        _, took = _best(codec.decode, stored, layout, memoryview(back[index]))
        seconds[1] += took
    return back, nbytes, seconds


def _best(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    least = float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time()
        result = work(*arguments)
        least = min(least, time.thread_time() - begin)
    return result, max(least, 1e-9)


def default_texts() -> Iterator[str]:
    """English, code, Chinese and a dialogue, without a download: Python's manual and library, and our own."""
    import argparse
    import inspect
    import tarfile
    from importlib.resources import files
    from pydoc_data.topics import topics

    for name in ("objects", "import", "execmodel", "class"):
        yield topics[name]
    yield inspect.getsource(argparse)[3000:]
    yield inspect.getsource(tarfile)[20_000:]
    yield from files("kvkeep.cli").joinpath("quality.txt").read_text(encoding="utf-8").split("\f")
