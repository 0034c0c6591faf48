"""Request logs: what a server was asked, as text, messages or token ids; tokenised and hashed while they are read.

*JSON lines* of an OpenAI-style request, alone or within ``body`` or ``request`` (a proxy's or a batch file's line):
``prompt_token_ids``, ``token_ids`` or ``input_ids``, or ``prompt`` (text or ids), ``input``, or ``messages``; each of
several prompts is a request. Those of another ``model`` or ``cache_salt`` have nothing in common. The time is
``timestamp``, ``time``, ``ts``, ``created``, ``arrival_time``, … in seconds, milli-, micro- or nanoseconds since 1970
(told apart by size), in seconds since the start, or as ISO 8601; a log without times gets one second between requests.
``output_token_ids`` are kept as decoded blocks.

*vLLM's log* with ``--enable-log-requests`` (and ``VLLM_LOGGING_LEVEL=DEBUG`` since 0.11.1): lines with
``prompt_token_ids: […]`` or ``prompt: '…'``; other lines are passed over. Where dates lack the year, each is in
the one that brings it nearest to the line before.

Text needs a tokenizer. Messages are written one below the other with their roles: not the model's own template, but
the same prefixes are the same, and lengths differ by a few tokens a message.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvkeep.errors import ConfigError, LayoutError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import KeyChain, Tokens
from kvkeep.layout import KVLayout
from kvkeep.trace.base import Request, Trace

DEFAULT_BLOCK_TOKENS = 16
TEXT_TOKEN_NBYTES = 4
"""Bytes of UTF-8 a token where ``bytes`` stands in for a tokenizer: about what English and code have."""

_IDS = ("prompt_token_ids", "token_ids", "input_ids")
_TEXTS = ("messages", "prompt", "input")
_TIMES = ("timestamp", "@timestamp", "time", "ts", "arrival_time", "arrived_at", "created", "created_at", "start_time")
_OUTPUT_IDS = ("output_token_ids", "completion_token_ids")
_BEFORE = ("tools", "system", "instructions")
"""Of a request with messages or input: what stands before them."""
_VLLM_IDS = re.compile(r".*prompt_token_ids: \[([\d, ]+)\]")  # the last: parameters may quote others
_VLLM_TEXT = re.compile(r"""prompt: ('[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")""")
_VLLM_TIME = re.compile(r"(\d{4}-)?(\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d+))?")

_YEAR = 366 * 86400
"""Seconds of 2000, into which dates without a year are put: it has a 29 February."""

Tokenize = Callable[[str], Tokens]


def matches(line: dict[str, Any]) -> bool:
    """Is there a prompt in ``line``?"""
    return _body(line) is not None


def parse(name: str, lines: Iterable[tuple[int, dict[str, Any]]], *, block_tokens: int, tokenizer: str) -> Trace:
    """JSON lines. Raises :class:`ConfigError` that begins with ``line N``."""
    prompts = _Prompts(block_tokens or DEFAULT_BLOCK_TOKENS, tokenizer)
    timed = None
    for count, (number, line) in enumerate(lines):
        body = _body(line)
        if body is None:
            raise ConfigError(f"line {number}: a request without prompt, messages or token ids")
        try:
            now = _time(line) if _time(line) is not None else _time(body)
            if timed is None:
                timed = now is not None
            if timed != (now is not None):
                raise ConfigError("some requests have a time, this one differs")
            found, answers = prompts.tokens(body), _first(line, _OUTPUT_IDS)
            if len(found) == 1 or not answers:
                answers = [answers] * len(found)
            if not isinstance(answers, list) or len(answers) != len(found):
                raise ConfigError(f"{len(found)} prompts, but not as many lists of output ids")
            model, salt = (_first(body, [name]) or _first(line, [name]) or "" for name in ("model", "cache_salt"))
            for tokens, answer in zip(found, answers, strict=True):
                prompts.add(now if now is not None else float(count), tokens, answer, str(model), str(salt))
        except (ConfigError, LayoutError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"line {number}: {error}") from error
    return prompts.trace(name)


def parse_vllm(name: str, lines: Iterable[tuple[int, str]], *, block_tokens: int, tokenizer: str) -> Trace:
    """vLLM's log. Raises :class:`ConfigError` if no request is in it."""
    prompts = _Prompts(block_tokens or DEFAULT_BLOCK_TOKENS, tokenizer)
    last: float | None = None
    for number, line in lines:
        text = _VLLM_TEXT.search(line)
        ids = _VLLM_IDS.match(line, text.end() if text else 0)  # a text may hold what looks like ids
        if ids is None and text is None:
            continue
        when = _VLLM_TIME.search(line)
        if when is None:
            raise ConfigError(f"line {number}: a request without a time")
        try:
            moment = datetime.fromisoformat(f"{when[1] or '2000-'}{when[2]}T{when[3]}").replace(tzinfo=UTC)
            if ids:
                tokens: Tokens = np.fromstring(ids[1], dtype=np.int64, sep=",")
            else:
                tokens = prompts.encode(ast.literal_eval(text[1] if text else "''"))
            now = moment.timestamp() + float(f"0.{when[4] or 0}")
            if when[1] is None:
                last = now if last is None else now + round((last - now) / _YEAR) * _YEAR
                now = last
            prompts.add(now, tokens, None)
        except (ConfigError, LayoutError, ValueError, SyntaxError) as error:
            raise ConfigError(f"line {number}: {error}") from error
    if not prompts.requests:
        raise ConfigError(
            "no trace that is known, and no vLLM log with prompts in it either "
            "(vllm serve --enable-log-requests, and VLLM_LOGGING_LEVEL=DEBUG since 0.11.1)"
        )
    return prompts.trace(name)


class _Prompts:
    """Requests so far, and what makes keys of prompts."""

    def __init__(self, block_tokens: int, tokenizer: str) -> None:
        self._block_tokens = block_tokens
        self._layouts: dict[tuple[str, str], KVLayout] = {}
        self._tokenizer = tokenizer
        self._encode: Tokenize | None = None
        self.requests: list[Request] = []

    def encode(self, text: str) -> Tokens:
        if self._encode is None:
            self._encode = load_tokenizer(self._tokenizer)
        return self._encode(text)

    def tokens(self, body: dict[str, Any]) -> list[Tokens]:
        """Of each of its prompts."""
        prompt = _first(body, (*_IDS, *_TEXTS))
        many = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else [prompt]
        before = "".join(_before(body))
        found: list[Tokens] = []
        for one in many:
            if isinstance(one, str):
                found.append(self.encode(before + one))
            elif isinstance(one, list) and one and isinstance(one[0], dict):
                found.append(self.encode(before + "".join(_messages(one))))
            else:
                found.append(_flat(one))
        return found

    def add(self, now: float, tokens: Tokens, output: Any, model: str = "", salt: str = "") -> None:
        chain = KeyChain(self._layout(model, salt))
        keys = tuple(chain.extend(tokens))
        answer = _flat(output) if output else []
        self.requests.append(Request(now, keys, len(tokens), len(answer)))
        decoded = chain.extend(answer)
        if decoded:
            self.requests.append(Request(now, (*keys, *decoded), 0, 0, len(keys)))

    def trace(self, name: str) -> Trace:
        return Trace(name, self._block_tokens, self.requests)

    def _layout(self, model: str, salt: str) -> KVLayout:
        """One for all that may share blocks. Its keys stay in this process: names will do for weights and secrets."""
        layout = self._layouts.get((model, salt))
        if layout is None:
            identity = ModelIdentity(f"trace of {model}", "uint8", namespace=salt.encode("utf-8", "surrogatepass"))
            layout = self._layouts[model, salt] = KVLayout.uniform(
                identity, num_layers=1, num_kv_heads=1, head_dim=1, dtype="uint8", block_tokens=self._block_tokens
            )
        return layout


def load_tokenizer(tokenizer: str) -> Tokenize:
    """``tokenizer``: a ``tokenizer.json``, a folder with one, or ``bytes``. Raises :class:`ConfigError`."""
    if tokenizer == "bytes":
        return _text_tokens
    if not tokenizer:
        raise ConfigError(
            'the log holds text: name a tokenizer (--tokenizer FOLDER, or "bytes" for '
            f"{TEXT_TOKEN_NBYTES} bytes of text a token)"
        )
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--tokenizer {tokenizer}: no tokenizer.json is there")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("a tokenizer needs its library: pip install 'kvkeep[transformers]'") from error
    try:
        text = path.read_text(encoding="utf-8")
        if "model" not in json.loads(text):
            raise ValueError("it has no model")
        known = Tokenizer.from_str(text)
    except Exception as error:  # the library's own have no name
        raise ConfigError(f"{path}: no tokenizer: {error}") from error
    return lambda text: np.asarray(known.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _text_tokens(text: str) -> Tokens:
    data = text.encode("utf-8", "surrogatepass")
    whole = len(data) // TEXT_TOKEN_NBYTES * TEXT_TOKEN_NBYTES
    tokens = np.frombuffer(data[:whole], dtype="<u4")
    return tokens if whole == len(data) else np.append(tokens, np.uint32(int.from_bytes(data[whole:], "little")))


def _before(body: dict[str, Any]) -> Iterator[str]:
    for part in (body.get(name) for name in _BEFORE):
        if part:
            yield _text(part) + "\n"


def _messages(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message, dict):
            raise ConfigError("a message is no object")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            content = message  # what a tool said, and so on: kinds of input without a content
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
        if message.get("tool_calls"):
            texts.append(message["tool_calls"])
        yield f"<|{message.get('role')}|>\n"
        for text in texts:
            if text is not None:
                yield _text(text) + "\n"
    yield "<|assistant|>\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _body(line: dict[str, Any]) -> dict[str, Any] | None:
    """The object in ``line`` that holds the prompt."""
    candidates: list[Any] = [line]
    for name in ("body", "request"):
        inner = line.get(name)
        candidates += [inner, inner.get("body")] if isinstance(inner, dict) else [inner]
    for candidate in candidates:
        if isinstance(candidate, dict) and _first(candidate, (*_IDS, *_TEXTS)) is not None:
            return candidate
    return None


def _first(line: dict[str, Any], names: Iterable[str]) -> Any:
    return next((line[name] for name in names if line.get(name) is not None), None)


def _flat(ids: Any) -> list[int]:
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]  # an answer, as prompts come
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ConfigError("a prompt is text, a list of messages or a list of token ids")
    return ids


def _time(line: dict[str, Any]) -> float | None:
    """Seconds."""
    value = _first(line, _TIMES)
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e20:
        raise ConfigError(f"{value!r} is no time")
    for unit, least in ((1e9, 1e17), (1e6, 1e14), (1e3, 1e11)):
        if value >= least:
            return value / unit
    return float(value)
