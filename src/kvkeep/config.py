"""A cache from a TOML file. ``KVKEEP_CONFIG`` names the file for the command line and :func:`load`.

::

    dir = "~/.cache/kvkeep"
    memory = "2GiB"
    disk = "20GiB"
    policy = "lru"
    codec = "raw"          # of the disk
    block_tokens = 0       # 0: the layout's default

All keys may be left out. A key that does not exist is a :class:`~kvkeep.errors.ConfigError` that names the nearest.
A namespace is a secret and has no key here: give it to :meth:`Config.open`.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvkeep import registry
from kvkeep.cache import KVCache
from kvkeep.cache import open as open_cache
from kvkeep.errors import ConfigError
from kvkeep.sizes import parse_size

VARIABLE = "KVKEEP_CONFIG"


@dataclass(frozen=True, slots=True)
class Config:
    """What :func:`kvkeep.open` takes, checked. ``memory`` and ``disk`` are bytes; 0 leaves the tier out."""

    dir: Path = Path("~/.cache/kvkeep")
    memory: int = 1 << 30
    disk: int = 10 << 30
    policy: str = "lru"
    codec: str = "raw"
    block_tokens: int = 0

    def open(self, *, namespace: bytes = b"") -> KVCache:
        """The cache that this describes."""
        return open_cache(
            self.dir,
            memory=self.memory,
            disk=self.disk,
            policy=self.policy,
            codec=self.codec,
            namespace=namespace,
            block_tokens=self.block_tokens,
        )


def from_dict(values: dict[str, Any]) -> Config:
    """Checked. Raises :class:`ConfigError` on an unknown key, a wrong type or an unknown name."""
    known = [field.name for field in fields(Config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"there is no option {key!r}; {registry.nearest(key, known)}")
    checked: dict[str, Any] = {}
    for key, value in values.items():
        match key:
            case "memory" | "disk":
                if not isinstance(value, (int, str)) or isinstance(value, bool):
                    raise ConfigError(f'{key} is a size such as 1048576 or "2GiB", not {value!r}')
                checked[key] = parse_size(value)
            case "block_tokens":
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise ConfigError(f"block_tokens is a number of tokens, not {value!r}")
                checked[key] = value
            case _:
                if not isinstance(value, str):
                    raise ConfigError(f"{key} is a text, not {value!r}")
                checked[key] = Path(value) if key == "dir" else value
    for key, kind in (("policy", "policies"), ("codec", "codecs")):
        if key in checked:
            registry.lookup(kind, checked[key])
    return Config(**checked)


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
