"""Capacities as people write them, in blocks of a trace."""

from __future__ import annotations

import re

from kvkeep.errors import ConfigError
from kvkeep.sizes import parse_size
from kvkeep.trace.base import Trace

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FORMS = "write whole blocks (5000), a share of the trace's (2%) or bytes (20GiB)"


def parse_capacity(text: str | int, trace: Trace, *, token_nbytes: float = 0) -> int:
    """Blocks: ``"2%"`` of the trace's unique blocks, ``"5000"`` blocks, or ``"20GiB"`` at ``token_nbytes`` a token.

    Without ``token_nbytes`` the trace's own block size counts, if it has one. Raises :class:`ConfigError`.
    """
    if type(text) is int:
        if text < 0:
            raise ConfigError(f"a capacity of {text} blocks: capacities are not negative")
        return text
    if not isinstance(text, str):
        raise ConfigError(f"{text!r} is no capacity: {_FORMS}")
    text = text.strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ConfigError(f"{text!r} is no share: write 0% to 100% of the trace's unique blocks")
        return max(1, int(share * trace.unique_blocks)) if share else 0
    if text.isdecimal():
        return int(text)
    if _NUMBER.fullmatch(text):
        raise ConfigError(f"{text!r} is no capacity: {_FORMS}")
    nbytes = parse_size(text)
    block_nbytes = token_nbytes * trace.block_tokens or trace.block_nbytes
    if not block_nbytes:
        raise ConfigError(f"{text}: bytes need a model, or bytes a token, to become blocks (--model)")
    return int(nbytes / block_nbytes)
