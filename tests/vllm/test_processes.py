"""Several processes: two servers on one directory, one that is killed while it saves, ranks that share a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serving import Answer, Engine, prompt

PAGE = 32
PROMPTS = [prompt(150, seed=8)[: 70 + 20 * n] + prompt(40, seed=80 + n) for n in range(4)]


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def send(self, **job: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def do(self, **job: Any) -> list[Answer]:
        self.send(**job)
        answers = self.hear()
        return [Answer(tuple(each["tokens"]), tuple(each["logprobs"]), each["cached"]) for each in answers]

    def count(self, event: str) -> float:
        """By vLLM's metrics, of all ranks."""
        self.send(count=event)
        return float(self.hear())

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child is gone"
        return json.loads(line)


@contextmanager
def child(model: Path) -> Iterator[Child]:
    command = [sys.executable, str(Path(__file__).with_name("child.py")), str(model)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield Child(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers would outlive it


def test_two_servers_and_one_is_killed_while_it_saves(models: Callable[[str], Path], tmp_path: Path) -> None:
    extra = {"dir": str(tmp_path), "memory": "32MiB", "disk": "128MiB", "block_tokens": 16, "aligned": True}
    many = [prompt(400, seed=300 + n) for n in range(60)]
    with child(models("gqa")) as other:
        other.do(start=extra, options={"block_size": PAGE})
        engine = Engine(models("gqa"), extra, block_size=PAGE)
        other.do(ask=PROMPTS[:2])
        own = other.do(ask=PROMPTS[:2])
        other.do(flush=True)
        assert engine.ask(PROMPTS[:2]) == own  # this server finds what the other one keeps
        assert engine.count("load", tier="disk") > 0
        engine.ask(PROMPTS[2:])
        mine = engine.ask(PROMPTS[2:])
        engine.cache.flush()
        assert other.do(ask=PROMPTS[2:]) == mine  # and the other way round
        before = len(list(tmp_path.glob("slab-*.data")))
        other.send(ask=many)
        while len(list(tmp_path.glob("slab-*.data"))) < before + 2:
            assert other.process.poll() is None
            time.sleep(0.005)
        other.process.kill()
        other.process.wait()
    engine.forget()
    assert engine.ask(PROMPTS) == [*own, *mine]
    engine.stop()
    engine = Engine(models("gqa"), extra, block_size=PAGE)
    found = engine.ask(many[:12])
    assert sum(answer.cached for answer in found) > 0
    reference = Engine(models("gqa"), block_size=PAGE).ask(many[:12])
    assert [answer.tokens for answer in found] == [answer.tokens for answer in reference]


def test_ranks_keep_their_shards(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Two ranks in processes of their own, beside the scheduler's. All ranks hit, or none."""
    extra: dict[str, Any] = {"dir": str(tmp_path), "memory": "1MiB", "disk": "128MiB", "block_tokens": 16}
    extra |= {"aligned": True, "policy": "lru"}  # by age: other prompts push PROMPTS out of memory
    options = {"block_size": PAGE, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with child(models("gqa")) as ranks:
        ranks.do(start=extra, options=options)
        ranks.do(ask=PROMPTS)
        own = ranks.do(ask=PROMPTS)
        ranks.do(forget=True)
        assert ranks.do(ask=PROMPTS) == own
        for seed in range(4):  # until nothing of PROMPTS is in memory any more
            ranks.do(ask=[prompt(450, seed=400 + seed)])
        ranks.do(forget=True)
        assert ranks.do(ask=PROMPTS) == own
        damage(tmp_path)
        for seed in range(4):
            ranks.do(ask=[prompt(450, seed=500 + seed)])
        ranks.do(forget=True)
        found = ranks.do(ask=PROMPTS)
        assert [answer.tokens for answer in found] == [answer.tokens for answer in own]
        assert ranks.count("corrupt") > 0
        ranks.do(forget=True)
        assert ranks.do(ask=PROMPTS) == own
        ranks.do(stop=True)


def damage(directory: Path) -> None:
    """A byte in each block of the first slab: one rank's."""
    slab = sorted(directory.glob("slab-*.data"))[0]
    data = bytearray(slab.read_bytes())
    for at in range(12_000, len(data), 16 << 10):
        data[at] ^= 0xFF
    with slab.open("r+b") as file:
        file.write(data)
