"""``kvkeep replay``."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvkeep.cli.directory import fail

if TYPE_CHECKING:
    from kvkeep.trace import Trace

Row = dict[str, Any]


def replay(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Trace files, gzip or not.")],
    policies: Annotated[str, typer.Option(help='Names with commas between, or "all".')] = "all",
    capacities: Annotated[
        str,
        typer.Option(help="Shares of the trace's unique blocks (2%), blocks (5000) or bytes (20GiB), with commas."),
    ] = "0.5%,1%,2%,5%,10%,20%,50%",
    token_bytes: Annotated[float, typer.Option(help="Bytes that one token's KV takes, for capacities in bytes.")] = 0,
    block_tokens: Annotated[int, typer.Option(help="Tokens a block, where the trace does not say.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows instead of tables.")] = False,
) -> None:
    """Replay traces: what each eviction policy finds at each capacity, and how far that is from the best.

    A hit is the longest prefix of consecutive cached blocks, in tokens. OPT knows the future: nobody can beat it.
    """
    from kvkeep import sim
    from kvkeep.errors import ConfigError
    from kvkeep.trace import read_all

    with _progress() as bar:
        try:
            loaded = read_all(traces, block_tokens=block_tokens)
            task = bar.add_task("replays", total=None)
            rows = sim.rows(
                loaded,
                policies,
                capacities.split(","),
                token_nbytes=token_bytes,
                jobs=jobs or len(os.sched_getaffinity(0)),
                progress=lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            )
        except ConfigError as error:
            bar.stop()
            fail(str(error))
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    console = Console()
    for trace in loaded:
        console.print(_table(trace, [row for row in rows if row["trace"] == trace.name]))


def _progress() -> Progress:
    """On stderr, and only where somebody looks."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _write_csv(path: Path, rows: list[Row]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        fail(f"{path}: cannot be written: {error}")


def _table(trace: Trace, rows: list[Row]) -> Table:
    """Policies down, capacities across: token-hit ratio, and below it compute saved and gap closed."""
    labels = list(dict.fromkeys(row["capacity"] for row in rows if row["policy"] != "unlimited"))
    by_policy: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], {})[row["capacity"]] = row
    table = Table(
        title=f"{trace.name}: {trace.num_prompts:,} requests, {trace.num_tokens:,} tokens, "
        f"{trace.unique_blocks:,} unique blocks of {trace.block_tokens}",
        caption="token-hit ratio / prefill compute saved / share of the gap from LRU to OPT closed",
    )
    table.add_column("policy")
    for label in labels:
        table.add_column(label, justify="right")
    best = {
        label: max(at[label]["token_hit_ratio"] for name, at in by_policy.items() if label in at and name != "opt")
        for label in labels
    }
    for name, at in by_policy.items():
        cells = []
        for label in labels:
            row = at.get(label) or at["all"]
            hit = f"{row['token_hit_ratio']:.3f}"
            gap = row["gap_closed"]
            closed = "" if gap is None or name in ("lru", "opt", "unlimited") else f" {gap:+.0%}"
            bold = name not in ("opt", "unlimited") and row["token_hit_ratio"] == best[label]
            cells.append(f"{f'[bold]{hit}[/bold]' if bold else hit} {row['compute_saved']:.3f}{closed}")
        table.add_row(name, *cells)
    return table
