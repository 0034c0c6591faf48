"""kvkeep keeps what a language model has already read. See :func:`open` and :class:`KVCache`.

What is exported is imported when it is first asked for: NumPy alone may take longer than a command line should.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "cache": ("KVCache", "KVSink", "KVSource", "Match"),
    "errors": ("CodecError", "ConfigError", "FrameError", "KVKeepError", "LayoutError", "StoreError"),
    "identity": ("ModelIdentity",),
    "keys": ("BlockKey", "KeyChain", "block_keys"),
    "layout": ("KVLayout", "LayerGroup"),
    "opening": ("open",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
