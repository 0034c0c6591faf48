"""kvkeep's own recording: what is written, and that it reads back as what was asked."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import BlockKey, block_keys
from kvkeep.layout import KVLayout
from kvkeep.trace import Recorder, read, read_all, recording

LAYOUT = KVLayout.uniform(
    ModelIdentity(weights="w", kv_dtype="float32"),
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
    block_tokens=4,
)


def lookup(recorder: Recorder, tokens: list[int], now: float, hit_blocks: int = 0, layout: KVLayout = LAYOUT) -> None:
    recorder.lookup(
        block_keys(layout, tokens),
        num_tokens=len(tokens),
        hit_blocks=hit_blocks,
        block_tokens=layout.block_tokens,
        block_nbytes=layout.block_nbytes,
        now=now,
    )


def save(recorder: Recorder, tokens: list[int], now: float) -> None:
    keys = block_keys(LAYOUT, tokens)
    recorder.save(keys, block_tokens=4, block_nbytes=LAYOUT.block_nbytes, now=now)


def tails(tokens: list[int]) -> tuple[BlockKey, ...]:
    return tuple(BlockKey(key[:8]) for key in block_keys(LAYOUT, tokens))


def test_what_was_asked_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path)
    first, second = list(range(18)), [*range(12), 7, 7, 7, 7, 8, 8, 8, 8]
    lookup(recorder, first, 1000.5)
    save(recorder, first, 1001.0)  # nothing new: no line
    save(recorder, [*first, 1, 2], 1002.0)
    lookup(recorder, second, 1003.25, hit_blocks=3)
    lookup(recorder, [1, 2, 3], 1004.0)
    recorder.close()
    trace = read(path)
    assert (trace.block_tokens, trace.block_nbytes) == (4, LAYOUT.block_nbytes)
    asked = [(request.now, request.keys, request.num_tokens, request.start) for request in trace.requests]
    assert asked == [
        (1000.5, tails(first), 18, 0),
        (1002.0, tails([*first, 1, 2]), 0, 4),
        (1003.25, tails(second), 20, 0),
        (1004.0, (), 3, 0),
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert set().union(*lines) == {
        "kvkeep", "start", "layout", "block_tokens", "block_nbytes", "t", "l", "n", "h", "s", "r", "p", "k",
    }  # fmt: skip
    assert len(lines[4]["k"]) == 2 * 16  # of five blocks two are new
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_opening_appends(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for begin in (0, 1):
        recorder = Recorder(path)
        lookup(recorder, list(range(8)), 10.0 + begin)
        lookup(recorder, list(range(12)), 10.5 + begin)
        recorder.close()
    trace = read(path)
    assert [request.now for request in trace.requests] == [10.0, 10.5, 11.0, 11.5]
    assert [request.keys for request in trace.requests] == [tails(list(range(8))), tails(list(range(12)))] * 2


def test_two_holders_and_a_fork_write_to_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path)
    lookup(recorder, list(range(8)), 1.0)
    child = os.fork()
    if not child:
        try:
            lookup(recorder, list(range(4)), 2.0)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other = Recorder(path)
    lookup(other, list(range(16)), 3.0)
    lookup(recorder, list(range(8)), 4.0)
    other.close()
    recorder.close()
    assert [len(request.keys) for request in read(path).requests] == [2, 2]
    assert [len(request.keys) for request in read(f"{path}.{child}").requests] == [1]
    assert [len(request.keys) for request in read(f"{path}.{os.getpid()}").requests] == [4]


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "trace.jsonl")

    def work(seed: int) -> None:
        for turn in range(1, 40):
            lookup(recorder, [seed] * 4 * turn, float(turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    trace = read(tmp_path / "trace.jsonl")
    prompts = sorted((seed, turn) for seed in range(4) for turn in range(1, 40))
    found = {request.keys for request in trace.requests}
    assert len(trace.requests) == len(prompts)
    assert found == {tails([seed] * 4 * turn) for seed, turn in prompts}


def test_memory_is_bounded_and_what_is_forgotten_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "KNOWN_BLOCKS", 4)
    recorder = Recorder(tmp_path / "trace.jsonl")
    prompts = [[seed % 5] * 4 * (1 + seed % 7) for seed in range(60)]
    for at, prompt in enumerate(prompts):
        lookup(recorder, prompt, float(at))
        assert recorder._part is not None
        assert len(recorder._part._young) <= 4 + 7
    recorder.close()
    assert [request.keys for request in read(tmp_path / "trace.jsonl").requests] == [tails(one) for one in prompts]


def test_models_with_other_blocks_are_traces_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    wide = KVLayout(LAYOUT.identity, LAYOUT.groups, "float32", block_tokens=8)
    recorder = Recorder(path)
    lookup(recorder, list(range(16)), 1.0)
    lookup(recorder, list(range(16)), 2.0, layout=wide)
    lookup(recorder, list(range(20)), 3.0)
    recorder.close()
    small, large = read_all([path])
    assert [(trace.block_tokens, len(trace.requests)) for trace in (small, large)] == [(4, 2), (8, 1)]
    with pytest.raises(ConfigError, match="several"):
        read(path)


def test_the_limit_ends_the_recording_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "trace.jsonl", limit=400)
    for at in range(20):
        lookup(recorder, [at] * 16, float(at))
    assert (tmp_path / "trace.jsonl").stat().st_size <= 400
    assert len(read(tmp_path / "trace.jsonl").requests) in range(1, 20)
    assert caplog.text.count("has reached its limit") == 1


def test_a_full_disk_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder("/dev/full")
    for at in range(3):
        lookup(recorder, [at] * 16, float(at))
    recorder.close()
    assert caplog.text.count("ends here") == 1


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(tmp_path / "file" / "trace.jsonl")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: {**line, "k": "zz"}, "line 3"),
        (lambda line: {**line, "k": line["k"][:-2]}, "line 3.*not whole"),
        (lambda line: {**line, "l": 9}, "line 3"),
        (lambda line: {**line, "r": 7, "p": 2}, "line 3"),
        (lambda line: {**line, "t": None}, "line 3"),
        (lambda line: {**line, "t": float("nan")}, "line 3.*no time"),
        (lambda line: {**line, "t": 10**400}, "line 3"),
        (lambda line: {"kvkeep": "trace 9"}, "line 3.*trace 9"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path)
    lookup(recorder, list(range(8)), 1.0)
    recorder.close()
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(damage(json.loads(lines[2])))
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=message):
        read(path)
