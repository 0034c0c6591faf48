"""Timing and printing, alike for all benchmarks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path("bench-out")
console = Console(width=110)


def best_of(repeats: int, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> tuple[float, float]:
    """Minimum and median wall seconds of ``work``; ``before`` runs untimed before each."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)


def show(name: str, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table and keep it as ``bench-out/NAME.json``."""
    table = Table(title=title)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    OUT.mkdir(exist_ok=True)
    lines = [dict(zip(columns, row, strict=True)) for row in rows]
    (OUT / f"{name}.json").write_text(json.dumps(lines, indent=1, ensure_ascii=False))
