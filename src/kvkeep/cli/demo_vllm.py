"""``kvkeep demo-vllm``: a real vLLM server with a real model, asked over HTTP, restarted, and asked again.

Three servers, alike but for kvkeep, each with vLLM's own prefix cache on:

1. without kvkeep: each question once (*cold*) and once more (*prefix cache*: vLLM's own, in its process);
2. with kvkeep on an empty directory: each question once, which keeps what was read;
3. with kvkeep on the same directory, started anew: each question again (*restart*).

Each prompt starts with a line of its own, so that no question finds the document as another one left it. Values are
computed in float32: in bfloat16 an answer may depend on how a prompt is split, with any cache or none.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvkeep.cli.vllm_args import transfer_config
from kvkeep.cli.vllm_server import Server, ServerError

ROLES = (
    "You are a clerk who answers questions about a document.",
    "Answer the question that follows the document in one sentence.",
    "Read the document, then the question, and be brief.",
)
QUESTIONS = (
    "How old must a person be to become a Senator?",
    "Which House has the sole Power of Impeachment?",
    "How many days does the President have to return a Bill?",
)
FLAGS = ("--served-model-name", "model", "--dtype", "float32", "--enforce-eager")
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request over HTTP. ``seconds``: until the first token came."""

    seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Row:
    """One question's answers, in the order of the phases."""

    question: str
    cold: Answer
    prefix_cache: Answer
    saving: Answer
    restart: Answer

    @property
    def same(self) -> bool:
        return len({self.cold.text, self.prefix_cache.text, self.saving.text, self.restart.text}) == 1


