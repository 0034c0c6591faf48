"""``make bench-vllm``: SmolLM2 by vLLM on one core, with and without kvkeep. All ratios within one run.

Each engine is a process of its own (:mod:`bench.vllm_engine`); those that are compared are asked in turns, so that a
machine that slows down does so for all. What is timed is a prompt of 3,000 tokens until its first token; prompts differ
from their first token on. Rows:

- *cold*: nothing known. The same with kvkeep or vLLM's ``fs`` tier costs more by what saving costs; CPU seconds include
  those of the background until all is written. *full*: the same where memory and disk have been filled, as they are for
  most of a server's life: until then each block lands on fresh pages, which a virtual machine may have to get from its
  host (2 CPU seconds a GB on the one of docs/engines/vllm.md, for memory and page cache each).
- *own prefix cache*: asked again in the same vLLM process. The measure of all hits.
- *second server*: another kvkeep server on the directory that the first one, still running, writes.
- *restart*: a new process finds the prompt on disk, page cache warm (never dropped) or cold (dropped from the files).
- *throughput*: 32 requests of 2,000 tokens that share 1,500, eight at a time, a KV pool for 16,000 tokens; asked for
  the first time, asked again (the pool has lost most of it), and asked again after a restart.

The model is computed in bfloat16 where the processor can, else in float32: an AVX2 machine takes five times as long for
bfloat16, and every hit would look good beside that. ``--dtype`` decides otherwise.

vLLM's ``fs`` tier is made for GPU hosts; here it runs by :mod:`kvkeep.testing.vllm_offload`. ``--lmcache DIR`` adds
LMCache from the virtual environment DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.report import OUT, console, show
from kvkeep.cli.smollm2 import folder
from kvkeep.cli.vllm_args import transfer_config
from kvkeep.cli.vllm_server import ENVIRONMENT, free_port

PROMPT = 3_000
SHARED, REQUEST, REQUESTS, CONCURRENCY, NEW_TOKENS = 1_500, 2_000, 32, 8, 16
PAGE = 128
FULL = {"memory": "192MiB", "disk": "224MiB"}
FILL = 4
"""Prompts that fill these. All engines read them: a pool that has been used less far has cheaper pages."""
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
"""Shorter prompts, to try the benchmark itself: figures are for 1."""
if SCALE != 1:
    PROMPT, SHARED, REQUEST = (round(SCALE * tokens) for tokens in (PROMPT, SHARED, REQUEST))
OPTIONS: dict[str, Any] = {"model": "", "enforce_eager": True, "max_model_len": 4096, "disable_log_stats": True}


class LMCache:
    """LMCache's server, and the options of an engine that uses it. Its own defaults hang on a CPU; these do not."""

    def __init__(self, venv: Path, directory: Path, log: Path) -> None:
        self.python = str(venv / "bin" / "python")
        port = free_port()
        adapter = json.dumps({"type": "fs", "base_path": str(directory)})
        command = [str(venv / "bin" / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--http-port", str(free_port()), "--disable-observability", "--supported-transfer-mode", "auto"]
        command += ["--shm-name", f"kvkeep-bench-{port}", "--l1-size-gb", "2", "--eviction-policy", "LRU"]
        with log.open("a") as stream:
            self.process = subprocess.Popen([*command, "--l2-adapter", adapter], stdout=stream, stderr=stream)
        self.options = {
            "kv_transfer_config": {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
            }
        }


class Engine:
    """A process with one engine. ``options``: of ``vllm.LLM``. ``server``: ends with it."""

    def __init__(self, name: str, log: Path, server: LMCache | None = None, **options: Any) -> None:
        self.name = name
        self._server = server
        python = sys.executable if server is None else server.python
        self._log = log
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.getcwd()}
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                [python, "-m", "bench.vllm_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=environment,
            )
        options = {**OPTIONS, "model": str(folder()), **options, **(server.options if server is not None else {})}
        self._send({"options": options, "also": [server.process.pid] if server is not None else []})

    def __enter__(self) -> Engine:
        try:
            self._receive()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        _wait(self._process)
        if self._server is not None:
            self._server.process.terminate()
            _wait(self._server.process)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self.name} has ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, *prompts: list[int], new_tokens: int = 1) -> dict[str, Any]:
        self._send({"prompts": prompts, "new_tokens": new_tokens})
        return self._receive()

    def settle(self) -> float:
        """Wait until all is written; CPU seconds of that."""
        self._send({"settle": True})
        return float(self._receive()["cpu"])


