"""``kvkeep clear``."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvkeep.cli import secrets
from kvkeep.cli.directory import Kept, Place, fail, label, models, opened, plural, scan
from kvkeep.cli.secrets import Keys
from kvkeep.sizes import format_size, parse_age

if TYPE_CHECKING:
    from kvkeep.crypt import Cipher


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

    --model, --namespace and --older-than together drop what fits all. With --all, and with --namespace alone, values'
    names and small values go too. In an encrypted cache, models have names only for who has the key, and so has
    whose a value's name is. The files keep their size, to be used again. Blocks that
    another process holds are left to it; then the exit status is 1.
    """
    from kvkeep.errors import ConfigError
    from kvkeep.identity import tenant_of

    if everything == bool(model or older_than or namespace):
        fail("say what to drop: --all, or --model, --namespace and/or --older-than")
    cipher = secrets.read(encryption, None).cipher
    tenant = secret = b""
    try:
        if namespace:
            secret = secrets.namespace(namespace)
            tenant = tenant_of(secret)
        before = time.time() - parse_age(older_than) if older_than else float("inf")
    except ConfigError as error:
        fail(str(error))
    with opened(place, write=True) as kept:
        if older_than and kept.directory is None:
            fail(
                "a server does not say how old a block is: let it expire them, with ?ttl=… in the address of the cache"
            )
        known = models(kept.directory, cipher)
        blocks = list(scan(kept.store, whole=False))
        if model:
            there = sorted({label(block.layout, known) for block in blocks})
            blocks = [
                block
                for block in blocks
                if label(block.layout, known) == model or block.layout.hex().startswith(model.lower())
            ]
            if there and not blocks:
                fail(f"no block is of a model {model!r}; there are: {', '.join(there)}")
        wanted = [block for block in blocks if block.stamp < before and (not namespace or block.tenant == tenant)]
        dropped = [block for block in wanted if kept.store.delete(block.key)]
        names: Counter[str] = Counter()
        if everything or not (model or older_than):
            names = forget_values(kept, None if everything else secret, cipher)
    console = Console(highlight=False)
    size = format_size(sum(block.nbytes for block in dropped))
    named = f", and {plural(names['dropped'], 'name')} of values" if names["dropped"] else ""
    console.print(f"{kept.name}: dropped {plural(len(dropped), 'block')}, {size}{named}")
    if len(dropped) < len(wanted):
        left = plural(len(wanted) - len(dropped), "block")
        console.print(f"{left} left: another process holds them")
    if names["locked"]:
        left = plural(names["locked"], "name")
        console.print(f"{left} of values left: encrypted, and whose they are says only their key (--encryption)")
    if names["locked"] or len(dropped) < len(wanted):
        raise typer.Exit(1)


def forget_values(kept: Kept, namespace: bytes | None, cipher: Cipher | None) -> Counter[str]:
    """Forget the names of a tenant's values, or all, if there is an index; see :func:`kvkeep.values.upkeep.forget`."""
    from kvkeep.errors import StoreError
    from kvkeep.values import upkeep

    index = upkeep.index_of(kept.store, kept.directory)
    if index is None:
        return Counter()
    try:
        return upkeep.forget(index, namespace, cipher)
    except StoreError as error:
        fail(f"the names of values could not be dropped: {error}")
    finally:
        index.close()
