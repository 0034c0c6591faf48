"""Files to traces: gzip or not, and of which kind, is seen from the content, never from the name."""

from __future__ import annotations

import codecs
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
from kvkeep.trace import logs, mooncake, recording
from kvkeep.trace.base import Trace

_GZIP_MAGIC = b"\x1f\x8b"


def read(path: str | Path, *, block_tokens: int = 0, tokenizer: str = "") -> Trace:
    """The trace in ``path``; see :func:`read_all`. Raises :class:`ConfigError` if there are several in the file."""
    traces = read_all([path], block_tokens=block_tokens, tokenizer=tokenizer)
    if len(traces) > 1:
        names = ", ".join(trace.name for trace in traces)
        raise ConfigError(f"{path}: blocks of several sizes, so several traces ({names}): use read_all()")
    return traces[0]


def read_all(paths: Iterable[str | Path], *, block_tokens: int = 0, tokenizer: str = "") -> list[Trace]:
    """The traces in files, in order; a file has more than one if its blocks are not of one size.

    ``block_tokens``: where a file does not say. ``tokenizer``: for logs of text, see
    :func:`~kvkeep.trace.logs.load_tokenizer`. Raises :class:`ConfigError` that names the file, and the line where
    there is one to name.
    """
    traces: list[Trace] = []
    for path in paths:
        file = Path(path).expanduser()
        name = file.name.removesuffix(".gz").removesuffix(".jsonl")
        try:
            with file.open("rb") as stream:
                found = _parse(name, _numbered(_unzipped(stream)), block_tokens, tokenizer)
        except (OSError, EOFError, zlib.error) as error:  # a gzip file that ends early or is damaged among them
            raise ConfigError(f"{file}: cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        traces += [_sorted(trace) for trace in found]
    return traces


def _unzipped(file: BufferedReader) -> Iterable[bytes]:
    return gzip.open(file) if file.peek(2)[:2] == _GZIP_MAGIC else file


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, counted from 1, without a byte order mark."""
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, text


def _objects(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError among them
            raise ConfigError(f"line {number}: no JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"line {number}: a JSON object is expected, not {line[:40].decode(errors='replace')!r}")
        yield number, value


def _parse(name: str, lines: Iterator[tuple[int, bytes]], block_tokens: int, tokenizer: str) -> list[Trace]:
    first = next(lines, None)
    if first is None:
        raise ConfigError("the file is empty")
    lines = itertools.chain([first], lines)
    if not first[1].lstrip().startswith(b"{"):
        texts = ((number, line.decode(errors="replace")) for number, line in lines)
        return [logs.parse_vllm(name, texts, block_tokens=block_tokens, tokenizer=tokenizer)]
    objects = _objects(lines)
    number, line = next(objects)
    objects = itertools.chain([(number, line)], objects)
    if recording.matches(line):
        return recording.parse(name, objects)
    if mooncake.matches(line):
        return [mooncake.parse(name, objects, block_tokens=block_tokens)]
    if logs.matches(line):
        return [logs.parse(name, objects, block_tokens=block_tokens, tokenizer=tokenizer)]
    raise ConfigError(f"line {number}: no kind of trace that is known; its fields: {', '.join(line)}")


def _sorted(trace: Trace) -> Trace:
    """In the order of time; requests of one time keep theirs."""
    if any(later.now < earlier.now for earlier, later in itertools.pairwise(trace.requests)):
        return replace(trace, requests=sorted(trace.requests, key=attrgetter("now")))
    return trace
