"""Names of blocks: a SHA-256 chain over tokens, rooted in the layout.

A block's key depends on every token before it, so the longest cached prefix ends before the first missing key of a
list. Nothing is seeded by the process: two machines give equal keys (``tests/golden`` holds that).

The chain: ``root = HMAC(layout fingerprint, shard)``; ``key[i] = SHA-256(key[i-1] ‖ tokens as u32 LE ‖ extras)``.
The number of tokens a block is fixed by the layout, and each extra is length-prefixed, so no two inputs hash alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NewType

import numpy as np
import numpy.typing as npt

from kvkeep.errors import LayoutError
from kvkeep.identity import derive
from kvkeep.layout import KVLayout

BlockKey = NewType("BlockKey", bytes)
"""32 bytes."""

KEY_NBYTES = 32

Tokens = Sequence[int] | npt.NDArray[Any]
Extra = tuple[int, bytes]
"""(position, digest) of what stands at a token's position but is no token: an image, audio, a prompt embedding."""


def root_key(layout: KVLayout, shard: int = 0) -> BlockKey:
    """The parent of every first block of ``layout`` and ``shard``."""
    if not 0 <= shard < layout.num_shards:
        raise LayoutError(f"shard {shard} of a layout with {layout.num_shards}")
    return BlockKey(derive(layout.fingerprint, b"kvkeep root 1", (shard.to_bytes(4, "little"),)))


def token_bytes(tokens: Tokens) -> bytes:
    """Tokens as little-endian u32. Raises :class:`LayoutError` on what is no token id."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise LayoutError(f"tokens are a flat sequence of integers, not {array.dtype} of shape {array.shape}")
    if array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
        raise LayoutError("a token id lies outside 0 … 2^32 - 1")
    return array.astype("<u4").tobytes()


def block_keys(layout: KVLayout, tokens: Tokens, *, extra: Iterable[Extra] = (), shard: int = 0) -> list[BlockKey]:
    """Keys of the full blocks of ``tokens``; a last, partial block has none."""
    return KeyChain(layout, shard=shard).extend(tokens, extra=extra)


class KeyChain:
    """Keys of a sequence that grows: what was hashed is not hashed again.

    ``keys`` holds the keys of all full blocks so far, ``num_tokens`` counts all tokens seen. Not thread-safe.
    """

    def __init__(self, layout: KVLayout, *, shard: int = 0) -> None:
        self._block_tokens = layout.block_tokens
        self._tip: bytes = root_key(layout, shard)
        self._rest = b""  # tokens of the last, partial block
        self._rest_extra: list[Extra] = []
        self.keys: list[BlockKey] = []
        self.num_tokens = 0

    def extend(self, tokens: Tokens, *, extra: Iterable[Extra] = ()) -> list[BlockKey]:
        """Append ``tokens``; returns the keys of the blocks that became full. Positions of ``extra`` are absolute."""
        data = self._rest + token_bytes(tokens)
        width = 4 * self._block_tokens
        start = len(self.keys) * self._block_tokens
        full = len(data) // width
        num_tokens = self.num_tokens + (len(data) - len(self._rest)) // 4
        extras = self._sorted_extras(extra, start, num_tokens)
        self.num_tokens = num_tokens  # only now: what is refused changes nothing
        tip, sha256 = self._tip, hashlib.sha256
        new: list[BlockKey] = []
        if extras:
            end = start + full * self._block_tokens
            by_block: dict[int, list[bytes]] = {}
            for position, digest in extras:
                if position < end:
                    suffix = position.to_bytes(8, "little") + len(digest).to_bytes(4, "little") + digest
                    by_block.setdefault((position - start) // self._block_tokens, []).append(suffix)
            for block in range(full):
                message = tip + data[block * width : (block + 1) * width] + b"".join(by_block.get(block, ()))
                tip = sha256(message).digest()
                new.append(BlockKey(tip))
            self._rest_extra = [item for item in extras if item[0] >= end]
        else:
            append = new.append
            for offset in range(0, full * width, width):
                tip = sha256(tip + data[offset : offset + width]).digest()
                append(tip)  # type: ignore[arg-type]  # NewType's call costs 40 ns, a tenth of a block
        self._tip = tip
        self._rest = data[full * width :]
        self.keys += new
        return new

    def _sorted_extras(self, extra: Iterable[Extra], start: int, end: int) -> list[Extra]:
        extras = sorted([*self._rest_extra, *extra])
        if extras and (extras[0][0] < start or extras[-1][0] >= end):
            raise LayoutError(f"an extra's position lies outside tokens {start} … {end - 1}")
        return extras
