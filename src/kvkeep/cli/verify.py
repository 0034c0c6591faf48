"""``kvkeep verify``."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console

from kvkeep.cli import secrets
from kvkeep.cli.directory import Place, opened, plural, scan
from kvkeep.cli.secrets import Keys, Namespaces
from kvkeep.sizes import format_size


def verify(
    place: Place = None,
    encryption: Keys = None,
    namespace: Namespaces = None,
    fix: Annotated[bool, typer.Option("--fix", help="Drop what is damaged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Read every block and check its seal, or its tag if it is encrypted.

    Blocks whose key or namespace is not given are counted, not checked, and left alone. Where a key is given, a block
    that is not encrypted counts as damaged: the cache would not believe it.

    Safe while other processes use the directory; with --fix, blocks that another process holds are left to it: it
    drops them when it meets them. Exit status 0: all is whole, or was made so; 1: damage remains.
    """
    from kvkeep.frame import CAUSES

    known = secrets.read(encryption, namespace)
    with opened(place, write=fix) as kept:
        blocks = scan(kept.store, whole=True, secrets=known)
        damaged = [block for block in blocks if block.damaged]
        dropped = sum(kept.store.delete(block.key) for block in damaged) if fix else 0
    locked = sum(block.cause == "locked" for block in blocks)
    causes = Counter(block.cause for block in damaged)
    if as_json:
        facts = {"directory": kept.name, "blocks": len(blocks), "damaged": len(damaged), "dropped": dropped}
        print(json.dumps({**facts, "locked": locked, "causes": dict(causes)}, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        total = format_size(sum(block.nbytes for block in blocks))
        console.print(f"{kept.name}: {plural(len(blocks), 'block')}, {total}, {len(damaged):,} damaged")
        for cause, count in causes.most_common():
            console.print(f"  {count:,} × {cause}: {CAUSES[cause]}")
        if locked:
            console.print(f"  {locked:,} not checked: encrypted, and their key or namespace was not given")
        if fix and damaged:
            console.print(f"dropped {dropped:,}")
            if dropped < len(damaged):
                console.print("the others are held by another process, which drops them when it meets them")
        elif damaged:
            console.print("a damaged block is never used; drop them with --fix")
    if dropped < len(damaged):
        raise typer.Exit(1)
