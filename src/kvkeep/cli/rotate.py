"""``kvkeep rotate``."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from kvkeep.cli import secrets
from kvkeep.cli.directory import READ_NBYTES, Kept, Place, fail, opened, plural
from kvkeep.cli.secrets import Keys, Namespaces, Secrets

if TYPE_CHECKING:
    from kvkeep.crypt import Cipher
    from kvkeep.keys import BlockKey
    from kvkeep.stores.base import Store

LEFT = {
    "locked": "encrypted, and their key or namespace was not given",
    "plain": "not encrypted; --plain encrypts them, if you trust who could write there",
    "damaged": "damaged; drop them with kvkeep verify --fix",
    "held": "held by a running process; stop it, then repeat",
    "full": "dropped for want of room",
}
"""Why blocks are not under the newest key afterwards."""


def rotate(
    place: Place = None,
    encryption: Keys = None,
    namespace: Namespaces = None,
    plain: Annotated[bool, typer.Option("--plain", help="Encrypt also what is not encrypted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Encrypt every block, and the names of values, anew with the newest key, so that old keys can be forgotten.

    Give the new key first, then the old ones; and each tenant's namespace, since blocks of a tenant are encrypted
    under it too. Safe to repeat and to interrupt, and while caches use the place: a server's block that is in work is a
    miss for a moment. What a running process holds of a directory is left: stop it first, or repeat once it has ended.
    Blocks keep their age; on a server that counts a time to live, that begins anew. Exit status 1: something is left.
    """
    from kvkeep import labels

    known = secrets.read(encryption, namespace)
    if known.cipher is None:
        fail("give the keys: --encryption env:NEW --encryption env:OLD, the new one first")
    stamp = [time.time()]
    with opened(place, write=True, clock=lambda: stamp[0]) as kept:
        counts = _rotate(kept.store, known, known.cipher, stamp, plain)
        if kept.directory is not None:
            labels.rotate(kept.directory, known.cipher)
        names = _rotate_names(kept, known, known.cipher, plain)
        for cause in LEFT:
            counts[cause] += names[cause]
    left = {cause: counts[cause] for cause in LEFT if counts[cause]}
    if as_json:
        facts = {
            "place": kept.name,
            "rotated": counts["rotated"],
            "current": counts["current"],
            "names": {"rotated": names["rotated"], "current": names["current"]},
        }
        print(json.dumps({**facts, "left": left}, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        done = plural(counts["rotated"], "block")
        console.print(f"{kept.name}: {done} encrypted with the new key, {counts['current']:,} were already")
        if names:
            done = plural(names["rotated"], "name")
            console.print(f"  {done} of values encrypted with the new key, {names['current']:,} were already")
        for cause, count in left.items():
            console.print(f"  {count:,} left: {LEFT[cause]}")
    if left:
        raise typer.Exit(1)


def _rotate_names(kept: Kept, known: Secrets, cipher: Cipher, plain: bool) -> Counter[str]:
    """The index of values, if there is one."""
    from kvkeep.values import upkeep

    index = upkeep.index_of(kept.store, kept.directory)
    if index is None:
        return Counter()
    try:
        return upkeep.rotate(index, cipher, known.namespaces.values(), plain=plain)
    finally:
        index.close()


def _rotate(store: Store, known: Secrets, cipher: Cipher, stamp: list[float], plain: bool) -> Counter[str]:
    """Oldest first, batch by batch. ``stamp`` is what the store writes as each block's time."""
    from kvkeep.errors import StoreFullError

    stamps = store.stamps()
    items = sorted(store.items(), key=lambda item: -stamps.get(item[0], 0.0))
    counts: Counter[str] = Counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("encrypting", total=len(items))
        while items:
            batch: list[BlockKey] = []
            nbytes = 0
            while items and (not batch or nbytes + items[-1][1] <= READ_NBYTES):
                key, size = items.pop()
                batch.append(key)
                nbytes += size
            for key, value in _encrypted(store, batch, known, cipher, plain, counts):
                stamp[0] = stamps.get(key, time.time())
                try:
                    counts["rotated" if store.replace(key, [value]) else "held"] += 1
                except StoreFullError:
                    counts["full"] += 1
            progress.advance(task, len(batch))
    return counts


def _encrypted(
    store: Store, batch: list[BlockKey], known: Secrets, cipher: Cipher, plain: bool, counts: Counter[str]
) -> list[tuple[BlockKey, bytearray]]:
    """The frames of ``batch`` that are not under the newest key, as they will be; others go into ``counts``."""
    from kvkeep import frame
    from kvkeep.errors import FrameError

    done: list[tuple[BlockKey, bytearray]] = []
    with store.read(batch) as values:
        for key, value in zip(batch, values, strict=True):
            if value is None:  # evicted meanwhile
                continue
            try:
                header, _ = frame.parse(value)
                frame.check(header, key, header.layout)
                if header.encrypted and header.key_id == cipher.key_ids[0]:
                    counts["current"] += 1
                    continue
                if header.tenant not in known.namespaces:
                    counts["locked"] += 1
                    continue
                if not header.encrypted and not plain:
                    counts["plain"] += 1
                    continue
                done.append((key, cipher.renew(value, known.namespaces[header.tenant])))
            except FrameError as error:
                counts["locked" if error.cause == "locked" else "damaged"] += 1
    return done
