"""A chat whose turns do not read the conversation again: python examples/chat.py MODEL DIRECTORY.

MODEL is any Transformers id or folder. Run it twice: the second run finds the first one's blocks on the disk.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvkeep
from kvkeep.engines.transformers import attach, report

TURNS = ("Name three rivers of Europe, and say one thing about each of them.", "Which of them is the longest?")


def main(name: str, directory: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with kvkeep.open(directory, memory="256MiB", disk="1GiB", block_tokens=16) as cache:
        attach(model, cache)
        text = ""
        for turn in TURNS:
            text += f"User: {turn}\nAssistant:"
            inputs = tokenizer(text, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            happened = report(model)
            assert happened is not None
            print(f"{happened.cached_tokens} of {happened.prompt_tokens} tokens were cached")
            text = tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
