"""Sizes and ages as people write them: ``"2GiB"``, ``"500 MB"``, ``"7d"``."""

from __future__ import annotations

import re

from kvkeep.errors import ConfigError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: int | str) -> int:
    """Bytes. ``KiB`` … ``TiB`` (or ``K`` … ``T``) count in 1024, ``KB`` … ``TB`` in 1000."""
    if isinstance(size, int):
        if size < 0:
            raise ConfigError(f"a size of {size} bytes: sizes are not negative")
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{size!r} is no size: write a number and one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(nbytes: int) -> str:
    """For people: three digits and a binary unit."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")


def parse_age(age: str) -> float:
    """Seconds of ``"90s"``, ``"30m"``, ``"12h"``, ``"7d"`` or ``"2w"``."""
    match = _AGE.fullmatch(age.lower())
    if match is None:
        raise ConfigError(f"{age!r} is no age: write a number and one of s, m, h, d, w")
    return float(match[1]) * _SECONDS[match[2]]
