"""Keys: what they depend on, that they grow as they are computed at once, and that every machine computes the same."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity
from kvkeep.keys import KEY_NBYTES, BlockKey, KeyChain, block_keys, root_key, token_bytes
from kvkeep.layout import KVLayout

GOLDEN = Path(__file__).parent / "golden" / "keys.json"


def layout(block_tokens: int = 4, num_shards: int = 1, weights: str = "ab" * 32) -> KVLayout:
    return KVLayout.uniform(
        ModelIdentity(weights, "bfloat16"),
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="bfloat16",
        block_tokens=block_tokens,
        num_shards=num_shards,
    )


# What a case of the golden file means, from hashlib alone: runs on any Python, knows nothing of kvkeep.
DERIVATION = """
import hashlib, hmac, json, sys

def derive(secret, purpose, parts):
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in [purpose] + list(parts):
        mac.update(len(part).to_bytes(8, "little") + part)
    return mac.digest()

def keys(case):
    i, l = case["identity"], case["layout"]
    fields = [i["weights"], i["kv_dtype"], i["rope"], i["numerics"]] + i["adapters"]
    namespace = bytes.fromhex(i["namespace"])
    tenant = hashlib.sha256(namespace).digest() if namespace else b""
    identity = derive(tenant, b"kvkeep identity 1", [f.encode() for f in fields])
    head = "%s %d %d" % (l["dtype"], l["block_tokens"], l["num_shards"])
    shape = [",".join(map(str, g)).encode() for g in l["groups"]]
    fingerprint = derive(b"", b"kvkeep layout 1", [identity, head.encode()] + shape)
    tip = derive(fingerprint, b"kvkeep root 1", [case["shard"].to_bytes(4, "little")])
    width, out = l["block_tokens"], []
    for start in range(0, len(case["tokens"]) // width * width, width):
        message = tip + b"".join(t.to_bytes(4, "little") for t in case["tokens"][start:start + width])
        for position, digest in sorted((p, bytes.fromhex(d)) for p, d in case["extra"]):
            if start <= position < start + width:
                message += position.to_bytes(8, "little") + len(digest).to_bytes(4, "little") + digest
        tip = hashlib.sha256(message).digest()
        out.append(tip.hex())
    return out

for case in json.load(open(sys.argv[1])):
    assert keys(case) == case["keys"], case["name"]
print("equal")
"""

# The same through kvkeep, for a process of its own.
THROUGH_KVKEEP = """
import json, sys
from test_keys import golden_keys
for case in json.load(open(sys.argv[1])):
    assert golden_keys(case) == case["keys"], case["name"]
print("equal")
"""


def golden_keys(case: dict[str, Any]) -> list[str]:
    """The keys that kvkeep computes for a case of the golden file."""
    from kvkeep.layout import LayerGroup

    fields = {**case["identity"]}
    fields["adapters"] = tuple(fields["adapters"])
    fields["namespace"] = bytes.fromhex(fields["namespace"])
    shape = {**case["layout"], "groups": tuple(LayerGroup(*group) for group in case["layout"]["groups"])}
    extra = [(position, bytes.fromhex(digest)) for position, digest in case["extra"]]
    keys = block_keys(KVLayout(ModelIdentity(**fields), **shape), case["tokens"], extra=extra, shard=case["shard"])
    return [key.hex() for key in keys]


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden(case: dict[str, Any]) -> None:
    """A failure means that every stored block is lost: if that is meant, raise the numbers in the purposes."""
    assert golden_keys(case) == case["keys"]


@pytest.mark.parametrize("seed", ["0", "1", "4294967295", "random"])
def test_no_process_seed(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", THROUGH_KVKEEP, str(GOLDEN)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "equal\n"


def pythons() -> list[str]:
    """This interpreter and every other that pyenv has here (≥ 3.11)."""
    found = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    others = [str(path) for path in found if int(path.parts[-3].split(".")[1]) >= 11]
    return [sys.executable, *others]


@pytest.mark.parametrize("python", pythons())
def test_derivation_from_hashlib_alone(python: str) -> None:
    """The documented construction and nothing else gives the golden keys, whatever the Python."""
    command = [python, "-I", "-c", DERIVATION.replace("json.load(open(sys.argv[1]))", "json.load(sys.stdin)")]
    done = subprocess.run(command, input=GOLDEN.read_text(), capture_output=True, text=True, check=True)
    assert done.stdout == "equal\n"


def test_full_blocks_only() -> None:
    for count, blocks in ((0, 0), (3, 0), (4, 1), (7, 1), (8, 2)):
        assert len(block_keys(layout(), range(count))) == blocks
    assert all(len(key) == KEY_NBYTES for key in block_keys(layout(), range(8)))


def test_a_key_depends_on_every_token_before_it() -> None:
    tokens = list(range(16))
    right = block_keys(layout(), tokens)
    for position in range(16):
        changed = [*tokens]
        changed[position] += 1000
        keys = block_keys(layout(), changed)
        first = position // 4
        assert keys[:first] == right[:first]
        assert not set(keys[first:]) & set(right)


def test_a_key_depends_on_layout_and_shard() -> None:
    tokens = range(8)
    variants = [
        block_keys(layout(), tokens),
        block_keys(layout(weights="cd" * 32), tokens),
        block_keys(layout(block_tokens=8), tokens),
        block_keys(layout(num_shards=2), tokens),
        block_keys(layout(num_shards=2), tokens, shard=1),
    ]
    keys = [key for variant in variants for key in variant]
    assert len(set(keys)) == len(keys)
    for shard in (-1, 2):
        with pytest.raises(LayoutError):
            root_key(layout(num_shards=2), shard)


def test_equal_tokens_in_any_form() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 0xFFFFFFFF]
    right = block_keys(layout(), tokens)
    for dtype in ("<u4", ">u4", "<i8", ">i8", "u8"):
        assert block_keys(layout(), np.array(tokens, dtype)) == right
    assert block_keys(layout(), tuple(tokens)) == right
    assert block_keys(layout(), np.array([tokens, tokens], "i8").T[:, 0]) == right, "a strided view"


@pytest.mark.parametrize(
    "tokens",
    [[-1, 2], [1 << 32], [1 << 70], [1.0, 2.0], [True, False], ["a"], [[1, 2]], [None], np.array(5), b"ab"],
    ids=repr,
)
def test_what_is_no_token_is_refused(tokens: Any) -> None:
    with pytest.raises(LayoutError):
        block_keys(layout(), tokens)


def test_token_bytes() -> None:
    assert token_bytes([1, 0x01020304, 0xFFFFFFFF]) == bytes.fromhex("01000000 04030201 ffffffff")
    assert token_bytes([]) == b""


EXTRAS = st.lists(st.tuples(st.integers(0, 39), st.binary(max_size=4)), max_size=4)


@given(tokens=st.lists(st.integers(0, 3), min_size=40, max_size=40), cuts=st.sets(st.integers(0, 40)), extra=EXTRAS)
def test_growing_equals_at_once(tokens: list[int], cuts: set[int], extra: list[tuple[int, bytes]]) -> None:
    chain = KeyChain(layout())
    new: list[BlockKey] = []
    edges = sorted({0, 40, *cuts})
    for start, end in itertools.pairwise(edges):
        new += chain.extend(tokens[start:end], extra=[item for item in extra if start <= item[0] < end])
    assert new == chain.keys == block_keys(layout(), tokens, extra=extra)
    assert chain.num_tokens == 40


@given(first=EXTRAS, second=EXTRAS)
def test_different_extras_give_different_keys(first: list[tuple[int, bytes]], second: list[tuple[int, bytes]]) -> None:
    """Positions and lengths are hashed with the digests, so no two lists of extras can be mistaken for each other."""
    tokens = [7] * 40
    same = sorted(first) == sorted(second)
    keys, others = (block_keys(layout(), tokens, extra=extra) for extra in (first, second))
    assert (keys == others) == same
    differ = (Counter(first) - Counter(second)) + (Counter(second) - Counter(first))
    before = min((position for position, _ in differ), default=40) // 4
    assert keys[:before] == others[:before]


def test_extras_cannot_pose_as_tokens() -> None:
    suffix = (1).to_bytes(8, "little") + (4).to_bytes(4, "little") + b"abcd"
    tokens = [1, 2, 3, 4]
    longer = np.frombuffer(token_bytes(tokens) + suffix, "<u4")
    with_extra = block_keys(layout(4), tokens, extra=[(1, b"abcd")])
    assert with_extra != block_keys(layout(8), [*longer.tolist(), 0][:8])
    assert with_extra != block_keys(layout(4), longer)[:1]
    assert block_keys(layout(), tokens, extra=[(1, b"ab"), (1, b"cd")]) != with_extra
    assert block_keys(layout(), tokens, extra=[(1, b"")]) != block_keys(layout(), tokens)


def test_extras_belong_to_a_token_that_was_given() -> None:
    for position in (-1, 8, 100):
        with pytest.raises(LayoutError):
            block_keys(layout(), range(8), extra=[(position, b"image")])
    chain = KeyChain(layout())
    chain.extend(range(8))
    with pytest.raises(LayoutError, match="8"):
        chain.extend([8, 9], extra=[(7, b"too late: block 1 is hashed")])


def test_a_refused_extend_leaves_the_chain_as_it_was() -> None:
    chain = KeyChain(layout())
    chain.extend([1, 2])
    for tokens, extra in (([-1], []), ([3], [(9, b"x")]), ([3, 4, 5], [(-1, b"x")])):
        with pytest.raises(LayoutError):
            chain.extend(tokens, extra=extra)
    chain.extend([3, 4])
    assert chain.keys == block_keys(layout(), [1, 2, 3, 4])
    assert chain.num_tokens == 4


def test_100_000_tokens_in_10_ms() -> None:
    """The goal is 10 ms; the bound leaves room for a busy machine. (bench/ has the figure.)"""
    shape, tokens = layout(16), np.arange(100_000)
    best = min(_seconds(shape, tokens) for _ in range(5))
    assert best < 0.05


def _seconds(shape: KVLayout, tokens: Any) -> float:
    begin = time.perf_counter()
    block_keys(shape, tokens)
    return time.perf_counter() - begin


def test_the_chain_is_sha256() -> None:
    """One block by hand, so that the golden file itself has a witness."""
    shape = layout()
    root = hmac.new(shape.fingerprint, digestmod=hashlib.sha256)
    for part in (b"kvkeep root 1", bytes(4)):
        root.update(len(part).to_bytes(8, "little") + part)
    assert root_key(shape) == root.digest()
    assert block_keys(shape, [1, 2, 3, 4]) == [hashlib.sha256(root.digest() + token_bytes([1, 2, 3, 4])).digest()]
