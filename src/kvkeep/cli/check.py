"""``kvkeep check``."""

from __future__ import annotations

import json
import os
import secrets as randomness
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvkeep.cli.directory import Place, fail
from kvkeep.sizes import format_size

if TYPE_CHECKING:
    from kvkeep.errors import StoreError
    from kvkeep.keys import BlockKey
    from kvkeep.stores.base import Store

VALUE_NBYTES = 1_500_000
"""About a block of 16 tokens of a model with 8 billion weights."""

BRIEF_SECONDS = 20.0
"""How long a name that was tried may stay where it cannot be deleted."""

VALUES = 24
LOOKUPS = 50

LITTLE_NBYTES = 256 << 20
"""Less is little memory for a server."""

LIMITS = {"proto-max-bulk-len": "512mb", "client-query-buffer-limit": "1gb"}
"""Settings of Redis that a value has to stay below, and what they usually are."""


@dataclass
class Checked:
    """What was found of one tier. ``advice``: what to change there, one sentence each."""

    tier: str
    where: str
    reached: bool = False
    round_trip_ms: float | None = None
    write_mb_s: float | None = None
    read_mb_s: float | None = None
    values: bool | None = None
    """Are names kept there, too? None where that was not tried."""
    advice: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        """Was all that was written there read back?"""
        return self.read_mb_s is not None and self.values is not False


