"""Names: what shapes the values of a server's KV cache, and of one request's.

The weights are named by the SHA-256 of their files, a LoRA adapter likewise, an image by the tensors that the model is
given, a prompt's embeddings by their bytes. vLLM's own block hashes hold adapters' and images' *names*, leave the
model out and can be seeded by the process, so none of them is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.request import Request

from kvkeep.engines.weights import files_digest, tensor_bytes
from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import Extra

log = init_logger("vllm.kvkeep")

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_ADAPTER = ("adapter_config.json", "adapter_model*", "new_embeddings*")
_VOLATILE = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")


def identity(vllm_config: VllmConfig, *, attention: str, namespace: bytes) -> ModelIdentity:
    """Of the model that this server runs. Raises :class:`ConfigError` where its weights' bytes cannot be seen."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _VOLATILE}
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    numerics: dict[str, Any] = {
        "engine": ["vllm", vllm.__version__, current_platform.device_type, attention],
        "config": config,
        "dtype": str(model.dtype),
        "cache_dtype": cache.cache_dtype,
        "quantization": str(model.quantization),
        "loading": [str(vllm_config.load_config.load_format), str(vllm_config.load_config.model_loader_extra_config)],
    }
    if _rope_depends_on_length(rope):
        numerics["max_model_len"] = model.max_model_len
    return ModelIdentity(
        weights=f"files {files_digest(_weight_files(vllm_config))}",
        kv_dtype=str(model.dtype).removeprefix("torch."),
        rope=json.dumps(rope, sort_keys=True, default=str),
        numerics=json.dumps(numerics, sort_keys=True, default=str),
        namespace=namespace,
    )


def _rope_depends_on_length(rope: dict[str, Any]) -> bool:
    kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    return bool(kinds - {None, "default", "linear", "llama3"})


def _weight_files(vllm_config: VllmConfig) -> list[Path]:
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format).rpartition(".")[2].lower() == "dummy":
        raise ConfigError("load_format dummy: weights that come from no file have no name to keep their blocks by")
    name = str(model.model_weights or model.model)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _hub_folder(name, model.revision, load.download_dir)
    files = {file for pattern in _WEIGHTS for file in path.glob(pattern)}
    if not files:
        raise ConfigError(f"{path} holds no weights ({', '.join(_WEIGHTS)}) by whose bytes kvkeep could name the model")
    return sorted(files)


def _hub_folder(name: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"kvkeep names a model by its weights' bytes; {name} is no folder here: {error}") from None
    return Path(found)


class Adapters:
    """LoRA adapters by their bytes.

    vLLM reads an adapter when it is added, and again when others have displaced it, and tells no connector. So one has
    a name only while nothing of it has changed since ``started_ns`` (the engine's start, in nanoseconds of the epoch):
    whatever vLLM has read is what lies there. One that has changed gets no name any more, even if it is changed back.
    """

    def __init__(self, started_ns: int) -> None:
        self._started_ns = started_ns
        self._named: dict[int, tuple[str, bytes]] = {}  # by vLLM's number: its path and digest
        self._refused: set[int] = set()

    def digest(self, request: Request) -> bytes | None:
        """Empty without an adapter; ``None`` where the adapter's bytes are not known for certain."""
        lora = request.lora_request
        if lora is None:
            return b""
        if lora.lora_int_id in self._refused:
            return None
        try:
            return self._name(lora)
        except (OSError, ConfigError) as error:
            self._refused.add(lora.lora_int_id)
            log.warning("kvkeep: nothing is kept for adapter %s: %s", lora.lora_name, error)
            return None

    def _name(self, lora: LoRARequest) -> bytes:
        """Raises ``OSError`` or :class:`ConfigError` with the reason why it has none."""
        if lora.load_inplace:
            raise ConfigError("it was loaded in place of another one (load_inplace); load it under a name of its own")
        folder = Path(lora.lora_path).absolute()
        files = sorted({file for pattern in _ADAPTER for file in folder.glob(pattern)})
        if not files:
            raise ConfigError(f"{folder} is no folder with an adapter")
        path, digest = self._named.get(lora.lora_int_id) or (lora.lora_path, _files_digest(files))
        if path != lora.lora_path:
            raise ConfigError(f"it has number {lora.lora_int_id}, under which vLLM has read {path}")
        if max(_changed_ns(part) for part in (folder, *files)) >= self._started_ns:
            raise ConfigError(f"{folder} has changed since the server started; after a restart it is kept")
        self._named[lora.lora_int_id] = (path, digest)
        return digest


def _files_digest(files: Sequence[Path]) -> bytes:
    # Not kept beside them, as that of weights is: an adapter is small, and a file more would change its folder.
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def _changed_ns(path: Path) -> int:
    """When ``path``, or a link on the way to it, last changed: by ctime, which also counts renames, and which nobody
    can set. Raises ``OSError``."""
    changed = path.stat().st_ctime_ns
    for part in (path, *path.parents):
        if part.is_symlink():
            changed = max(changed, part.lstat().st_ctime_ns, _changed_ns(part.parent / part.readlink()))
    return changed


def extras(request: Request, adapter: bytes, block_tokens: int) -> tuple[list[Extra], int]:
    """What shapes the values beside the prompt's tokens, by position; and up to which token that is known.

    What holds for the whole request stands at position 0, from where the chain carries it on.
    """
    found: list[Extra] = []
    limit = 1 << 62
    if adapter:
        found.append((0, _digest(b"adapter 2", adapter)))
    if request.cache_salt:
        found.append((0, _digest(b"salt", request.cache_salt.encode())))
    for feature in request.mm_features:
        position = feature.mm_position
        if feature.data is None:  # only a name is left of it here
            limit = min(limit, position.offset)
            continue
        shape = f"{feature.modality} {position.offset} {position.length} {position.is_embed is not None}".encode()
        found.append((position.offset, _digest(b"media", shape, *_flatten(feature.data.get_data()))))
        if position.is_embed is not None:
            found.append((position.offset, _digest(b"mask", bytes(tensor_bytes(position.is_embed)))))
    if request.prompt_embeds is not None:
        for start in range(0, request.num_prompt_tokens, block_tokens):
            rows = tensor_bytes(request.prompt_embeds[start : start + block_tokens])
            mask = (
                bytes(request.prompt_is_token_ids[start : start + block_tokens]) if request.prompt_is_token_ids else b""
            )
            found.append((start, _digest(b"embeds", str(request.prompt_embeds.dtype).encode(), rows, mask)))
    return sorted(found), limit


def _flatten(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of nested tensors, dtypes and shapes included."""
    if isinstance(value, dict):
        for name in sorted(value):
            yield str(name).encode()
            yield from _flatten(value[name])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}]".encode()
        for item in value:
            yield from _flatten(item)
    elif hasattr(value, "untyped_storage"):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield tensor_bytes(value)
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _digest(*parts: bytes | memoryview) -> bytes:
    """SHA-256 of length-prefixed parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(memoryview(part).nbytes.to_bytes(8, "little"))
        total.update(part)
    return total.digest()
