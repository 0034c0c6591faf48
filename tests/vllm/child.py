"""An engine in a process of its own, driven by lines of JSON: ``python child.py MODEL`` reads jobs, writes answers.

A job is ``{"start": extra, "options": …}``, ``{"ask": prompts}``, ``{"count": event}``,
``{"flush": true}``, ``{"forget": true}`` or ``{"stop": true}``; each gets one line back.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    from serving import Engine

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM talks, and so do its processes
    engine: Engine | None = None
    for line in sys.stdin:
        job = json.loads(line)
        answers: Any = []
        if "start" in job:
            engine = Engine(Path(sys.argv[1]), job["start"], **job["options"])
        elif "ask" in job:
            assert engine is not None
            answers = [asdict(answer) for answer in engine.ask(job["ask"])]
        elif "count" in job:
            assert engine is not None
            name = f"vllm:kvkeep_{job['count']}"
            answers = sum(metric.value for metric in engine.llm.get_metrics() if metric.name == name)
        elif "flush" in job:
            assert engine is not None
            engine.cache.flush()
        elif "forget" in job:
            assert engine is not None
            engine.forget()
        else:
            assert engine is not None
            engine.stop()
        print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    main()
