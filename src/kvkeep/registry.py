"""Names to classes, imported only when the name is asked for.

Third parties add to these by entry points in the groups ``kvkeep.codecs``, ``kvkeep.policies`` and ``kvkeep.stores``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvkeep.errors import ConfigError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

BUILTIN: dict[str, dict[str, str]] = {
    "codecs": {
        "raw": "kvkeep.codecs.raw:Raw",
        "lossless": "kvkeep.codecs.lossless:Lossless",
        "int8": "kvkeep.codecs.int8:Int8",
        "uqz-hq": "kvkeep.codecs.uqz:UQZHQ",
        "uqz": "kvkeep.codecs.uqz:UQZ",
        "uqz-max": "kvkeep.codecs.uqz:UQZMax",
        "int4": "kvkeep.codecs.int4:Int4",
    },
    "policies": {
        "lru": "kvkeep.policies.lru:LRU",
        "fifo": "kvkeep.policies.fifo:FIFO",
        "lfu": "kvkeep.policies.lfu:LFU",
        "lfuda": "kvkeep.policies.lfuda:LFUDA",
        "clock": "kvkeep.policies.clock:CLOCK",
        "sieve": "kvkeep.policies.sieve:SIEVE",
        "s3fifo": "kvkeep.policies.s3fifo:S3FIFO",
        "2q": "kvkeep.policies.twoq:TwoQ",
        "arc": "kvkeep.policies.arc:ARC",
        "wtinylfu": "kvkeep.policies.wtinylfu:WTinyLFU",
        "lirs": "kvkeep.policies.lirs:LIRS",
        "gdsf": "kvkeep.policies.gdsf:GDSF",
        "lecar": "kvkeep.policies.lecar:LeCaR",
        "hazard": "kvkeep.policies.hazard:Hazard",
        "unlimited": "kvkeep.policies.unlimited:Unlimited",
    },
    "stores": {
        "memory": "kvkeep.stores.memory:MemoryStore",
        "disk": "kvkeep.stores.disk:DiskStore",
        "redis": "kvkeep.stores.redis:RedisStore",
    },
}

LEAF = "leaf-"
"""Before a policy's name: the same, but leaves go first."""

_SINGULAR = {"codecs": "codec", "policies": "policy", "stores": "store"}


def entry_points(*, group: str) -> EntryPoints:
    """What is installed in ``group``. Imported here: it costs a quarter of ``import kvkeep``, and few ask."""
    from importlib import metadata

    return metadata.entry_points(group=group)


def names(kind: str) -> list[str]:
    """Every name of ``kind`` (a key of :data:`BUILTIN`), entry points included."""
    return sorted({*BUILTIN[kind], *(point.name for point in entry_points(group=f"kvkeep.{kind}"))})


def lookup(kind: str, name: str) -> Any:
    """The class called ``name``. Raises :class:`ConfigError` with the nearest name if there is none.

    A plugin that fails to import raises its own error: it is never skipped. ``leaf-NAME`` is any policy, wrapped.
    """
    if kind == "policies" and name.startswith(LEAF):
        return import_module("kvkeep.policies.leaf").leaf_first(lookup(kind, name.removeprefix(LEAF)))
    target = BUILTIN[kind].get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=f"kvkeep.{kind}"):
        if point.name == name:
            return point.load()
    raise ConfigError(f"no {_SINGULAR[kind]} is called {name!r}; {nearest(name, names(kind))}")