def _wait(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Row:
    """Answers of one case, prompt by prompt."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.cached: list[int] = []
        self.tokens: list[list[list[int]]] = []
        self.ratios: list[tuple[float, float]] = []

    def add(self, answer: dict[str, Any], base: dict[str, Any] | None = None) -> None:
        """``base``: what it is compared with, asked beside it."""
        self.wall.append(answer["wall"])
        self.cpu.append(answer["cpu"])
        self.cached += answer["cached"]
        self.tokens.append(answer["tokens"])
        if base is not None:
            self.ratios.append((answer["wall"] / base["wall"], answer["cpu"] / base["cpu"]))

    def ratio(self, which: int) -> str:
        """The median of the pairs': of wall seconds (0) or of CPU seconds (1)."""
        return f"{statistics.median(pair[which] for pair in self.ratios):.3f}" if self.ratios else "1"


def drop(directory: Path) -> None:
    """Take the files of ``directory`` out of the page cache, without anybody else's."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kvkeep_options(directory: Path, **more: Any) -> dict[str, Any]:
    return {"kv_transfer_config": transfer_config({"dir": str(directory), "disk": "4GiB", **more})}


def fs_options(directory: Path) -> dict[str, Any]:
    extra = {
        "spec_name": "CPUTieringSpec",
        "spec_module_path": "kvkeep.testing.vllm_offload",
        "cpu_bytes_to_use": 1 << 30,
        "secondary_tiers": [{"type": "fs", "root_dir": str(directory)}],
    }
    return {
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
    }


def native_dtype() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def document() -> list[int]:
    from tokenizers import Tokenizer

    text = files("kvkeep.cli").joinpath("constitution.txt").read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(folder() / "tokenizer.json")).encode(text).ids
    return ids


def prompts(count: int, ids: Sequence[int]) -> list[list[int]]:
    """Prompts of PROMPT tokens that differ from the first one on."""
    return [[1_000 + number, *ids[number : number + PROMPT - 1]] for number in range(count)]


def warm_up(engines: Iterable[Engine], ids: Sequence[int]) -> None:
    """What a process does once is not timed: kernels are compiled, pages touched. The second is a hit."""
    for engine in engines:
        for _ in range(2):
            engine.ask(list(ids[-2 * PAGE :]))
            engine.settle()


def latency(repeats: int, place: Path, log: Path, lmcache: Path | None) -> list[list[str]]:
    """``lmcache``: a virtual environment that has it."""
    ids = document()
    asked = prompts(repeats, ids)
    keepers = ["kvkeep", "vLLM's fs tier", *(["LMCache"] if lmcache is not None else [])]
    rows: dict[str, Row] = {}

    def engine(name: str) -> Engine:
        if name == "kvkeep":
            return Engine(name, log, **kvkeep_options(place / "kvkeep"))
        if lmcache is not None and name == "LMCache":
            return Engine(name, log, LMCache(lmcache, place / "lmcache", log))
        return Engine(name, log, **fs_options(place / "fs"))

    def row(name: str) -> Row:
        return rows.setdefault(name, Row())

    with Engine("vLLM alone", log) as alone:
        with engine("kvkeep") as first:
            with ExitStack() as others:  # ended before the next engine starts: five do not fit into 24 GiB
                step("cold requests")
                full = Engine("kvkeep, full,", log, **kvkeep_options(place / "full", **FULL))
                savers = [first, *(others.enter_context(each) for each in (full, *map(engine, keepers[1:])))]
                warm_up([alone, *savers], ids)
                for prompt in prompts(FILL, ids[::-1]):
                    for each in (alone, *savers):
                        each.ask(prompt)
                        each.settle()
                for number, prompt in enumerate(asked):
                    got = {}
                    for each in [alone, *savers] if number % 2 else [*savers[::-1], alone]:
                        got[each.name] = each.ask(prompt)
                        got[each.name]["cpu"] += each.settle()
                    row("cold").add(got[alone.name])
                    for saver in savers:
                        row(f"cold, {saver.name} saves").add(got[saver.name], got[alone.name])
            step("a second server")
            with engine("kvkeep") as second:
                warm_up([second], ids)
                for prompt in asked:
                    hit = alone.ask(prompt)
                    row("own prefix cache").add(hit)
                    row("kvkeep: second server").add(second.ask(prompt), hit)
        for cache in ("warm", "cold"):
            for name in keepers:
                step(f"{name}: restart, page cache {cache}")
                with engine(name) as again:
                    warm_up([again], ids)
                    for prompt in asked:
                        if cache == "cold":
                            drop(place)
                        hit = alone.ask(prompt)
                        row("own prefix cache").add(hit)
                        row(f"{name}: restart, page cache {cache}").add(again.ask(prompt), hit)
    return [line(name, each, rows) for name, each in rows.items()]


def line(name: str, row: Row, rows: dict[str, Row]) -> list[str]:
    """A row of the table."""
    same = [token for tokens in rows["cold"].tokens for token in tokens]
    asked = len(same)
    equal = sum(tokens[0] == same[at % asked] for at, tokens in enumerate(row.tokens))

    return [
        name,
        f"{min(row.wall):.3f} / {statistics.median(row.wall):.3f}",
        row.ratio(0),
        f"{min(row.cpu):.2f} / {statistics.median(row.cpu):.2f}",
        row.ratio(1),
        f"{PROMPT - min(row.cached):,}",
        f"{equal}/{len(row.tokens)}",
    ]


def throughput(place: Path, log: Path) -> list[list[str]]:
    ids = document()
    numbers = random.Random(0)
    asked = [ids[:SHARED] + [numbers.choice(ids) for _ in range(REQUEST - SHARED)] for _ in range(REQUESTS)]
    pool = {"max_num_seqs": CONCURRENCY, "num_gpu_blocks_override": REQUESTS * REQUEST // 4 // PAGE}
    kept = kvkeep_options(place / "throughput")
    found: dict[str, Row] = {}

    def run(name: str, engine: Engine) -> None:
        step(f"throughput: {name}")
        found.setdefault(name, Row()).add(engine.ask(*asked, new_tokens=NEW_TOKENS))
        engine.settle()

    with Engine("vLLM alone", log, **pool) as alone:
        warm_up([alone], ids[::-1])
        run("vLLM alone, first time", alone)
        run("vLLM alone, again", alone)
    with Engine("kvkeep", log, **pool, **kept) as first:
        warm_up([first], ids[::-1])
        run("kvkeep, first time", first)
        run("kvkeep, again", first)
    with Engine("kvkeep", log, **pool, **kept) as second:
        warm_up([second], ids[::-1])
        run("kvkeep, after a restart", second)
    bases = {"first time": "vLLM alone, first time", "again": "vLLM alone, again"}
    table = []
    for name, row in found.items():
        # After a restart vLLM alone knows nothing: its first time is what it does then.
        base = found[bases.get(name.partition(", ")[2], "vLLM alone, first time")]
        rate = REQUESTS / row.wall[0]
        table.append(
            [
                name,
                f"{row.wall[0]:.1f}",
                f"{rate:.2f}",
                f"{rate / (REQUESTS / base.wall[0]):.2f}",
                f"{sum(row.cached) / len(row.cached):,.0f}",
            ]
        )
    return table


def step(text: str) -> None:
    console.print(f"[dim]{text} …[/dim]", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description="kvkeep in vLLM, measured")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of the first table (default: 5)")
    parser.add_argument("--lmcache", type=Path, help="a virtual environment with LMCache: it joins the table")
    parser.add_argument("--only", choices=["latency", "throughput"], help="one of the two tables")
    parser.add_argument("--dtype", default=native_dtype(), help="default here: %(default)s")
    given = parser.parse_args()
    OPTIONS["dtype"] = given.dtype
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kvkeep-bench-vllm-", dir=OUT) as name:
        place, log = Path(name), OUT / "vllm-engines.log"
        log.write_text("")
        if given.only != "throughput":
            show(
                "vllm",
                f"{PROMPT:,} tokens, SmolLM2 in {given.dtype}, one core: seconds, min / median of {given.repeats}",
                ["case", "wall s", "×", "CPU s", "× ", "tokens computed", "same token"],
                latency(given.repeats, place, log, given.lmcache),
            )
            console.print(
                "×: to `cold` for the cold rows, else to `own prefix cache`; medians of pairs asked in turns."
            )
        if given.only != "latency":
            show(
                "vllm-throughput",
                f"{REQUESTS} requests of {REQUEST:,} tokens, {SHARED:,} shared, {CONCURRENCY} at once, {given.dtype}",
                ["case", "wall s", "requests/s", "× vLLM alone", "cached tokens a request"],
                throughput(place, log),
            )


if __name__ == "__main__":
    main()
