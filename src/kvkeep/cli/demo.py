"""``kvkeep demo``: a real model reads a long document once and answers questions on it, cold, warm and after a restart.

The document is the Constitution of the United States as of 1787 (public domain), abridged in Article II. Writes
``demo.json`` and ``demo.png`` to the output folder. Fails when an answer differs or nothing was reused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvkeep.cli.directory import fail
from kvkeep.cli.measure import Job

MODEL = "SmolLM2-135M-Instruct"

QUESTIONS = (
    "How old must a person be to become a Senator?",
    "Which House has the sole Power of Impeachment?",
    "How many days does the President have to return a Bill?",
    "请把例句「今天天气很好，适合出门」翻译成英文，再用一句话说明上面的文件讲了什么。",
)


class MeasureError(Exception):
    """The measuring process failed; the message holds what it wrote to standard error."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question's figures, named as in the JSON file."""

    question: str
    prompt_tokens: int
    cached_tokens: int
    cold_seconds: float
    memory_seconds: float
    restart_seconds: float
    same_answer: bool


def measure(job: Job, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run ``job`` in a process of its own; returns its results. Raises :class:`MeasureError`."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from kvkeep.cli.measure import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    complaints: list[str] = []
    # Read beside standard output: a full pipe that nobody empties would stop the process.
    reader = threading.Thread(target=lambda stream: complaints.extend(stream), args=(process.stderr,))
    reader.start()
    results: list[dict[str, Any]] = []
    try:
        process.stdin.write(json.dumps(asdict(job)))
        process.stdin.close()
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            event = json.loads(line)
            if event["event"] == "step":
                progress(event["text"])
            elif event["event"] == "result":
                results.append(event)
    except BrokenPipeError:
        pass  # it died before it read its job: the exit status below says so
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        status = process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    if status:
        raise MeasureError("".join(complaints[-12:]).strip() or f"exit status {status}")
    return results


def tabulate(questions: list[str], results: list[dict[str, Any]]) -> list[Row]:
    """One row a question from the results of all phases."""
    found = {(result["phase"], result["question"]): result for result in results}
    rows = []
    for number, question in enumerate(questions):
        cold, memory, restart = (found[phase, number] for phase in ("cold", "memory", "restart"))
        rows.append(
            Row(
                question=question,
                prompt_tokens=cold["prompt_tokens"],
                # The document both found: a restart also finds the question itself, so the smaller is the fair figure.
                cached_tokens=min(memory["cached_tokens"], restart["cached_tokens"]),
                cold_seconds=round(cold["seconds"], 4),
                memory_seconds=round(memory["seconds"], 4),
                restart_seconds=round(restart["seconds"], 4),
                same_answer=cold["tokens"] == memory["tokens"] == restart["tokens"],
            )
        )
    return rows


def show(rows: list[Row], answers: dict[int, str], model: str, console: Console) -> None:
    """The table that a person reads."""
    table = Table(
        title=f"{model}: time to first token",
        caption="× : cold ÷ memory / cold ÷ after a restart",
        box=box.SIMPLE_HEAVY,
        padding=(0, 1, 0, 0),
    )
    table.add_column("question", overflow="fold", min_width=12)
    for heading in ("prompt", "cached", "cold", "memory", "restart", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same answer", justify="right", min_width=6)
    for row in rows:
        table.add_row(
            row.question,
            f"{row.prompt_tokens:,}",
            f"{row.cached_tokens:,}",
            f"{row.cold_seconds:.2f} s",
            f"{row.memory_seconds:.2f} s",
            f"{row.restart_seconds:.2f} s",
            f"{row.cold_seconds / row.memory_seconds:.0f}× / {row.cold_seconds / row.restart_seconds:.0f}×",
            "yes" if row.same_answer else "[red]NO[/red]",
        )
    console.print(table)
    for number, answer in sorted(answers.items()):
        console.print(f"[bold]{number + 1}.[/bold] {answer}", highlight=False)


def draw(rows: list[Row], model: str, path: Path) -> None:
    """The picture: three bars a question, from zero, so that lengths compare as the times do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 1.1 * len(rows)), layout="constrained")
    axes = figure.subplots()
    series = (
        ("cold", "#8a8f98", [row.cold_seconds for row in rows]),
        ("from memory", "#1b7f5c", [row.memory_seconds for row in rows]),
        ("after a restart, from disk", "#2f6db3", [row.restart_seconds for row in rows]),
    )
    for offset, (label, color, values) in enumerate(series):
        places = [number + 0.27 * (offset - 1) for number in range(len(rows))]
        bars = axes.barh(places, values, height=0.25, color=color, label=label)
        axes.bar_label(bars, [f"{value:.2f} s" for value in values], padding=3, fontsize=9)
    # matplotlib's own font has no Chinese characters: a question that it cannot draw gets its number only.
    labels = [
        f"{number}. {row.question if row.question.isascii() else '(question in Chinese)'}\n"
        f"{row.cached_tokens:,} of {row.prompt_tokens:,} tokens cached"
        for number, row in enumerate(rows, 1)
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("time to first token, seconds")
    axes.set_title(f"{model}, with and without kvkeep")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("demo-out"),
    model: Annotated[
        str, typer.Option(help=f"A Transformers model id, a folder, or a .gguf file. Default: {MODEL}.")
    ] = "",
    json_only: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    document: Annotated[
        Path | None, typer.Option(help="A text file to ask about instead of the one that ships with the demo.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this instead of the demo's questions. May be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 24,
) -> None:
    """Show what kvkeep does: a real model, a long document, and the same questions three times.

    Each question is asked cold (kvkeep not attached), with the document kept in memory, and in a second process that
    finds it on the disk. Takes two to three minutes on two CPU cores. Exit status 1: an answer differed, or nothing
    was reused; 2: the demo could not run.
    """
    errors = Console(stderr=True)
    questions = list(question or QUESTIONS)
    name = model or MODEL
    try:
        text = (document or files("kvkeep.cli").joinpath("constitution.txt")).read_text(encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
    except UnicodeDecodeError:
        fail(f"{document} is no text in UTF-8")
    except OSError as error:
        fail(f"the demo could not run: {error}")
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".cache-", dir=out) as directory,
            errors.status("starting", spinner="dots") as status,
        ):

            def progress(text: str) -> None:
                status.update(text)
                if not json_only and not errors.is_terminal:
                    errors.print(text, highlight=False)

            results = []
            for phases in (["cold", "memory"], ["restart"]):
                job = Job(phases, model, text, questions, directory, new_tokens)
                results += measure(job, progress)
    except MeasureError as error:
        errors.print(f"the demo could not run:\n{error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    rows = tabulate(questions, results)
    figures = {"questions": [asdict(row) for row in rows], "model": name}
    (out / "demo.json").write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    draw(rows, Path(name).name, out / "demo.png")
    if json_only:
        print(json.dumps(figures, ensure_ascii=False))
    else:
        answers = {result["question"]: result["answer"] for result in results if result["phase"] == "restart"}
        console = Console()
        show(rows, answers, Path(name).name, console)
        console.print(f"saved: {out / 'demo.png'}, {out / 'demo.json'}", highlight=False)
    differing = [row for row in rows if not row.same_answer]
    if differing or not all(row.cached_tokens for row in rows):
        what = f"{len(differing)} answers differ" if differing else "a question reused nothing"
        errors.print(f"demo failed: {what}", style="red", highlight=False)
        raise typer.Exit(1)