def check(
    place: Place = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Try each tier: is it reached, how fast is it, and what should be changed there.

    Without a place: all tiers of the file that KVKEEP_CONFIG names, else the defaults. Writes a few values of its own
    and deletes them again. Exit status 1 where a tier cannot be reached, or does not keep what is written there.
    """
    from kvkeep import config
    from kvkeep.errors import ConfigError
    from kvkeep.stores import url

    try:
        told = config.load() if place is None else config.Config(memory=0, disk=0)
        if place is not None and url.is_url(place):
            told = config.Config(memory=0, disk=0, remote=place)
        elif place is not None:
            told = config.Config(dir=Path(place), memory=0)
        tiers: list[tuple[str, Callable[[], Checked]]] = []
        if told.memory:
            tiers.append(("memory", lambda: _memory(told.memory)))
        if told.disk:
            tiers.append(("disk", lambda: _disk(told.dir.expanduser(), told.disk)))
        if told.remote is not None:
            store = url.open_store(told.remote)
            tiers.append(("remote", lambda: _remote(url.shown(str(told.remote)), store)))
    except ConfigError as error:
        fail(str(error))
    found = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(tiers))
        for name, work in tiers:
            progress.update(task, description=f"trying {name}")
            found.append(work())
            progress.advance(task)
    if as_json:
        print(json.dumps({"tiers": [asdict(each) for each in found]}, ensure_ascii=False))
    else:
        _show(found)
    raise typer.Exit(0 if all(each.works for each in found) else 1)


def _memory(nbytes: int) -> Checked:
    from kvkeep.stores.memory import MemoryStore

    found = Checked("memory", format_size(nbytes), reached=True)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > total // 2:
        found.advice.append(f"memory={format_size(nbytes)} is more than half of the machine's {format_size(total)}")
    store = MemoryStore(max(min(nbytes, free // 4, 2 * VALUES * VALUE_NBYTES), 2 * VALUE_NBYTES))
    _try(store, found)
    store.close()
    return found


def _disk(directory: Path, nbytes: int) -> Checked:
    from kvkeep.errors import StoreError
    from kvkeep.stores.disk import DiskStore

    found = Checked("disk", str(directory))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = os.statvfs(directory)
        free = place.f_bavail * place.f_frsize
        used = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
        if nbytes > free + used:
            found.advice.append(
                f"disk={format_size(nbytes)}, but only {format_size(free)} are free beside the {format_size(used)} "
                "that the cache has: writes will be dropped when they are used up"
            )
        if directory.stat().st_mode & 0o077:
            found.advice.append(f"others may look into it: chmod 700 {directory}")
        with tempfile.TemporaryDirectory(prefix="check-", dir=directory) as folder:
            store = DiskStore(folder, capacity=2 * VALUES * VALUE_NBYTES)
            found.reached = True
            _try(store, found)
            store.close()
    except (OSError, StoreError) as error:
        found.advice.append(f"cannot be used: {error}")
    return found


def _remote(where: str, store: Store) -> Checked:
    from kvkeep.errors import StoreError

    found = Checked("remote", where)
    try:
        store.ping()
        found.reached = True
        try:
            _try(store, found)
            _try_values(store, found)
        finally:
            _advise(store, found)
    except StoreError as error:
        found.advice.append(f"{error} (cause: {error.cause})")
        if not found.reached and (hint := _hint(where, error)):
            found.advice.append(hint)
    finally:
        store.close()
    return found


def _hint(where: str, error: StoreError) -> str:
    """What the address should perhaps say, where something else than it names seems to listen."""
    said = str(error)
    if where.startswith("rediss") and error.cause == "timeout":
        return "if it does not speak TLS on this port, say redis:// instead of rediss://"
    if where.startswith("redis:") and ("reset" in said or "closed" in said):
        return "if it speaks TLS on this port, say rediss:// instead of redis://"
    if "Cluster mode is not enabled" in said:
        return "it is one server, not a cluster: say redis:// instead of redis+cluster://"
    if where.startswith("memcached:") and "b'-ERR" in said:
        return "a Redis or Valkey seems to listen there: say redis:// instead of memcached://"
    if error.cause == "garbage":
        return f"something else than {where.partition(':')[0]} seems to listen there: compare the port"
    return ""


def _try(store: Store, found: Checked) -> None:
    """Time lookups, writes and reads of random values under keys that nobody else has."""
    from kvkeep.errors import StoreError
    from kvkeep.keys import BlockKey

    room = VALUES if store.capacity is None else store.capacity // (2 * VALUE_NBYTES)
    keys = [BlockKey(randomness.token_bytes(32)) for _ in range(min(VALUES, max(room, 1)))]
    value = randomness.token_bytes(VALUE_NBYTES)
    try:
        store.contains(keys[0])  # connects
        found.round_trip_ms = 1e3 * statistics.median(_seconds(lambda: store.contains(keys[0])) for _ in range(LOOKUPS))
        writes = [_seconds(lambda key=key: store.put(key, [value])) for key in keys]  # type: ignore[misc]
        reads = [_seconds(lambda key=key: _read(store, key)) for key in keys]  # type: ignore[misc]
        found.write_mb_s = VALUE_NBYTES / 1e6 / statistics.median(writes)
        found.read_mb_s = VALUE_NBYTES / 1e6 / statistics.median(reads)
    finally:
        with suppress(StoreError):
            for key in keys:
                store.delete(key)


def _read(store: Store, key: BlockKey) -> None:
    from kvkeep.errors import StoreError

    with store.read([key]) as (value,):
        if value is None or len(value) != VALUE_NBYTES:
            raise StoreError("what was written is not there", cause="full")


def _try_values(store: Store, found: Checked) -> None:
    """Do once what ``set_value``, ``memoize`` and claims do, under names that nobody else has."""
    from kvkeep.errors import StoreError
    from kvkeep.values.index import Item
    from kvkeep.values.upkeep import index_of

    index = index_of(store, None)
    if index is None:
        return
    name, group, claim = (randomness.token_bytes(32) for _ in range(3))
    try:
        index.set_many([Item(name, b"", BRIEF_SECONDS, group)])
        if index.get_many([name]) == [None] or index.members(group) != [name]:
            raise StoreError("what was set is not there", cause="full")
        index.add(claim, b"", BRIEF_SECONDS)
        index.renew(claim, b"", BRIEF_SECONDS)
        index.release(claim, b"")
        index.delete(name)
        found.values = True
    except StoreError as error:
        found.values = False
        found.advice.append(f"set_value, memoize and claims do not work there: {error} (cause: {error.cause})")


def _advise(store: Store, found: Checked) -> None:
    """What the server says of itself, against what a cache wants."""
    kind = type(store).__module__
    if kind.endswith(".redis"):
        for name, facts in _redis(store):
            found.advice += [f"{name}: {advice}" for advice in redis_advice(facts)]
    elif kind.endswith(".memcached"):
        found.advice += [f"{name}: {error} (cause: {error.cause})" for name, error in store.lost().items()]  # type: ignore[attr-defined]
        for name, facts in store.settings().items():  # type: ignore[attr-defined]
            found.advice += [f"{name}: {advice}" for advice in memcached_advice(facts)]


def _redis(store: Any) -> list[tuple[str, dict[str, Any]]]:
    """INFO, and CONFIG GET where it is allowed, of each master."""
    from redis import RedisError

    client = store.servers.client
    nodes = [("server", client)]
    if hasattr(client, "get_primaries"):
        nodes = [(node.name, client.get_redis_connection(node)) for node in client.get_primaries()]
    found = []
    for name, node in nodes:
        facts: dict[str, Any] = {}
        try:
            facts |= node.info("memory") | node.info("persistence") | node.info("server")
            for setting in ("save", *LIMITS):
                facts |= node.config_get(setting)
        except RedisError:
            pass  # a managed server forbids CONFIG, which tells little; an ACL perhaps INFO
        found.append((name, facts))
    return found


def redis_advice(facts: dict[str, Any]) -> list[str]:
    """Sentences about INFO's and CONFIG's figures."""
    from kvkeep.stores.redis import WHOLE_NBYTES

    advice = []
    if "maxmemory" not in facts:
        advice.append(
            "it does not show its settings to this user (INFO): see to maxmemory and maxmemory-policy yourself"
        )
    memory = facts.get("maxmemory")
    if memory == 0:
        advice.append("maxmemory is not set, so it grows until the system ends it: CONFIG SET maxmemory 4gb")
    elif memory is not None and memory < LITTLE_NBYTES:
        advice.append(f"maxmemory is {format_size(memory)}, too small for blocks of a megabyte: "
                      "CONFIG SET maxmemory 4gb")  # fmt: skip
    policy = facts.get("maxmemory_policy", "")
    if policy == "noeviction":
        advice.append("maxmemory-policy is noeviction, so it refuses writes when it is full: "
                      "CONFIG SET maxmemory-policy allkeys-lru")  # fmt: skip
    elif str(policy).startswith("volatile-"):
        advice.append(f"maxmemory-policy is {policy}, which evicts only what has a time to live: give the address "
                      "?ttl=…, or CONFIG SET maxmemory-policy allkeys-lru")  # fmt: skip
    for setting, usual in LIMITS.items():
        largest = int(facts.get(setting, WHOLE_NBYTES))
        if largest < WHOLE_NBYTES:
            advice.append(f"{setting} is {largest}, but values have up to {WHOLE_NBYTES} bytes, and it ends the "
                          f"connection of who sends a larger one: CONFIG SET {setting} {usual}")  # fmt: skip
    if facts.get("save"):
        advice.append('it saves snapshots to disk (save), which a cache does not need: CONFIG SET save ""')
    if facts.get("aof_enabled"):
        advice.append("it logs every write to disk (appendonly), which a cache does not need: CONFIG SET appendonly no")
    return advice


def memcached_advice(facts: dict[str, str]) -> list[str]:
    """Sentences about the figures of ``stats`` and ``stats settings``."""
    from kvkeep.stores.memcached import PART_NBYTES

    advice = []
    item, memory = int(facts.get("item_size_max", 1 << 20)), int(facts.get("limit_maxbytes", 1 << 30))
    if item < PART_NBYTES + (1 << 10):
        advice.append(f"an item may have {item} bytes, but values come in parts of {PART_NBYTES}: start it with -I 1m")
    if facts.get("evictions") == "off":
        advice.append("it refuses writes when it is full: start it without -M")
    if memory < LITTLE_NBYTES:
        advice.append(f"it has {format_size(memory)} of memory, little for blocks of a megabyte: start it with -m 4096")
    version = tuple(int(part) for part in facts.get("version", "1.6").split(".")[:2] if part.isdigit())
    if version < (1, 6):
        advice.append("it is older than 1.6, whose commands are needed")
    return advice


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _show(found: list[Checked]) -> None:
    table = Table(
        caption="what the disk reads here comes from the page cache"
        if "disk" in {each.tier for each in found}
        else None
    )
    for heading in ("tier", "where", "reached"):
        table.add_column(heading)
    for heading in ("round trip", "write", "read"):
        table.add_column(heading, justify="right")
    for each in found:
        figures = [
            "" if each.round_trip_ms is None else f"{each.round_trip_ms:.3g} ms",
            *("" if rate is None else f"{rate:,.0f} MB/s" for rate in (each.write_mb_s, each.read_mb_s)),
        ]
        table.add_row(each.tier, each.where, "yes" if each.reached else "[red]no[/]", *figures)
    console = Console()
    console.print(table)
    for each in found:
        for advice in each.advice:
            console.print(f"{each.tier}: {advice}", markup=False, highlight=False, soft_wrap=True)
    if not any(each.advice for each in found):
        console.print("Nothing to change.")
