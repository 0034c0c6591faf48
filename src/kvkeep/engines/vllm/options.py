"""``kv_connector_extra_config``: the cache's own options, and what is the connector's alone.

Either ``{"config": "kvkeep.toml"}`` or the same keys inline (:mod:`kvkeep.config`: ``dir``, ``memory``, ``disk``,
``remote``, ``policy``, ``codec``, ``ttl``, ``block_tokens``, …); without any, what ``KVKEEP_CONFIG`` names or the
defaults. Two of these defaults are others here: ``codec`` is raw for the disk, since a hit's time counts more than its
bytes, and ``prefault`` is true, since a server takes its memory when it starts. Beside them:

``aligned`` (false): hits end at vLLM's block boundaries only, as those of its own prefix cache do.
``async_load`` ("auto"): load while other requests are computed. ``true``, ``false``, or "auto": what lies on a remote
store is loaded so; disk and memory are faster than a round of the scheduler.
``share`` (true): a request waits while another one computes the same prefix, then takes it from there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from kvkeep import config as cache_config
from kvkeep.config import Config
from kvkeep.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Options:
    """What the user wants, checked."""

    cache: Config
    aligned: bool = False
    async_load: bool | None = None
    """``None``: where the blocks lie decides."""
    share: bool = True


def parse(extra: dict[str, Any]) -> Options:
    """Raises :class:`ConfigError` on an unknown or wrong option, naming the right one."""
    rest = dict(extra)
    own: dict[str, Any] = {}
    for name in ("aligned", "share"):
        if name in rest:
            own[name] = _boolean(name, rest.pop(name))
    if "async_load" in rest:
        value = rest.pop("async_load")
        own["async_load"] = None if value == "auto" else _boolean("async_load", value, 'true, false or "auto"')
    if "config" in rest:
        path = rest.pop("config")
        if not isinstance(path, str):
            raise ConfigError(f"config is the path of a TOML file, not {path!r}")
        if rest:
            raise ConfigError(f"give {', '.join(sorted(rest))} in the file that config names, or leave config out")
        return Options(_usable(cache_config.from_file(path)), **own)
    known = [each.name for each in fields(Config)] + ["config", "aligned", "async_load", "share"]
    for name in rest:
        if name not in known:
            raise ConfigError(f"kv_connector_extra_config: no option {name!r}; {nearest(name, known)}")
    return Options(_usable(cache_config.from_dict(rest) if rest else cache_config.load()), **own)


def _usable(cache: Config) -> Config:
    """With the defaults that are others here. Raises :class:`ConfigError` if nothing could be kept."""
    if not cache.memory and not cache.disk and cache.remote is None:
        raise ConfigError("a cache without any tier keeps nothing: give memory, disk or remote")
    return replace(
        cache,
        codec={"disk": "raw"} if cache.codec is None else cache.codec,
        prefault=cache.prefault is not False,
    )


def _boolean(name: str, value: Any, kinds: str = "true or false") -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {kinds}, not {value!r}")
    return value
