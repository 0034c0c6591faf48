"""kvkeep keeps what a language model has already read. See :func:`open` and :class:`KVCache`."""

from kvkeep.cache import KVCache, KVSink, KVSource, Match
from kvkeep.errors import (
    CodecError,
    ConfigError,
    FrameError,
    KVKeepError,
    LayoutError,
    StoreError,
)
from kvkeep.identity import ModelIdentity
from kvkeep.keys import BlockKey, KeyChain, block_keys
from kvkeep.layout import KVLayout, LayerGroup
from kvkeep.opening import open

__version__ = "0.1.0"

__all__ = [
    "BlockKey", "CodecError", "ConfigError", "FrameError", "KVCache", "KVKeepError", "KVLayout", "KVSink", "KVSource",
    "KeyChain", "LayerGroup", "LayoutError", "Match", "ModelIdentity", "StoreError", "block_keys", "open",
]  # fmt: skip
