"""Mooncake's traces (github.com/kvcache-ai/Mooncake, FAST'25): one request a line.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [int, …]}``; equal ids are equal
prefixes. A last, partial block has an id in some files and none in others: only full blocks count. Blocks have 512
tokens unless a line says ``block_size`` or the caller knows better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.keys import BlockKey
from kvkeep.trace.base import Request, Trace

DEFAULT_BLOCK_TOKENS = 512
MOST = 1 << 53
"""Tokens or milliseconds: beyond, floats skip numbers."""


def matches(line: dict[str, Any]) -> bool:
    """Does ``line`` look like one of these?"""
    return "hash_ids" in line


def parse(name: str, lines: Iterable[tuple[int, Any]], *, block_tokens: int = 0) -> Trace:
    """``lines``: numbers and decoded JSON. Raises :class:`ConfigError` that begins with ``line N``."""
    keys: dict[int | str, BlockKey] = {}
    requests: list[Request] = []
    found = 0
    number = 0
    for number, line in lines:
        try:
            ids, tokens, milliseconds = line["hash_ids"], line["input_length"], line["timestamp"]
            output = line.get("output_length", 0)
            own = line.get("block_size", found or block_tokens or DEFAULT_BLOCK_TOKENS)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number}: a Mooncake request has no {error}") from error
        counts = all(type(count) is int and 0 <= count <= MOST for count in (tokens, output, own))
        timed = type(milliseconds) in (int, float) and 0 <= milliseconds <= MOST
        if not counts or not timed or not isinstance(ids, list):
            raise ConfigError(
                f"line {number}: timestamp, input_length, output_length are numbers of 0 or more, hash_ids a list"
            )
        found = found or own
        if own != found or own < 1:
            raise ConfigError(
                f"line {number}: blocks of {own} tokens, {tokens} of input; before it was {found} a block"
            )
        full = tokens // own
        if not full <= len(ids) <= full + 1:
            raise ConfigError(
                f"line {number}: {tokens} tokens in {len(ids)} blocks of {own} do not fit; is the block size another? "
                "(--block-tokens)"
            )
        chain = []
        for number_of_block in ids[:full]:
            key = keys.get(number_of_block)
            if key is None:
                if not isinstance(number_of_block, (int, str)):
                    raise ConfigError(f"line {number}: {number_of_block!r} is no hash id")
                # Uniform bytes, as kvkeep's own keys are: policies sample by them.
                key = keys[number_of_block] = BlockKey(hashlib.sha256(str(number_of_block).encode()).digest())
            chain.append(key)
        if len(set(chain)) < len(chain):
            raise ConfigError(f"line {number}: a block stands twice in one prompt: hash_ids are not those of prefixes")
        requests.append(Request(milliseconds / 1000, tuple(chain), tokens, output))
    return Trace(name, found or block_tokens or DEFAULT_BLOCK_TOKENS, requests)
