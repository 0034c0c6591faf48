"""``attach(wait=…)``: eight processes ask a model for the same 3,000-token prompt at once, and one reads it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import kvkeep
from kvkeep.testing.servers import RedisServer

PATIENT = "?lookup_timeout=20&load_timeout=20&save_timeout=20"

WORKER = textwrap.dedent(
    """
    import json, os, signal, sys, threading, time
    import torch, transformers
    import kvkeep
    from kvkeep.engines.transformers import attach, report
    where, folder, count, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(1, 4000, (1, 3000), generator=torch.Generator().manual_seed(0))
    go_read, go_write = os.pipe()
    ready_read, ready_write = os.pipe()

    def ask(at):
        remote = where if "://" in where else None
        cache = kvkeep.open(None if remote else where, memory="64MiB", disk="256MiB", remote=remote, block_tokens=64)
        attach(model, cache, wait=0.0 if mode == "impatient" else 120.0)
        cache.get_value("warm")
        os.write(ready_write, b"r")
        os.read(go_read, 1)
        if mode == "deadly":
            original = type(model).forward
            flag = os.path.join(folder, "dead")
            def forward(self, *args, **kwargs):
                if kwargs["input_ids"].shape[1] > 2000:  # a prefill
                    try:
                        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
                        os.kill(os.getpid(), signal.SIGKILL)
                    except FileExistsError:
                        pass
                return original(self, *args, **kwargs)
            type(model).forward = forward
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False,
                             pad_token_id=0)
        happened = report(model)
        line = [happened.cached_tokens, happened.stayed_out, out[0, -4:].tolist()]
        os.write(1, (json.dumps(line) + "\\n").encode())
        cache.close()

    children = []
    for at in range(count):
        child = os.fork()
        if not child:
            try:
                ask(at)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            os._exit(0)
        children.append(child)
    for _ in children:
        os.read(ready_read, 1)
    os.write(go_write, b"g" * count)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    print(json.dumps(codes), flush=True)
    """
)


def ask(where: str, folder: Path, count: int, mode: str = "") -> tuple[list[Any], list[int], str]:
    """What each asker reported, and how they ended."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, where, str(folder), str(count), mode], capture_output=True, text=True, check=True
    )
    *reports, codes = [json.loads(line) for line in done.stdout.splitlines()]
    return reports, codes, done.stderr


@pytest.mark.model
@pytest.mark.parametrize(("where", "mode"), [("directory", ""), ("server", ""), ("directory", "deadly")])
def test_eight_processes_read_one_prompt_once(
    tiny_model: Path, tmp_path: Path, where: str, mode: str, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "kept")
    if where == "server":
        server: RedisServer = request.getfixturevalue("redis_shared")
        place = server.url + PATIENT
    (tiny_model / "dead").unlink(missing_ok=True)
    reports, codes, errors = ask(place, tiny_model, 8, mode)
    assert codes == ([-9, *[0] * 7] if mode else [0] * 8), errors
    assert [why for _, why, _ in reports] == [""] * len(reports)
    cached = sorted(tokens for tokens, _, _ in reports)
    assert cached == [0, *[2999 // 64 * 64] * (len(reports) - 1)], errors
    assert len({tuple(new) for _, _, new in reports}) == 1, "and all say the same"


@pytest.mark.model
def test_who_does_not_wait_reads_it_too(tiny_model: Path, tmp_path: Path) -> None:
    """The control."""
    reports, codes, errors = ask(str(tmp_path / "kept"), tiny_model, 3, "impatient")
    assert codes == [0] * 3, errors
    assert [tokens for tokens, _, _ in reports].count(0) >= 2


@pytest.mark.model
def test_a_batch_does_not_wait_for_itself(tiny_model: Path) -> None:
    import time

    import torch
    import transformers

    from kvkeep.engines.transformers import attach, report

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with kvkeep.open(memory="64MiB", block_tokens=16) as cache:
        attach(model, cache, wait=60)
        tokens = torch.arange(1, 101)
        batch = torch.stack([tokens, torch.cat([tokens[:50], tokens[:50]]), tokens, tokens.flip(0)])
        begin = time.monotonic()
        model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert time.monotonic() - begin < 30
        happened = report(model)
        assert happened is not None
        assert happened.cached_tokens == 3 * 96
        assert not cache.values.flight._held
