"""``kvkeep clear``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvkeep.cli import secrets
from kvkeep.cli.directory import Place, fail, label, models, opened, plural, scan
from kvkeep.cli.secrets import Keys
from kvkeep.sizes import format_size, parse_age


def clear(
    place: Place = None,
    everything: Annotated[bool, typer.Option("--all", help="Drop every block, and every value.")] = False,
    model: Annotated[
        str, typer.Option(help="Drop the blocks of this model: its name, or the start of its layout, as in stats.")
    ] = "",
    older_than: Annotated[str, typer.Option(help="Drop blocks written longer ago than this: 12h, 7d, 2w.")] = "",
    namespace: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Drop this tenant's blocks. Where its secret lies: env:NAME or file:PATH."),
    ] = "",
    encryption: Keys = None,
) -> None:
    """Drop blocks: all of them, those of a model, of a tenant, those that are old.

    --model, --namespace and --older-than together drop what fits all. In an encrypted cache, models have names only
    for who has the key. The files keep their size, to be used again. Blocks that
    another process holds are left to it; then the exit status is 1.
    """
    from kvkeep.errors import ConfigError
    from kvkeep.identity import tenant_of

    if everything == bool(model or older_than or namespace):
        fail("say what to drop: --all, or --model, --namespace and/or --older-than")
    cipher = secrets.read(encryption, None).cipher
    tenant = b""
    try:
        if namespace:
            tenant = tenant_of(secrets.namespace(namespace))
        before = time.time() - parse_age(older_than) if older_than else float("inf")
    except ConfigError as error:
        fail(str(error))
    with opened(place, write=True) as kept:
        known = models(kept.directory, cipher)
        wanted = [
            block
            for block in scan(kept.store, whole=False)
            if block.stamp < before
            and (not namespace or block.tenant == tenant)
            and (not model or label(block.layout, known) == model or block.layout.hex().startswith(model.lower()))
        ]
        dropped = [block for block in wanted if kept.store.delete(block.key)]
        names = forget_values(kept.directory) if everything and kept.directory is not None else 0
    console = Console(highlight=False)
    size = format_size(sum(block.nbytes for block in dropped))
    named = f", and {plural(names, 'name')} of values" if names else ""
    console.print(f"{kept.name}: dropped {plural(len(dropped), 'block')}, {size}{named}")
    if len(dropped) < len(wanted):
        left = plural(len(wanted) - len(dropped), "block")
        console.print(f"{left} left: another process holds them")
        raise typer.Exit(1)


def forget_values(directory: Path) -> int:
    """Clear the index of values, if there is one; how many names it had."""
    from kvkeep.errors import StoreError
    from kvkeep.values.sqlite import FILE, SqliteIndex

    if not (directory / FILE).exists():
        return 0
    index = SqliteIndex(directory)
    try:
        return index.clear()
    except StoreError as error:
        fail(f"the names of values could not be dropped: {error}")
    finally:
        index.close()
