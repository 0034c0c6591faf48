"""What a prefill costs, in units of one token's share that does not depend on the prompt's length.

A prompt of ``n`` tokens costs ``n + n² / attention_tokens``: weights touch every token once, attention every pair.
"""

from __future__ import annotations

ATTENTION_TOKENS = 53_248
"""The prompt length at which attention costs as much as all the rest: Llama-3.1-8B's (see :mod:`kvkeep.sim.models`)."""


def prefill(tokens: int, attention_tokens: float = ATTENTION_TOKENS) -> float:
    """Cost of the first ``tokens`` of a prompt: also what a cached prefix of that length saves."""
    return tokens + tokens * tokens / attention_tokens
