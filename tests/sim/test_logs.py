"""Traces of other people's making: Mooncake's files and request logs, whole and damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvkeep.errors import ConfigError
from kvkeep.trace import Trace, merge, read, read_all

Write = Callable[..., Path]
IDS = list(range(100, 148))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: dict[str, Any] | str, name: str = "trace.jsonl", zipped: bool = False) -> Path:
        path = tmp_path / name
        data = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(data) if zipped else data)
        return path

    return write


def shared(trace: Trace, first: int = 0, second: int = 1) -> int:
    """Blocks that two requests have in common."""
    pair = (trace.requests[first].keys, trace.requests[second].keys)
    return sum(one == other for one, other in zip(*pair, strict=False))


def mooncake(at: float, tokens: int, ids: list[int], **more: int) -> dict[str, Any]:
    return {"timestamp": at, "input_length": tokens, "output_length": 7, "hash_ids": ids, **more}


@pytest.mark.parametrize("zipped", [False, True])
def test_mooncake(write: Write, zipped: bool) -> None:
    path = write(mooncake(0, 1100, [0, 1, 2]), "", mooncake(2500, 1536, [0, 1, 3]), zipped=zipped)
    trace = read(path)
    assert (trace.name, trace.block_tokens, trace.num_tokens) == ("trace", 512, 2636)
    assert [(request.now, len(request.keys)) for request in trace.requests] == [(0.0, 2), (2.5, 3)]
    assert shared(trace) == 2
    assert trace.unique_blocks == 3
    assert all(len(key) == 32 for key in trace.requests[0].keys)


def test_mooncake_with_another_block_size(write: Write) -> None:
    assert read(write(mooncake(0, 600, [5, 6], block_size=256))).block_tokens == 256
    path = write(mooncake(0, 600, [5, 6]))
    assert read(path, block_tokens=256).block_tokens == 256


def test_a_byte_order_mark_is_passed_over(write: Write) -> None:
    assert read(write("\ufeff" + json.dumps(mooncake(0, 512, [1])))).num_tokens == 512


def test_requests_are_put_in_the_order_of_time(write: Write) -> None:
    trace = read(write(mooncake(3000, 512, [1]), mooncake(1000, 512, [2]), mooncake(3000, 512, [3])))
    assert [request.now for request in trace.requests] == [1.0, 3.0, 3.0]
    assert trace.seconds == 2.0


def test_several_files_side_by_side(write: Write) -> None:
    paths = [write(mooncake(0, 512, [1]), mooncake(9, 512, [2]), name="a"), write(mooncake(4, 512, [1]), name="b")]
    (both,) = merge(read_all(paths))
    assert [request.now for request in both.requests] == [0.0, 0.004, 0.009]
    assert both.unique_blocks == 2
    other = write(mooncake(0, 512, [1, 2], block_size=256), name="c")
    assert [trace.name for trace in merge(read_all([*paths, other]))] == ["a+b", "c"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty"),
        (["", "  "], "empty"),
        ([mooncake(0, 512, [1]), '{"timestamp": 1, "inp'], "line 2.*no JSON"),
        ([mooncake(0, 512, [1]), "", "[1, 2]"], "line 3.*object"),
        ([mooncake(0, 512, [1]), {"timestamp": 1, "hash_ids": [1]}], "line 2.*input_length"),
        ([mooncake(0, 512, [1, 2, 3])], "line 1.*block size"),
        ([mooncake(0, 1024, [1])], "line 1.*block size"),
        ([mooncake(0, 1024, [1, 1])], "line 1.*twice"),
        ([{**mooncake(0, 512, [1]), "input_length": "many"}], "line 1"),
        ([{**mooncake(0, 512, [1]), "input_length": -5}], "line 1"),
        ([{**mooncake(0, 512, [1]), "output_length": -7}], "line 1.*0 or more"),
        ([mooncake(0, 512, [1]), mooncake(float("nan"), 512, [1])], "line 2.*0 or more"),
        ([mooncake(float("inf"), 512, [1])], "line 1.*0 or more"),
        ([mooncake(-1, 512, [1])], "line 1.*0 or more"),
        ([mooncake(10**400, 512, [1])], "line 1.*0 or more"),
        ([mooncake(True, 512, [1])], "line 1.*0 or more"),
        ([{**mooncake(0, 512, [1]), "hash_ids": [None]}], "line 1.*hash id"),
        ([mooncake(0, 512, [1, 2], block_size=256), mooncake(0, 512, [1], block_size=512)], "line 2"),
        ([mooncake(0, 512, [1], block_size=0)], "line 1"),
        ([{"color": "red", "size": 3}], "line 1.*color, size"),
        (["date,tokens", "1,2"], "no trace that is known"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_line(write: Write, lines: list[Any], message: str) -> None:
    path = write(*lines)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there_or_damaged(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)
    path = write(*[mooncake(at, 512, [at]) for at in range(200)], zipped=True)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100] + b"\xff" * 30 + whole[130:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"cannot be read|line"):
            read(path)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt_token_ids": IDS},
        {"prompt": IDS},
        {"prompt": [IDS]},
        {"input_ids": IDS, "prompt": "text that nobody needs to tokenise"},
        {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": IDS}},
        {"request": {"token_ids": IDS}},
        {"request": {"body": {"prompt_token_ids": IDS}}, "response": {"status": 200}},
    ],
)
def test_token_ids(write: Write, line: dict[str, Any]) -> None:
    trace = read(write({"time": 5, **line}, {"time": 6, "prompt_token_ids": [*IDS[:32], 1, 2, 3]}))
    assert trace.block_tokens == 16
    assert [(request.now, request.num_tokens) for request in trace.requests] == [(5.0, 48), (6.0, 35)]
    assert shared(trace) == 2


def test_text_and_messages_are_tokenised(write: Write) -> None:
    chat = [{"role": "system", "content": "You are a patient and very careful assistant to us all."}]
    first = [*chat, {"role": "user", "content": [{"type": "text", "text": "What is a cache? " * 4}]}]
    second = [*first, {"role": "assistant", "content": "A store."}, {"role": "user", "content": "Thank you."}]
    trace = read(
        write({"messages": first}, {"messages": second}, {"messages": chat}), tokenizer="bytes", block_tokens=4
    )
    assert shared(trace) == len(trace.requests[0].keys) - 1  # all but the last words, which open the answer
    assert shared(trace, 0, 2) == (len("<|system|>\n") + len(chat[0]["content"]) + len("\n<|")) // 16
    text = read(write({"prompt": "word " * 64}, {"prompt": "word " * 60 + "other"}), tokenizer="bytes")
    assert [request.num_tokens for request in text.requests] == [80, 77]
    assert [request.now for request in text.requests] == [0.0, 1.0]
    assert shared(text) == 4


def test_a_real_tokenizer(write: Write, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write({"prompt": "a b " * 10}, {"prompt": "a b " * 8 + "b b b b"}, name="log")
    trace = read(path, tokenizer=str(tmp_path), block_tokens=8)
    assert [request.num_tokens for request in trace.requests] == [20, 20]
    assert shared(trace) == 2
    assert read(path, tokenizer=str(tmp_path / "tokenizer.json")).num_tokens == 40
    (tmp_path / "tokenizer.json").write_text("{}")
    for wrong in ("{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(wrong)
        with pytest.raises(ConfigError, match="no tokenizer"):
            read(path, tokenizer=str(tmp_path))


CHAT = [{"role": "user", "content": "What is a cache, and what does it cost to keep one?"}]
RESULT = {"type": "function_call_output", "output": "A long answer of a tool, " * 4}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": IDS, "model": "a"}, {"prompt": IDS, "model": "b"}),
        ({"prompt": IDS, "model": "a"}, {"prompt": IDS}),
        ({"body": {"prompt": IDS}, "model": "a"}, {"body": {"prompt": IDS}, "model": "b"}),
        ({"messages": CHAT, "cache_salt": "a"}, {"messages": CHAT, "cache_salt": "b"}),
        ({"messages": CHAT, "system": "Be brief."}, {"messages": CHAT, "system": "Be long."}),
        ({"input": "text " * 20, "instructions": "Be brief."}, {"input": "text " * 20, "instructions": "Be long."}),
        ({"input": "text " * 20, "tools": [{"name": "a"}]}, {"input": "text " * 20}),
        ({"input": [RESULT]}, {"input": [RESULT | {"output": "Another " + RESULT["output"]}]}),
    ],
)
def test_what_no_engine_would_share_has_other_keys(write: Write, first: dict[str, Any], second: dict[str, Any]) -> None:
    trace = read(write(first, second, first), tokenizer="bytes", block_tokens=4)
    assert shared(trace, 0, 2) == len(trace.requests[0].keys) >= 3
    assert shared(trace) <= 1


@pytest.mark.parametrize("prompt", [["word " * 20, "word " * 10 + "else " * 10], [IDS[:25], [*IDS[:12], *range(13)]]])
def test_several_prompts_in_one_request(write: Write, prompt: list[Any]) -> None:
    trace = read(write({"prompt": prompt, "ts": 3}, {"prompt": prompt[0], "ts": 4}), tokenizer="bytes", block_tokens=4)
    assert [(request.now, request.num_tokens) for request in trace.requests] == [(3, 25), (3, 25), (4, 25)]
    assert shared(trace, 0, 2) == 6
    assert shared(trace, 0, 1) == 3


def test_outputs_of_several_prompts(write: Write) -> None:
    prompts, answers = [IDS[:20], IDS[:16]], [IDS[20:32], IDS[16:48]]
    trace = read(write({"prompt": prompts, "output_token_ids": answers}))
    assert [(request.num_tokens, len(request.keys)) for request in trace.requests] == [(20, 1), (0, 2), (16, 1), (0, 3)]


def test_decoded_tokens_are_kept(write: Write) -> None:
    trace = read(
        write(
            {"ts": 0, "prompt": IDS[:20], "output_token_ids": IDS[20:40]},
            {"ts": 1, "prompt": IDS[:48]},
        )
    )
    assert [(request.num_tokens, request.start, len(request.keys)) for request in trace.requests] == [
        (20, 0, 1),
        (0, 1, 2),
        (48, 0, 3),
    ]
    assert trace.requests[1].keys == trace.requests[2].keys[:2]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (12.5, 12.5),
        (1_700_000_000, 1.7e9),
        (1_700_000_000_250, 1_700_000_000.25),
        (1_700_000_000_250_000, 1_700_000_000.25),
        (1_700_000_000_250_000_000, 1_700_000_000.25),
        ("2023-11-14T22:13:20.25Z", 1_700_000_000.25),
        ("2023-11-14T23:13:20.25+01:00", 1_700_000_000.25),
        ("1700000000.25", 1_700_000_000.25),
    ],
)
def test_times(write: Write, time: object, seconds: float) -> None:
    assert read(write({"timestamp": time, "prompt": IDS})).requests[0].now == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "text"}], "line 1.*--tokenizer"),
        ([{"prompt": IDS}, {"model": "m"}], "line 2.*without prompt"),
        ([{"prompt": IDS}, {"prompt": IDS, "time": 3}], "line 2.*time"),
        ([{"prompt": IDS, "time": "noon"}], "line 1"),
        ([{"prompt": IDS, "time": True}], "line 1.*no time"),
        ([{"prompt": [1, "a"]}], "line 1.*token ids"),
        ([{"prompt": [1, -4]}], "line 1.*token id"),
        ([{"prompt": {"text": 1}}], "line 1"),
        ([{"prompt": ["text", 1]}], "line 1"),
        ([{"prompt": [IDS, IDS], "output_token_ids": IDS}], "line 1.*2 prompts"),
    ],
)
def test_wrong_requests(write: Write, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(*lines))


def test_the_log_of_vllm(write: Write) -> None:
    trace = read(
        write(
            "INFO 11-20 12:34:50 [api_server.py:1] vLLM API server version 0.10.0",
            f"INFO 11-20 12:34:56 [logger.py:43] Received request cmpl-1: prompt: 'ab', params: SamplingParams(n=1, "
            f"stop=[], stop_token_ids=[]), prompt_token_ids: {IDS}, prompt_embeds shape: None, lora_request: None.",
            f"(APIServer pid=7) DEBUG 11-20 12:34:58 [logger.py:40] Request cmpl-2 details: prompt: None, "
            f"prompt_token_ids: {[*IDS[:16], 9, 9]}, prompt_embeds shape: None.",
            "INFO 11-20 12:35:00 [async_llm.py:270] Added request cmpl-2.",
        )
    )
    assert [len(request.keys) for request in trace.requests] == [3, 1]
    assert trace.seconds == 2.0
    assert shared(trace) == 1
    text = write(
        "INFO 2025-11-20 12:34:56,500 x] Received request 1: prompt: \"It's\\n" + "a" * 64 + '", params: S(n=1)'
    )
    assert read(text, tokenizer="bytes").num_tokens == 18
    with pytest.raises(ConfigError, match="VLLM_LOGGING_LEVEL"):
        read(write("INFO 11-20 12:34:56 [logger.py:43] Received request cmpl-1: params: SamplingParams(n=1)"))


def test_ids_in_the_text_of_a_prompt_are_text(write: Write) -> None:
    said = "INFO 11-20 12:34:56 x] Received request 1: prompt: 'a prompt_token_ids: [1, 2, 3], b', "
    trace = read(
        write(f"{said}params: S(stop=['prompt_token_ids: [4]']), prompt_token_ids: {IDS}, lora_request: None.")
    )
    assert trace.num_tokens == len(IDS)
    assert read(write(f"{said}prompt_token_ids: None."), tokenizer="bytes").num_tokens == 8


def test_a_log_of_vllm_over_new_year(write: Write) -> None:
    def line(when: str) -> str:
        return f"INFO {when} x] Received request 1: prompt: 'x', prompt_token_ids: {IDS}."

    dates = ("12-31 23:59:59", "01-01 00:00:01", "12-31 23:59:58", "02-29 00:00:00", "02-28 00:00:00")
    trace = read(write(*map(line, dates)))
    assert [request.now - trace.requests[0].now for request in trace.requests] == [
        0, 1, 3, 58 * 86400 + 2, 59 * 86400 + 2
    ]  # fmt: skip
    dated = read(write(line("2025-11-20 00:00:00"), line("2024-11-20 00:00:00")))
    assert dated.seconds == 365 * 86400
