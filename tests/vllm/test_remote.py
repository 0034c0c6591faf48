"""A remote store below the disk: another machine's prompts are loaded from it, and its failures cost hits only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Answer, Engine, prompt

from kvkeep.testing.servers import RedisServer, redis_server

PAGE = 32
SHARED = prompt(200, seed=5)
PROMPTS = [SHARED[: 80 + 30 * n] + prompt(30 + n, seed=90 + n) for n in range(5)]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


PATIENT = "?lookup_timeout=20&load_timeout=20"
"""This machine may be busy; a server that does not answer within milliseconds is a miss otherwise."""


def serve(model: Path, directory: Path, server: RedisServer, patience: str = PATIENT) -> Engine:
    extra = {
        "dir": str(directory), "memory": "16MiB", "disk": "64MiB", "block_tokens": 16, "aligned": True,
        "remote": f"{server.url}{patience}",
    }  # fmt: skip
    return Engine(model, extra, block_size=PAGE)


@pytest.fixture(scope="module")
def own(models: Callable[[str], Path], server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """Answers by vLLM's own prefix cache, on a machine that also fills the remote store."""
    engine = serve(models("gqa"), tmp_path_factory.mktemp("first"), server)
    engine.ask_each(PROMPTS)
    answers = engine.ask_each(PROMPTS)
    assert engine.cache.flush(60)
    engine.stop()
    return answers


def test_another_machine_loads_from_the_remote_store(
    own: list[Answer], models: Callable[[str], Path], server: RedisServer, tmp_path: Path
) -> None:
    engine = serve(models("gqa"), tmp_path, server)
    assert engine.ask_each(PROMPTS) == own
    assert engine.count("load", tier="remote") > 0
    engine.forget()
    assert engine.ask(PROMPTS) == own  # now from memory


def test_a_remote_store_that_hangs_or_dies(
    own: list[Answer], models: Callable[[str], Path], server: RedisServer, tmp_path: Path
) -> None:
    texts = [answer.tokens for answer in own]
    engine = serve(models("gqa"), tmp_path, server, patience="")
    assert engine.ask(PROMPTS[:1])[0].tokens == texts[0]
    server.freeze()
    try:
        assert [answer.tokens for answer in engine.ask(PROMPTS)] == texts
    finally:
        server.thaw()
    server.kill()
    engine.forget()
    assert [answer.tokens for answer in engine.ask(PROMPTS)] == texts
    engine.forget()
    assert engine.ask(PROMPTS) == own  # from memory
    engine.stop()
    engine = serve(models("gqa"), tmp_path, server)  # dead when vLLM starts
    assert [answer.tokens for answer in engine.ask(PROMPTS)] == texts
