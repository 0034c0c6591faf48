"""The Transformers engine under the suite that every engine passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import gpt2, llama

from kvkeep.engines.transformers import attach, report
from kvkeep.testing.engines import EngineSuite


class Adapter:
    def __init__(self, model: Any, cache: Any) -> None:
        self.model = model if cache is None else attach(model, cache)

    def generate(self, tokens: Sequence[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([list(tokens)])
        result = self.model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        return [int(token) for token in result[0, len(tokens) :]]

    def cached_tokens(self) -> int:
        found = report(self.model)
        assert found is not None
        assert not found.stayed_out
        return found.cached_tokens


class TestLlama(EngineSuite):
    def make(self, cache: Any) -> Adapter:
        return Adapter(llama(), cache)


class TestGPT2(EngineSuite):
    def make(self, cache: Any) -> Adapter:
        return Adapter(gpt2(), cache)
