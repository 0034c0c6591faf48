"""``redis://host:6379/0`` and its like: one address, one store.

A scheme names a class with ``from_url``; its module is imported when it is asked for. Other packages add schemes by
entry points in the group ``kvkeep.stores``, under the scheme's name. An address may hold a password, so no message
here or in a store repeats one: :func:`shown` is what may be shown.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from kvkeep import secret
from kvkeep.errors import ConfigError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from kvkeep.stores.base import Store

_REDIS = "kvkeep.stores.redis:RedisStore"

SCHEMES: dict[str, str] = {
    **{
        f"{server}{kind}": _REDIS
        for server in ("redis", "rediss", "valkey", "valkeys")
        for kind in ("", "+sentinel", "+cluster")
    },
    "unix": _REDIS,
    "redis+unix": _REDIS,
    "valkey+unix": _REDIS,
    "memcached": "kvkeep.stores.memcached:MemcachedStore",
    "s3": "kvkeep.stores.s3:S3Store",
}

LARGEST_NUMBER = 1e9
"""Of seconds, some 30 years: the system counts no further. Of bytes a second, more than a network has."""


def open_store(url: str, *, ttl: float | None = None) -> Store:
    """The store at ``url``, or at the address that ``env:NAME`` or ``file:PATH`` holds.

    ``ttl``: seconds that a value lives there, where the address does not say.
    Raises :class:`ConfigError`; a server that cannot be reached is no error here.
    """
    url = _address(url)
    store: Store = _class(scheme_of(url)).from_url(url, ttl=ttl)
    return store


def check(url: str) -> None:
    """Raise :class:`ConfigError` where no store has such an address; one in a variable or file is not read for that."""
    if not url.startswith(secret.PREFIXES):
        _target(scheme_of(url))


def is_url(text: object) -> bool:
    """Is it an address rather than a path? Also one that lacks its slashes, as in ``redis:host``."""
    if not isinstance(text, str):
        return False
    scheme, colon, _ = text.partition(":")
    return "://" in text or text.startswith(secret.PREFIXES) or bool(colon and scheme in SCHEMES)


def scheme_of(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigError("an address of a store looks like redis://host:6379/0; this one has no ://")
    return scheme.lower()


def shown(url: str) -> str:
    """``url`` without user, password and options."""
    url = _address(url)
    # First the @, then the ?, since a password that was not encoded may hold one.
    place = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
    return f"{scheme_of(url)}://{place}"


def number(name: str, text: str | float) -> float:
    """Seconds or bytes a second, above 0. Raises :class:`ConfigError`."""
    try:
        found = float(text)
    except ValueError:
        raise ConfigError(f"{name} in an address is a number, of seconds or of bytes a second") from None
    if not 0 < found <= LARGEST_NUMBER:
        raise ConfigError(f"{name} is above 0 and at most {LARGEST_NUMBER:g}")
    return found


def pairs(query: str, server: str, known: tuple[str, ...]) -> dict[str, str]:
    """What stands behind the ``?``. Raises :class:`ConfigError` on what is not ``known``."""
    found = dict(parse_qsl(query, keep_blank_values=True))
    for name in found:
        if name not in known and "@" in query:
            raise ConfigError("a user or password in an address is percent-encoded: ? is %3F, / is %2F, @ is %40")
        if name not in known:
            raise ConfigError(f"an address of {server} has no option {name!r}; {nearest(name, known)}")
    return found


def options(query: str, server: str, *, texts: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Any]:
    """What an address says after its ``?``: ``numbers`` are seconds or bytes a second, above 0."""
    found = pairs(query, server, texts + numbers)
    return {name: number(name, text) if name in numbers else text for name, text in found.items()}


def _address(url: str) -> str:
    if not url.startswith(secret.PREFIXES):
        return url
    data, place = secret.read(url, "an address")
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{place} holds no address") from None


def _class(scheme: str) -> Any:
    target = _target(scheme)
    if not isinstance(target, str):
        return target.load()
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _target(scheme: str) -> str | EntryPoint:
    """Where the class is. Raises :class:`ConfigError` if nobody has such addresses."""
    if scheme in SCHEMES:
        return SCHEMES[scheme]
    from importlib.metadata import entry_points

    for point in entry_points(group="kvkeep.stores"):
        if point.name == scheme:
            return point
    named = f"{scheme}://" if re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "that"  # it may be a misplaced password
    raise ConfigError(f"no store has addresses that begin with {named}; {nearest(scheme, SCHEMES)}")
