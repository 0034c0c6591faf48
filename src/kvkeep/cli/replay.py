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
    from collections.abc import Sequence

Row = dict[str, Any]
CEILINGS = ("opt", "unlimited")
HITS = "share of the prompts' tokens found; under it the share of the way from LRU to OPT; bold: the best"
COMPUTE = "share of the prefill's compute saved"


def replay(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE...", help="Mooncake's, a request log, or kvkeep's own recording; gzip or not."),
    ],
    policies: Annotated[
        str, typer.Option(help='Names with commas between, or "all". Default: all; with --tiers lru and hazard.')
    ] = "",
    capacities: Annotated[
        str,
        typer.Option(
            help="Shares of the trace's unique blocks (2%), blocks (5000) or bytes (20GiB), with commas. "
            "Default: 0.5%,1%,2%,5%,10%,20%,50%."
        ),
    ] = "",
    tiers: Annotated[
        str,
        typer.Option(
            help="Several tiers instead, fastest first: memory=1%,disk=10%. A tier's own policy: disk=10%:lru."
        ),
    ] = "",
    write_rules: Annotated[
        str,
        typer.Option(
            help="With --tiers: which blocks the tiers below the first are given. Default: all,predicted,seen-twice."
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="For capacities in bytes and prefill compute: a model's folder or config.json, a known name "
            "(llama-3.1-8b), or bytes a token (131072)."
        ),
    ] = "",
    block_tokens: Annotated[int, typer.Option(min=0, help="Tokens a block, where the trace does not say.")] = 0,
    tokenizer: Annotated[
        str,
        typer.Option(help='For logs of text: a tokenizer.json, a folder with one, or "bytes" (4 bytes a token).'),
    ] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Replay all files as one trace, in the order of time, a size of blocks.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the rows to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows instead of tables.")] = False,
) -> None:
    """Replay traces: what each eviction policy finds at each capacity, and how far that is from the best.

    A hit is the longest prefix of consecutive cached blocks, in tokens, as engines count. OPT knows the future: nobody
    can beat it at that capacity. "Unlimited" never evicts: nobody can beat it at any.
    """
    from kvkeep import sim
    from kvkeep.cli import curves
    from kvkeep.errors import ConfigError
    from kvkeep.sim import cost, models
    from kvkeep.trace import merge as merged
    from kvkeep.trace import read_all

    if csv_file is not None and not csv_file.parent.is_dir():
        fail(f"{csv_file}: cannot be written: there is no folder {csv_file.parent}")
    with progress_bar() as bar:
        try:
            if plot is not None:
                curves.require(plot, tiers=bool(tiers))
            size = models.load(model) if model else None
            task = bar.add_task("reading", total=None)
            loaded = read_all(traces, block_tokens=block_tokens, tokenizer=tokenizer)
            rows = sim.rows(
                merged(loaded) if merge else loaded,
                policies,
                capacities or None,
                tiers=tiers,
                write_rules=write_rules,
                token_nbytes=size.token_nbytes if size else 0,
                attention_tokens=size.attention_tokens if size else cost.ATTENTION_TOKENS,
                jobs=jobs or cores(),
                progress=lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            )
        except ConfigError as error:
            bar.stop()
            fail(str(error))
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if plot is not None:
        try:
            curves.draw(rows, plot)
        except OSError as error:
            fail(f"{plot}: cannot be written: {error}")
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    console = Console()
    for name in dict.fromkeys(row["trace"] for row in rows):
        part = [row for row in rows if row["trace"] == name]
        title = _title(name, part)
        if tiers:
            console.print(_tier_table(title, part))
            continue
        console.print(_table(title, part, "token_hit_ratio", HITS))
        console.print(_table("", part, "compute_saved", COMPUTE))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def progress_bar() -> Progress:
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


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        fail(f"{path}: cannot be written: {error}")


def _title(name: str, rows: Sequence[Row]) -> str:
    row = next(row for row in rows if row["policy"] == "unlimited")
    return (
        f"{name}: {row['requests']:,} requests, {row['prompt_tokens']:,} tokens, "
        f"{row['capacity_blocks']:,} unique blocks of {row['block_tokens']} tokens"
    )


def _table(title: str, rows: Sequence[Row], column: str, caption: str) -> Table:
    """Policies down, capacities across: ``column`` and, under a hit ratio, the share of the gap closed."""
    capacities = {row["capacity"]: row["capacity_blocks"] for row in rows if row["policy"] != "unlimited"}
    by_policy: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], {})[row["capacity"]] = row
    table = Table(title=title, caption=caption)
    table.add_column("policy", no_wrap=True)
    for label, blocks in capacities.items():
        table.add_column(label if label == str(blocks) else f"{label}\n{blocks:,}", justify="right", no_wrap=True)
    best = {
        label: max(at[label][column] for policy, at in by_policy.items() if policy not in CEILINGS)
        for label in capacities
    }
    for policy, at in by_policy.items():
        if policy == "opt":
            table.add_section()
        cells = []
        for label in capacities:
            row = at.get(label) or at["all"]
            cell = f"{row[column]:.3f}"
            if policy not in CEILINGS:
                if row[column] == best[label]:
                    cell = f"[bold]{cell}[/bold]"
                if column == "token_hit_ratio" and policy != "lru" and row["gap_closed"] is not None:
                    cell += f"\n[dim]{row['gap_closed']:+.0%}[/dim]"
            cells.append(cell)
        table.add_row(policy, *cells)
    return table


def _tier_table(title: str, rows: Sequence[Row]) -> Table:
    tiers = [column.removesuffix("_hit_ratio") for column in rows[0] if f"{column[:-10]}_written_blocks" in rows[0]]
    table = Table(
        title=title,
        caption="shares of the prompts' tokens found in each tier; blocks written to it",
    )
    for heading in ("policy", "write rule"):
        table.add_column(heading)
    for tier in tiers:
        table.add_column(f"{tier}\n{rows[0][f'{tier}_capacity_blocks']:,}", justify="right")
    for heading in ("together", "compute", *(f"written to {tier}" for tier in tiers[1:])):
        table.add_column(heading, justify="right")
    for row in rows:
        if row["policy"] == "opt":
            table.add_section()
        known = "write_rule" in row
        table.add_row(
            row["policy"],
            row.get("write_rule", ""),
            *(f"{row[f'{tier}_hit_ratio']:.3f}" if known else "" for tier in tiers),
            f"{row['token_hit_ratio']:.3f}",
            f"{row['compute_saved']:.3f}",
            *(f"{row[f'{tier}_written_blocks']:,}" if known else "" for tier in tiers[1:]),
        )
    return table
