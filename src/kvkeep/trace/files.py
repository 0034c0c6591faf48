"""Files to traces: gzip or not, and of which kind, is seen from the content, never from the name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from operator import attrgetter
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.trace import mooncake
from kvkeep.trace.base import Trace

_GZIP_MAGIC = b"\x1f\x8b"


def read(path: str | Path, *, block_tokens: int = 0) -> Trace:
    """The trace in ``path``. ``block_tokens``: where the file does not say.

    Raises :class:`ConfigError` that names the file, and the line where there is one to name.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            trace = _parse(file, _numbered(_unzipped(stream)), block_tokens)
    except (OSError, EOFError, zlib.error) as error:  # a gzip file that ends early or is damaged among them
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return trace


def read_all(paths: Iterable[str | Path], *, block_tokens: int = 0) -> list[Trace]:
    """One trace a file, in order."""
    return [read(path, block_tokens=block_tokens) for path in paths]


def _unzipped(file: BufferedReader) -> Iterable[bytes]:
    return gzip.open(file) if file.peek(2)[:2] == _GZIP_MAGIC else file


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and JSON objects of the lines that are not blank."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError among them
            raise ConfigError(f"line {number}: no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"line {number}: a JSON object is expected, not {line[:40].decode(errors='replace')!r}")
        yield number, value


def _parse(file: Path, lines: Iterator[tuple[int, dict[str, Any]]], block_tokens: int) -> Trace:
    first = next(lines, None)
    if first is None:
        raise ConfigError("the file is empty")

    def chained() -> Iterator[tuple[int, dict[str, Any]]]:
        yield first
        yield from lines

    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    if mooncake.matches(first[1]):
        trace = mooncake.parse(name, chained(), block_tokens=block_tokens)
    else:
        raise ConfigError(f"line {first[0]}: no kind of trace that is known; its fields: {', '.join(first[1])}")
    if any(later.now < earlier.now for earlier, later in zip(trace.requests, trace.requests[1:], strict=False)):
        return Trace(trace.name, trace.block_tokens, sorted(trace.requests, key=attrgetter("now")), trace.block_nbytes)
    return trace
