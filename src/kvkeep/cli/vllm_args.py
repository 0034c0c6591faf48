"""``kvkeep vllm-args``: the flag that makes a stock vLLM server use kvkeep."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kvkeep.cli.directory import fail


def transfer_config(options: dict[str, Any]) -> dict[str, Any]:
    """The value of vLLM's ``--kv-transfer-config`` for the connector's ``options``."""
    return {
        "kv_connector": "KVKeepConnector",
        "kv_connector_module_path": "kvkeep.engines.vllm",
        "kv_role": "kv_both",
        # A block that cannot be loaded is computed; vLLM's default ends the request with an error.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options,
    }


def vllm_args(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="The cache's directory.", show_default="~/.cache/kvkeep")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Size of the memory tier, as 2GiB; 0: none.")] = None,
    disk: Annotated[str | None, typer.Option(help="Size of the disk tier, as 20GiB; 0: none.")] = None,
    remote: Annotated[str | None, typer.Option(help="URL of a shared server, as redis://host:6379/0.")] = None,
    policy: Annotated[str | None, typer.Option(help="What is evicted first, as lru.")] = None,
    codec: Annotated[str | None, typer.Option(help="What blocks are stored in, as raw or lossless.")] = None,
    ttl: Annotated[str | None, typer.Option(help="How long a block may be kept, as 7d.")] = None,
    block_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens a stored block.")] = None,
    aligned: Annotated[bool, typer.Option("--aligned", help="Hits end at vLLM's own block boundaries only.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="NAME=VALUE", help="Any other option of docs/engines/vllm.md; repeat it."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with these options in place of the flags.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON alone, without the flag and quotes.")] = False,
) -> None:
    """Print the flag that makes `vllm serve` use kvkeep, ready to paste.

    vllm serve MODEL $(…) does not work, since a shell does not unquote what a command prints; paste it, or use
    vllm serve MODEL --kv-transfer-config "$(kvkeep vllm-args --json)".
    """
    from kvkeep.engines.vllm.options import parse
    from kvkeep.errors import ConfigError

    given: dict[str, Any] = {
        "dir": None if directory is None else str(directory),
        "memory": memory,
        "disk": disk,
        "remote": remote,
        "policy": policy,
        "codec": codec,
        "ttl": ttl,
        "block_tokens": block_tokens,
        "aligned": aligned or None,
        "config": None if config is None else str(config),
    }
    options = {name: value for name, value in given.items() if value is not None}
    for each in option or []:
        name, equals, text = each.partition("=")
        if not equals:
            fail(f"an option is NAME=VALUE, not {each!r}")
        if name in options:
            fail(f"{name} is given twice")
        options[name] = _value(text)
    # The server has a working directory of its own.
    for name in ("dir", "config", "trace"):
        if isinstance(options.get(name), str):
            options[name] = str(Path(options[name]).expanduser().resolve())
    try:
        parse(options)
    except ConfigError as error:
        fail(str(error))
    keys = options.get("encryption", [])
    for key in [keys] if isinstance(keys, str) else keys:
        if not key.startswith(("env:", "/", "~", "file:/", "file:~")):
            fail('encryption is "env:NAME" or "file:PATH", with a full path')  # not quoted: it may be the key itself
    value = json.dumps(transfer_config(options))
    print(value if as_json else f"--kv-transfer-config {shlex.quote(value)}")


def _value(text: str) -> Any:
    """``true``, ``16``, ``{"disk": "sieve"}`` as JSON means them; all else is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
