"""Secrets from where they are kept: an environment variable or a file. No message quotes one."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from kvkeep.errors import ConfigError

log = logging.getLogger("kvkeep")

PREFIXES = ("env:", "file:")


def read(source: str | os.PathLike[str], option: str) -> tuple[bytes, str]:
    """What ``env:NAME``, ``file:PATH`` or a path holds, and what to call that place in a message.

    Raises :class:`ConfigError`. ``source`` may be the secret itself, in the wrong place: no message quotes it, but for
    a variable's name and a marked path.
    """
    if isinstance(source, str) and source.startswith("env:"):
        value = os.environ.get(source[4:])
        if value is None:
            raise ConfigError(f"{option}: the environment variable {source[4:]!r} is not set")
        return os.fsencode(value), f"environment variable {source[4:]!r}"
    marked = not isinstance(source, str) or source.startswith("file:")
    name = f"file {os.fspath(source).removeprefix('file:')}" if marked else "the file"
    try:
        path = Path(os.fspath(source).removeprefix("file:")).expanduser()
        # A pipe that nobody writes to is empty, and not waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
            os.set_blocking(stream.fileno(), True)
            if stat.S_IMODE(os.fstat(stream.fileno()).st_mode) & 0o077:
                log.warning("%s: %s can be read by others; chmod 600 it", option, name)
            return stream.read(4096), name
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else "no path"
        raise ConfigError(f'{option}: {name} cannot be read ({reason}); give "env:NAME" or "file:PATH"') from None
