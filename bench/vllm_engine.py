"""One vLLM engine in a process of its own, driven by lines of JSON: ``python -m bench.vllm_engine``.

The first line is ``{"options": …, "also": […]}``: those of ``vllm.LLM``, and processes that serve it; the answer
``{"ready": …}``. Each further line is a request::

    {"prompts": [[token ids], …], "new_tokens": 1}

and its answer ``{"wall", "cpu", "cached": […], "tokens": [[…], …]}``: wall seconds, CPU seconds of this process, its
workers and those that serve it (background threads included), prompt tokens that were not computed, and what was
generated, greedily. A line ``{"settle": true}`` waits until nothing is written any more; its answer has the CPU seconds
that took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import psutil

QUIET_SECONDS = 1.0


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM and its workers print goes to the log
    job: dict[str, Any] = json.loads(sys.stdin.readline())

    from vllm import LLM, SamplingParams

    engine = LLM(**job["options"])
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for each in job["also"]:
        processes += [psutil.Process(each), *psutil.Process(each).children(recursive=True)]
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("settle"):
            print(json.dumps({"cpu": settle(processes)}), file=answers)
            continue
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        sampling = SamplingParams(max_tokens=request["new_tokens"], temperature=0, ignore_eos=True)
        before, begin = cpu_seconds(processes), time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        wall = time.perf_counter() - begin
        answer = {
            "wall": wall,
            "cpu": cpu_seconds(processes) - before,
            "cached": [output.num_cached_tokens or 0 for output in outputs],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }
        print(json.dumps(answer), file=answers)


def settle(processes: list[psutil.Process]) -> float:
    """Wait until a second passes in which nothing was written to disk; the CPU seconds that went by."""
    before = cpu_seconds(processes)
    written = -1
    while True:
        now = sum(process.io_counters().write_bytes for process in processes)
        if now == written:
            return cpu_seconds(processes) - before
        written = now
        time.sleep(QUIET_SECONDS)


if __name__ == "__main__":
    main()
