"""``kvkeep clear``."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console

from kvkeep.cli.directory import Dir, fail, label, models, open_store, plural, resolve, scan
from kvkeep.sizes import format_size, parse_age


def clear(
    directory: Dir = None,
    everything: Annotated[bool, typer.Option("--all", help="Drop every block.")] = False,
    model: Annotated[
        str, typer.Option(help="Drop the blocks of this model: its name, or the start of its layout, as in stats.")
    ] = "",
    older_than: Annotated[str, typer.Option(help="Drop blocks written longer ago than this: 12h, 7d, 2w.")] = "",
) -> None:
    """Drop blocks: all of them, those of a model, those that are old.

    --model and --older-than together drop what fits both. The files keep their size, to be used again. Blocks that
    another process holds are left to it; then the exit status is 1.
    """
    from kvkeep.errors import ConfigError

    if everything == bool(model or older_than):
        fail("say what to drop: --all, or --model and/or --older-than")
    path = resolve(directory)
    try:
        before = time.time() - parse_age(older_than) if older_than else float("inf")
    except ConfigError as error:
        fail(str(error))
    known = models(path)
    store = open_store(path, write=True)
    wanted = [
        block
        for block in scan(store, whole=False)
        if block.stamp < before
        and (not model or label(block.layout, known) == model or block.layout.hex().startswith(model.lower()))
    ]
    dropped = [block for block in wanted if store.delete(block.key)]
    store.close()
    console = Console(highlight=False)
    size = format_size(sum(block.nbytes for block in dropped))
    console.print(f"{path}: dropped {plural(len(dropped), 'block')}, {size}")
    if len(dropped) < len(wanted):
        left = plural(len(wanted) - len(dropped), "block")
        console.print(f"{left} left: another process holds them")
        raise typer.Exit(1)
