"""Answers with hits are those of vLLM's own prefix cache at the same split of the prompt, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from serving import Engine, prompt


def prompts_around(page: int) -> list[list[int]]:
    """Prompts that share prefixes, of lengths at, before and behind multiples of a page and of a block."""
    lengths = [
        n
        for base in (page, 2 * page, 3 * page, 5 * page, 16, 80, 240, 333)
        for n in (base - 1, base, base + 1)
    ]  # fmt: skip
    own = [prompt(length, seed=length) for length in lengths]
    shared = [prompt(2 * page + 40, seed=7)[: page + 24 * n] + prompt(30 + n, seed=100 + n) for n in range(12)]
    return own + shared


@pytest.mark.parametrize("page", [32, 64, 128])
def test_equal_to_vllms_own_prefix_cache(page: int, models: Callable[[str], Path], tmp_path: Path) -> None:
    prompts = prompts_around(page)
    engine = Engine(models("gqa"), {"dir": str(tmp_path), "block_tokens": 16, "aligned": True}, block_size=page)
    cold = engine.ask_each(prompts, 4)
    own = engine.ask_each(prompts, 4)
    assert engine.count("load") == 0
    engine.forget()
    stored = engine.ask_each(prompts, 4)
    assert engine.count("load") > 0
    assert stored == own
    assert [answer.tokens for answer in stored] == [answer.tokens for answer in cold]
    assert [answer.cached for answer in stored] == [(len(each) - 1) // page * page for each in prompts]
    engine.cache.flush()
    engine = Engine(models("gqa"), {"dir": str(tmp_path), "block_tokens": 16, "aligned": True}, block_size=page)
    assert engine.ask_each(prompts, 4) == own
    assert engine.count("save") == 0
