"""Time to first token on SmolLM2-135M in float32: cold, from memory, from disk in a new process, against the bound.

The bound is Transformers' own reuse: ``generate`` with a ``DynamicCache`` that holds the prefix already. Every case
answers the same prompt (prefix + 32 tokens) and must give the same token. Disk cases run in a new process with the page
cache dropped where that is allowed. "Saving" is a cold run with kvkeep attached and an empty directory: two cold runs
of one prompt differ by more than saving costs, so it is measured in pairs, one with and one without, in changing order.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvkeep
from bench.bytes import drop_page_cache
from bench.report import show
from kvkeep.cli.measure import locate

PREFIXES = (500, 2_000, 6_000)
SUFFIX = 32
REPEATS = 5
PAIRS = {500: 14, 2_000: 8, 6_000: 5}


class Engine:
    """The model, and prompts cut from the demo's document."""

    def __init__(self) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        log: Any = transformers.utils.logging
        log.set_verbosity_error()
        log.disable_progress_bar()
        source, options = locate("")
        self.torch = torch
        self.new_cache = transformers.DynamicCache
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        self.tokenizer = tokenizer
        self.pad = tokenizer.eos_token_id
        text = Path(kvkeep.__file__).with_name("cli").joinpath("constitution.txt").read_text(encoding="utf-8")
        self.ids = tokenizer(text * 3, return_tensors="pt").input_ids

    def prompt(self, tokens: int) -> Any:
        return self.ids[:, : tokens + SUFFIX]

    def first_token(self, ids: Any, **options: Any) -> tuple[float, int]:
        """Seconds of a ``generate`` of one token, and the token."""
        with self.torch.inference_mode():
            start = time.perf_counter()
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=self.pad,
                **options,
            )
            return time.perf_counter() - start, int(out[0, -1])


def restart(directory: str) -> None:
    """In a new process: one TTFT a prefix, each with a cache opened anew, as JSON."""
    from kvkeep.engines.transformers import attach, detach

    engine = Engine()
    engine.first_token(engine.prompt(16))
    seconds: dict[int, tuple[float, int]] = {}
    for tokens in PREFIXES:
        with kvkeep.open(directory, memory="1GiB", disk="4GiB") as cache:
            attach(engine.model, cache)
            engine.first_token(engine.ids[:, :1])  # pays the weights' digest, once a process
            drop_page_cache()
            seconds[tokens] = engine.first_token(engine.prompt(tokens))
            detach(engine.model)
    print(json.dumps(seconds))


def save(engine: Engine, ids: Any, directory: str) -> tuple[float, int]:
    """One cold TTFT with an empty cache in ``directory`` attached."""
    from kvkeep.engines.transformers import attach, detach

    with kvkeep.open(directory, memory="1GiB", disk="4GiB") as cache:
        attach(engine.model, cache)
        engine.first_token(engine.ids[:, :1])
        time.sleep(1)  # memory is touched ahead in the background, as in a server that has been up a while
        result = engine.first_token(ids)
        detach(engine.model)
    shutil.rmtree(directory)
    return result


def main() -> None:
    from kvkeep.engines.transformers import attach, detach

    engine = Engine()
    engine.first_token(engine.prompt(16))
    folder = tempfile.mkdtemp(prefix="kvkeep-bench-", dir=Path.home())
    rows = []
    try:
        results: dict[int, dict[str, list[tuple[float, int]]]] = {}
        for tokens in PREFIXES:
            ids = engine.prompt(tokens)
            got: dict[str, list[tuple[float, int]]] = {
                name: [] for name in ("cold", "saving", "bound", "memory", "disk")
            }
            results[tokens] = got
            prefilled = engine.new_cache()
            with engine.torch.inference_mode():
                engine.model(ids[:, :tokens], past_key_values=prefilled, logits_to_keep=1)
            for _ in range(REPEATS):
                got["bound"].append(engine.first_token(ids, past_key_values=copy.deepcopy(prefilled)))
            for turn in range(PAIRS[tokens]):
                if turn % 2:
                    got["saving"].append(save(engine, ids, f"{folder}/saving"))
                got["cold"].append(engine.first_token(ids))
                if not turn % 2:
                    got["saving"].append(save(engine, ids, f"{folder}/saving"))
            with kvkeep.open(f"{folder}/all", memory="1GiB", disk="4GiB") as cache:
                attach(engine.model, cache)
                engine.first_token(ids[:, :tokens])
                for _ in range(REPEATS):
                    got["memory"].append(engine.first_token(ids))
                detach(engine.model)
        for _ in range(REPEATS):
            command = [sys.executable, "-c", f"from bench.ttft import restart; restart({folder + '/all'!r})"]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            for tokens, pair in json.loads(out.stdout.splitlines()[-1]).items():
                results[int(tokens)]["disk"].append(tuple(pair))
        for tokens, got in results.items():
            least = {name: min(pair[0] for pair in pairs) for name, pairs in got.items()}
            answers = {pair[1] for pairs in got.values() for pair in pairs}
            for name, pairs in got.items():
                base = "cold" if name in ("cold", "saving") else "bound"
                ratio = f"{least[name] / least[base]:.2f} × {base}"
                if name == "saving":
                    halves = zip(pairs, got["cold"], strict=True)
                    ratio += f", pairs {statistics.median(saving[0] / cold[0] for saving, cold in halves):.3f}"
                rows.append(
                    [
                        f"{tokens} tokens, {name}",
                        f"{least[name]:.3f}",
                        f"{statistics.median(pair[0] for pair in pairs):.3f}",
                        ratio,
                        "yes" if len(answers) == 1 else "NO",
                    ]
                )
    finally:
        shutil.rmtree(folder)
    show(
        "ttft",
        "SmolLM2-135M, float32, one thread: seconds to first token",
        ["", "best", "median", "ratio", "same token"],
        rows,
    )
