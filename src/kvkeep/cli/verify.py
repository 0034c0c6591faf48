"""``kvkeep verify``."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console

from kvkeep.cli.directory import Dir, open_store, plural, resolve, scan
from kvkeep.sizes import format_size


def verify(
    directory: Dir = None,
    fix: Annotated[bool, typer.Option("--fix", help="Drop what is damaged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Read every block and check its seal.

    Safe while other processes use the directory; with --fix, blocks that another process holds are left to it: it
    drops them when it meets them. Exit status 0: all is whole, or was made so; 1: damage remains.
    """
    from kvkeep.frame import CAUSES

    path = resolve(directory)
    store = open_store(path, write=fix)
    blocks = scan(store, whole=True)
    damaged = [block for block in blocks if block.cause]
    dropped = sum(store.delete(block.key) for block in damaged) if fix else 0
    store.close()
    causes = Counter(block.cause for block in damaged)
    if as_json:
        facts = {"directory": str(path), "blocks": len(blocks), "damaged": len(damaged), "dropped": dropped}
        print(json.dumps({**facts, "causes": dict(causes)}, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        total = format_size(sum(block.nbytes for block in blocks))
        console.print(f"{path}: {plural(len(blocks), 'block')}, {total}, {len(damaged):,} damaged")
        for cause, count in causes.most_common():
            console.print(f"  {count:,} × {cause}: {CAUSES[cause]}")
        if fix and damaged:
            console.print(f"dropped {dropped:,}")
            if dropped < len(damaged):
                console.print("the others are held by another process, which drops them when it meets them")
        elif damaged:
            console.print("a damaged block is never used; drop them with --fix")
    if dropped < len(damaged):
        raise typer.Exit(1)