def ask(url: str, role: str, prompt: str, new_tokens: int) -> Answer:
    """One streamed chat completion by the ``openai`` client."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    begin = time.perf_counter()
    first = 0.0
    text = ""
    usage: Any = None
    with client.chat.completions.create(
        model="model",
        messages=[{"role": "system", "content": role}, {"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta.content if chunk.choices else None
            if delta:
                first = first or time.perf_counter()
                text += delta
            usage = chunk.usage or usage
    details = usage.prompt_tokens_details
    return Answer(first - begin, text.strip(), usage.prompt_tokens, (details.cached_tokens or 0) if details else 0)


def measure(model: str, document: str, new_tokens: int, folder: Path, progress: Callable[[str], None]) -> list[Row]:
    """Run the three servers. Raises :class:`ServerError`."""
    kept = json.dumps(transfer_config({"dir": str(folder / "cache"), "disk": "4GiB", "memory": "1GiB"}))
    phases: dict[str, list[Answer]] = {}

    def serve(name: str, flags: tuple[str, ...], *asked: str) -> None:
        def waiting(seconds: float) -> None:
            progress(f"{name}: starting, {seconds:.0f} s")

        flags = (*FLAGS, "--enable-prompt-tokens-details", *flags)
        with Server(model, flags, log=folder / "vllm.log", waiting=waiting) as server:
            answers: dict[str, list[Answer]] = {phase: [] for phase in asked}
            for number, (role, question) in enumerate(zip(ROLES, QUESTIONS, strict=True), 1):
                for phase in asked:
                    progress(f"{name}: question {number} of {len(QUESTIONS)}, {phase}")
                    answers[phase].append(ask(server.url, role, f"{document}\n\n{question}", new_tokens))
            phases.update(answers)
            progress(f"{name}: ending")

    serve("vLLM alone", (), "cold", "prefix cache")
    serve("vLLM with kvkeep", ("--kv-transfer-config", kept), "saving")
    serve("vLLM with kvkeep, restarted", ("--kv-transfer-config", kept), "restart")
    return [
        Row(question, *answers)
        for question, *answers in zip(
            QUESTIONS, phases["cold"], phases["prefix cache"], phases["saving"], phases["restart"], strict=True
        )
    ]


def figures(rows: list[Row]) -> dict[str, Any]:
    """Medians over the questions."""

    def seconds(phase: str) -> float:
        answers: list[Answer] = [getattr(row, phase) for row in rows]
        return round(statistics.median(answer.seconds for answer in answers), 4)

    return {
        "cold_seconds": seconds("cold"),
        "prefix_cache_seconds": seconds("prefix_cache"),
        "restart_seconds": seconds("restart"),
        "same_answers": all(row.same for row in rows),
        "saving_seconds": seconds("saving"),
        "prompt_tokens": [row.cold.prompt_tokens for row in rows],
        "prefix_cache_cached_tokens": [row.prefix_cache.cached_tokens for row in rows],
        "restart_cached_tokens": [row.restart.cached_tokens for row in rows],
    }


def show(rows: list[Row], console: Console) -> None:
    """The table that a person reads."""
    table = Table(
        title=f"{MODEL} by vllm serve: time to first token",
        caption="below the seconds: tokens of the prompt that were not computed",
        box=box.SIMPLE_HEAVY,
        padding=(0, 1, 0, 0),
    )
    table.add_column("question", overflow="fold", min_width=20)
    for heading in ("prompt", "cold", "prefix\ncache", "kvkeep,\nsaving", "kvkeep,\nrestarted", "same\nanswer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.question,
            f"{row.cold.prompt_tokens:,}",
            f"{row.cold.seconds:.2f} s\n{row.cold.cached_tokens:,}",
            f"{row.prefix_cache.seconds:.2f} s\n{row.prefix_cache.cached_tokens:,}",
            f"{row.saving.seconds:.2f} s\n{row.saving.cached_tokens:,}",
            f"{row.restart.seconds:.2f} s\n{row.restart.cached_tokens:,}",
            "yes" if row.same else "[red]NO[/red]",
        )
    console.print(table)
    for number, row in enumerate(rows, 1):
        console.print(f"[bold]{number}.[/bold] {row.restart.text}", highlight=False)


def demo_vllm(
    json_only: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
    model: Annotated[str, typer.Option(help=f"A model that vLLM serves: an id or a folder. Default: {MODEL}.")] = "",
    document: Annotated[
        Path | None, typer.Option(help="A text file to ask about instead of the one that ships with the demo.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 24,
) -> None:
    """Show kvkeep in vLLM: a real server is asked, restarted and asked again (run it by `make demo-vllm`).

    Compares vLLM alone (cold, and by its own prefix cache) with vLLM and kvkeep after a restart. Takes about three
    minutes on two CPU cores. Exit status 1: an answer differed, or nothing was reused; 2: the demo could not run.
    """
    errors = Console(stderr=True)
    text = (document or files("kvkeep.cli").joinpath("constitution.txt")).read_text(encoding="utf-8")
    signal.signal(signal.SIGTERM, _end)  # as Ctrl-C does: the servers are ended on the way out
    last = ""
    with tempfile.TemporaryDirectory(prefix="kvkeep-demo-vllm-") as name, errors.status("starting") as status:

        def progress(line: str) -> None:
            nonlocal last
            status.update(line)
            stage = line.rpartition(",")[0] or line  # "starting, 3 s", "starting, 4 s" are one
            if not errors.is_terminal and stage != last:
                errors.print(line, highlight=False)
            last = stage

        try:
            rows = measure(model or _smollm2(progress), text, new_tokens, Path(name), progress)
        except (ServerError, subprocess.CalledProcessError) as error:
            message = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            errors.print(f"the demo could not run:\n{message}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error
    if json_only:
        print(json.dumps(figures(rows)))
    else:
        show(rows, Console())
    differing = sum(not row.same for row in rows)
    if differing or not all(row.restart.cached_tokens for row in rows):
        what = f"{differing} answers differ" if differing else "a question reused nothing after the restart"
        errors.print(f"demo failed: {what}", style="red", highlight=False)
        raise typer.Exit(1)


def _smollm2(progress: Callable[[str], None]) -> str:
    """The folder with the demo's model; written by a process of its own, so that this one needs no torch."""
    progress("the model: SmolLM2 as safetensors (once)")
    made = subprocess.run(
        [sys.executable, "-m", "kvkeep.cli.smollm2"],
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return made.stdout.splitlines()[-1]


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
