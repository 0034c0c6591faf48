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
    prefault = false       # true: take all of memory at once; inside vLLM that is the default

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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvkeep.cache import KVCache
from kvkeep.errors import ConfigError, nearest
from kvkeep.opening import DEFAULT_POLICY
from kvkeep.opening import open as open_cache
from kvkeep.options import PerTier, checked
from kvkeep.quality import MAX_KL

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
    prefault: bool | None = None
    """``None``: no, unless the engine says otherwise."""

    def open(self, *, namespace: bytes = b"") -> KVCache:
        """The cache that this describes."""
        options = {each.name: getattr(self, each.name) for each in fields(self)}
        options["prefault"] = bool(self.prefault)
        return open_cache(options.pop("dir"), namespace=namespace, **options)


def from_dict(values: dict[str, Any]) -> Config:
    """Checked. Raises :class:`ConfigError` on an unknown key, a wrong type or an unknown name."""
    known = [field.name for field in fields(Config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"there is no option {key!r}; {nearest(key, known)}")
    return Config(**{key: checked(key, value) for key, value in values.items()})


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
