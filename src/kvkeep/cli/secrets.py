"""Keys and namespaces for the commands: where they lie, never what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from kvkeep.cli.directory import fail

if TYPE_CHECKING:
    from kvkeep.crypt import Cipher
    from kvkeep.frame import Header

Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--encryption",
        metavar="SOURCE",
        help="Where the encryption key lies: env:NAME or file:PATH. Repeat it for old keys, the newest first. "
        "Default: as in the file KVKEEP_CONFIG names.",
    ),
]

Namespaces = Annotated[
    list[str] | None,
    typer.Option("--namespace", metavar="SOURCE", help="Where a tenant's secret lies: env:NAME or file:PATH."),
]


@dataclass(frozen=True, slots=True)
class Secrets:
    """``namespaces``: tenant's mark → secret; without a mark there is none."""

    cipher: Cipher | None = None
    namespaces: dict[bytes, bytes] = field(default_factory=lambda: {b"": b""}, repr=False)

    def opens(self, header: Header) -> bool:
        """Are the key and the namespace of this encrypted frame among these?"""
        return self.cipher is not None and header.key_id in self.cipher.key_ids and header.tenant in self.namespaces


def read(keys: list[str] | None, namespaces: list[str] | None) -> Secrets:
    """What the options name; ends the command with a message if that is not there."""
    from kvkeep import config, crypt
    from kvkeep.errors import ConfigError
    from kvkeep.identity import tenant_of

    try:
        cipher = crypt.open_cipher(keys or config.load().encryption)
        known = {b"": b""}
        for source in namespaces or []:
            secret = namespace(source)
            known[tenant_of(secret)] = secret
    except ConfigError as error:
        fail(str(error))
    return Secrets(cipher, known)


def namespace(source: str) -> bytes:
    """A namespace as it stands in a variable, or in a file but for the end of its last line."""
    from kvkeep import secret as secrets
    from kvkeep.errors import ConfigError

    data, place = secrets.read(source, "--namespace")
    secret = data.rstrip(b"\r\n")
    if not secret:
        raise ConfigError(f"--namespace: {place} is empty")
    return secret
