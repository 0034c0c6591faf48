"""``kvkeep stats``."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvkeep.cli import secrets
from kvkeep.cli.directory import Found, Place, label, models, opened, plural, scan
from kvkeep.cli.secrets import Keys
from kvkeep.sizes import format_size


def stats(
    place: Place = None,
    encryption: Keys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what lies in a cache directory or on a server: blocks, tokens and bytes of each model.

    Reads the blocks' headers; safe while other processes use the place. In an encrypted cache, models have names
    only for who has the key. A server keeps neither models' names nor times.
    """
    from kvkeep.stores.disk import DiskStore

    cipher = secrets.read(encryption, None).cipher
    with opened(place) as kept:
        known = models(kept.directory, cipher)
        blocks = scan(kept.store, whole=False)
        on_disk = kept.store.nbytes_on_disk if isinstance(kept.store, DiskStore) else None
    groups: dict[bytes, list[Found]] = {}
    for block in blocks:
        groups.setdefault(block.layout, []).append(block)
    rows: list[dict[str, Any]] = [
        {
            "model": label(layout, known),
            "layout": layout.hex(),
            "blocks": len(group),
            "tokens": len(group) * int(known.get(layout, {}).get("block_tokens", 0)),
            "nbytes": sum(block.nbytes for block in group),
            "oldest": min(block.stamp for block in group),
            "newest": max(block.stamp for block in group),
        }
        for layout, group in groups.items()
    ]
    rows.sort(key=lambda row: -row["nbytes"])
    if as_json:
        whole = {"directory": kept.name, "blocks": len(blocks), "nbytes_on_disk": on_disk, "models": rows}
        print(json.dumps(whole, ensure_ascii=False))
        return
    files = "" if on_disk is None else f"; files take {format_size(on_disk)}"
    table = Table(title=kept.name, caption=f"{plural(len(blocks), 'block')}{files}")
    for heading in ("model", "layout"):
        table.add_column(heading)
    for heading in ("blocks", "tokens", "size", "oldest", "newest"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (
            datetime.fromtimestamp(row[at]).strftime("%Y-%m-%d %H:%M") if row[at] else "?"
            for at in ("oldest", "newest")
        )
        size = format_size(row["nbytes"])
        # Without its note in models.json nobody knows how many tokens a block of this layout has.
        tokens = f"{row['tokens']:,}" if row["tokens"] else "?"
        table.add_row(row["model"], row["layout"][:12], f"{row['blocks']:,}", tokens, size, *times)
    Console().print(table)
