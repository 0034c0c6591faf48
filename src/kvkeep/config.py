"""A cache from a TOML file. ``KVKEEP_CONFIG`` names the file for the command line and :func:`load`.

::

    dir = "~/.cache/kvkeep"
    memory = "2GiB"
    disk = "20GiB"
    remote = "redis://host:6379/0"
    policy = "hazard"
    codec = "lossless"     # default: raw in memory, lossless below
    ttl = "30d"
    quota = "2GiB"         # of one namespace
    write_rule = "all"     # or "seen-twice", "predicted"
    admission = "all"
    trace = "requests.jsonl"
    encryption = "env:KVKEEP_KEY"  # or "file:/etc/kvkeep.key"; a list: the first encrypts, all decrypt
    max_kl = 0.01          # a codec that is measured to cost a model more is refused; see kvkeep quality
    force = false          # true: not even then
    block_tokens = 0       # 0: the layout's default

    [policy]               # or, in place of one value: one for each tier
    memory = "lru"
    disk = "sieve"

The keys and their values are those of :func:`kvkeep.open`; all may be left out. A key that does not exist is a
:class:`~kvkeep.errors.ConfigError` that names the nearest. A namespace is a secret and has no key here: give it to
:meth:`Config.open`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvkeep import admission, registry
from kvkeep.cache import KVCache
from kvkeep.errors import ConfigError, nearest
from kvkeep.opening import DEFAULT_POLICY, PerTier, check_per_tier
from kvkeep.opening import open as open_cache
from kvkeep.quality import MAX_KL
from kvkeep.sizes import parse_age, parse_size

VARIABLE = "KVKEEP_CONFIG"


@dataclass(frozen=True, slots=True)
class Config:
    """What :func:`kvkeep.open` takes, checked. ``memory`` and ``disk`` are bytes; 0 leaves the tier out."""

    dir: Path = Path("~/.cache/kvkeep")
    memory: int = 1 << 30
    disk: int = 10 << 30
    remote: str | None = field(default=None, repr=False)  # a URL may hold a password
    policy: PerTier[str] = DEFAULT_POLICY
    codec: PerTier[str] | None = None
    ttl: PerTier[float | str | None] = None
    quota: PerTier[int | str | None] = None
    write_rule: PerTier[str] = "all"
    admission: PerTier[str] = "all"
    trace: Path | None = None
    encryption: str | list[str] | None = field(default=None, repr=False)  # somebody may put the key itself here
    max_kl: float = MAX_KL
    force: bool = False
    block_tokens: int = 0

    def open(self, *, namespace: bytes = b"") -> KVCache:
        """The cache that this describes."""
        options = {each.name: getattr(self, each.name) for each in fields(self)}
        return open_cache(options.pop("dir"), namespace=namespace, **options)


def from_dict(values: dict[str, Any]) -> Config:
    """Checked. Raises :class:`ConfigError` on an unknown key, a wrong type or an unknown name."""
    known = [field.name for field in fields(Config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"there is no option {key!r}; {nearest(key, known)}")
    return Config(**{key: _checked(key, value) for key, value in values.items()})


def _checked(key: str, value: Any) -> Any:
    """``value`` in the form that :class:`Config` holds."""
    match key:
        case "memory" | "disk":
            if not isinstance(value, (int, str)) or isinstance(value, bool):
                raise ConfigError(f'{key} is a size such as 1048576 or "2GiB", not {value!r}')
            return parse_size(value)
        case "quota":
            check_per_tier(key, value)
            for one in value.values() if isinstance(value, Mapping) else [value]:
                _checked("disk", one)
            return value
        case "block_tokens":
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"block_tokens is a number of tokens, not {value!r}")
            return value
        case "max_kl":
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
                raise ConfigError(f"max_kl is a number of nats a token, not {value!r}")
            return value
        case "force":
            if not isinstance(value, bool):
                raise ConfigError(f"force is true or false, not {value!r}")
            return value
        case "policy" | "codec" | "ttl" | "write_rule" | "admission":
            check_per_tier(key, value)
            for one in value.values() if isinstance(value, Mapping) else [value]:
                if key == "ttl" and isinstance(one, (int, float)) and not isinstance(one, bool):
                    continue
                if not isinstance(one, str):
                    raise ConfigError(f"{key} is a text, not {one!r}")
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
        case _:
            if not isinstance(value, str):
                raise ConfigError(f"{key} is a text, not {'that' if key == 'remote' else repr(value)}")
            return Path(value) if key in ("dir", "trace") else value


def from_file(path: str | os.PathLike[str]) -> Config:
    """Read a TOML file. Raises :class:`ConfigError` that names the file."""
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            return from_dict(tomllib.load(stream))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{file}: {error}") from error


def load() -> Config:
    """The file that ``KVKEEP_CONFIG`` names, or the defaults where it is not set."""
    path = os.environ.get(VARIABLE, "")
    return from_file(path) if path else Config()
