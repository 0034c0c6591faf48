"""Files to traces: gzip or not, and of which kind, is seen from the content, never from the name."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import BufferedReader
from operator import attrgetter
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError
from kvkeep.trace import mooncake, recording
from kvkeep.trace.base import Trace

_GZIP_MAGIC = b"\x1f\x8b"


def read(path: str | Path, *, block_tokens: int = 0) -> Trace:
    """The trace in ``path``; see :func:`read_all`. Raises :class:`ConfigError` if there are several in the file."""
    traces = read_all([path], block_tokens=block_tokens)
    if len(traces) > 1:
        names = ", ".join(trace.name for trace in traces)
        raise ConfigError(f"{path}: blocks of several sizes, so several traces ({names}): use read_all()")
    return traces[0]


def read_all(paths: Iterable[str | Path], *, block_tokens: int = 0, tokenizer: str = "") -> list[Trace]:
    """The traces in files, in order; a file has more than one if its blocks are not of one size.

    ``block_tokens``: where a file does not say. Raises :class:`ConfigError` that names the file, and the line where
    there is one to name.
    """
    traces: list[Trace] = []
    for path in paths:
        file = Path(path).expanduser()
        try:
            with file.open("rb") as stream:
                traces += _parse(file, _numbered(_unzipped(stream)), block_tokens)
        except (OSError, EOFError, zlib.error) as error:  # a gzip file that ends early or is damaged among them
            raise ConfigError(f"{file}: cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
    return traces


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


def _parse(file: Path, lines: Iterator[tuple[int, dict[str, Any]]], block_tokens: int) -> list[Trace]:
    first = next(lines, None)
    if first is None:
        raise ConfigError("the file is empty")
    whole = itertools.chain([first], lines)
    name = file.name.removesuffix(".gz").removesuffix(".jsonl")
    if recording.matches(first[1]):
        traces = recording.parse(name, whole)
    elif mooncake.matches(first[1]):
        traces = [mooncake.parse(name, whole, block_tokens=block_tokens)]
    else:
        raise ConfigError(f"line {first[0]}: no kind of trace that is known; its fields: {', '.join(first[1])}")
    return [_sorted(trace) for trace in traces]


def _sorted(trace: Trace) -> Trace:
    """In the order of time; requests of one time keep theirs."""
    if any(later.now < earlier.now for earlier, later in itertools.pairwise(trace.requests)):
        return replace(trace, requests=sorted(trace.requests, key=attrgetter("now")))
    return trace
