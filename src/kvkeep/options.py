"""What the options of :func:`kvkeep.open` may be, given by a caller or in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from kvkeep import admission, registry
from kvkeep.errors import ConfigError, nearest
from kvkeep.sizes import format_size, parse_age, parse_size
from kvkeep.stores import url
from kvkeep.stores.disk import MIN_CAPACITY

OWNED = ("memory", "disk")
TIERS = (*OWNED, "remote")

T = TypeVar("T")
PerTier: TypeAlias = T | Mapping[str, T]
"""One value for all tiers, or a mapping from a tier's name (:data:`TIERS`) to its value."""


def checked(key: str, value: Any) -> Any:
    """``value`` in the form that :class:`~kvkeep.config.Config` holds. Raises :class:`ConfigError`.

    Of what a mapping says for each tier, None stands for the default."""
    match key:
        case "memory" | "disk":
            if not isinstance(value, (int, str)) or isinstance(value, bool):
                raise ConfigError(f'{key} is a size such as 1048576 or "2GiB", not {value!r}')
            nbytes = parse_size(value)
            if key == "disk" and 0 < nbytes < MIN_CAPACITY:
                raise ConfigError(
                    f"disk: {nbytes} bytes are too few; at least {format_size(MIN_CAPACITY)}, or 0 for none"
                )
            return nbytes
        case "quota":
            _check_tiers(key, value, OWNED)
            for one in _each(value):
                if not isinstance(one, (int, str)) or isinstance(one, bool):
                    raise ConfigError(f'quota is a size such as 1048576 or "2GiB", not {one!r}')
                parse_size(one)
            return value
        case "block_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"block_tokens is a number of tokens, not {value!r}")
            return value
        case "max_kl":
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
                raise ConfigError(f"max_kl is a number of nats a token, not {value!r}")
            return value
        case "force" | "prefault":
            if not isinstance(value, bool):
                raise ConfigError(f"{key} is true or false, not {value!r}")
            return value
        case "policy" | "codec" | "ttl" | "write_rule" | "admission":
            _check_tiers(key, value, OWNED if key == "policy" else TIERS)
            for one in _each(value):
                if key == "ttl" and isinstance(one, (int, float)) and not isinstance(one, bool):
                    continue
                if not isinstance(one, str):
                    kind = 'a number of seconds, or an age such as "7d"' if key == "ttl" else "a text"
                    raise ConfigError(f"{key} is {kind}, not {one!r}")
                if key == "ttl":
                    parse_age(one)
                elif key in ("write_rule", "admission"):
                    admission.write_rule(one)
                else:
                    registry.lookup({"policy": "policies", "codec": "codecs"}[key], one)
            return value
        case "encryption":
            if not isinstance(value, str) and not (
                isinstance(value, list) and value and all(isinstance(one, str) for one in value)
            ):
                raise ConfigError('encryption is "env:NAME" or "file:PATH", or a list of these')
            return value
        case "path" | "dir" | "trace":
            if not isinstance(value, (str, os.PathLike)):
                raise ConfigError(f"{key} is a path, not {value!r}")
            return Path(value)
        case "remote":
            if not isinstance(value, str):
                raise ConfigError("remote is a text, the address of a server")
            url.check(value)
            return value
        case _:
            if not isinstance(value, str):
                raise ConfigError(f"{key} is a text, not {value!r}")
            return value


def _each(value: Any) -> list[Any]:
    """What it says for the tiers."""
    return [one for one in value.values() if one is not None] if isinstance(value, Mapping) else [value]


def _check_tiers(option: str, value: Any, tiers: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if ``value`` is a mapping that names a tier which is none of ``tiers``."""
    if isinstance(value, Mapping):
        for name in value:
            if name not in TIERS:
                raise ConfigError(f"{option}: there is no tier {name!r}; {nearest(str(name), list(TIERS))}")
            if name not in tiers:
                raise ConfigError(f"{option}: a server bounds itself, so there is none for {name!r}")
