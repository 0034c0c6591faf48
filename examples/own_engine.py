"""kvkeep with an engine of your own: here a NumPy array stands for its KV cache."""

from __future__ import annotations

import sys
import tempfile

import numpy as np

import kvkeep

TOKENS = list(range(1000))


class Engine:
    """Keeps KV as ``[blocks, bytes]``; a real one would spread each block's layers over its own tensors."""

    def __init__(self, layout: kvkeep.KVLayout) -> None:
        self.kv = np.zeros((len(TOKENS) // layout.block_tokens, layout.block_nbytes), dtype=np.uint8)

    def read(self, index: int, out: memoryview) -> None:
        """KVSource: fill ``out`` with block ``index``."""
        out[:] = self.kv[index].data

    def write(self, index: int, payload: memoryview) -> None:
        """KVSink: take block ``index``; the view is dead afterwards, so copy."""
        self.kv[index] = np.frombuffer(payload, dtype=np.uint8)


def main(directory: str) -> None:
    identity = kvkeep.ModelIdentity(weights="a digest of your weights' bytes", kv_dtype="float16")
    layout = kvkeep.KVLayout.uniform(identity, num_layers=4, num_kv_heads=2, head_dim=64, dtype="float16")

    engine = Engine(layout)
    engine.kv[:] = np.random.default_rng(0).integers(0, 256, engine.kv.shape, dtype=np.uint8)
    with kvkeep.open(directory, memory="64MiB", disk="256MiB") as cache:
        print("blocks kept:", cache.bind(layout, description="example").save(TOKENS, engine))

    again = Engine(layout)  # another process, later
    with kvkeep.open(directory, memory="64MiB", disk="256MiB") as cache:
        bound = cache.bind(layout)
        with bound.lease(bound.match(TOKENS)) as lease:
            print("tokens loaded:", bound.load(lease, again))
    print("bit for bit:", np.array_equal(engine.kv, again.kv))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
