"""vLLM: a KV connector that keeps what a server has read on disk (or on a remote store) and reuses it after a restart.

Stock vLLM loads it from here::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.engines.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"dir": "~/.cache/kvkeep", "disk": "20GiB"}}'

The options are those of :mod:`kvkeep.engines.vllm.options`. Who does what: ``connector`` is what vLLM sees; it hands
over to ``scheduler`` (which prefix is stored, what to load, what to save) in the scheduler's process and to ``worker``
(loads and saves) in each rank's. They talk in the dataclasses of ``plan``. ``pages`` knows where a token lies in the
engine's memory, ``naming`` what a prompt's blocks are called, ``stats`` what happened, ``logs`` how it is said.

Importing this module does not import vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeep.engines.vllm.connector import KVKeepConnector

__all__ = ["KVKeepConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVKeepConnector":
        from kvkeep.engines.vllm.connector import KVKeepConnector

        return KVKeepConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
