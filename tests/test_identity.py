"""Identity: every field counts, nothing can be shifted between fields, the namespace stays secret."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import LayoutError
from kvkeep.identity import ModelIdentity, derive, tenant_of

BASE = ModelIdentity("ab" * 32, "bfloat16")
CHANGES: dict[str, list[Any]] = {
    "weights": ["cd" * 32, "ab" * 31],
    "kv_dtype": ["float16", "float32"],
    "adapters": [("aa",), ("aa", "bb"), ("bb", "aa"), ("aabb",), ("",), ("", "")],
    "rope": ["theta=10000", "theta=1000000"],
    "numerics": ["sliding_window=4096", "theta=10000"],
    # HMAC alone takes the first two for one key, and the last two.
    "lossy": [("uqz",), ("int8", "uqz"), ("int8uqz",), ("aa",)],
    "namespace": [b"tenant a", b"tenant a\0", b"\0", b"L" * 65, hashlib.sha256(b"L" * 65).digest()],
}


def test_every_field_has_a_change_here() -> None:
    """A field added to ModelIdentity without a test would be a field that could be forgotten in the digest."""
    assert CHANGES.keys() == {field.name for field in fields(ModelIdentity)}


def test_each_change_changes_the_digest() -> None:
    variants = [BASE, *(replace(BASE, **{name: value}) for name, values in CHANGES.items() for value in values)]
    assert len({identity.digest for identity in variants}) == len(variants)
    assert all(len(identity.digest) == 32 for identity in variants)


def test_pairs_of_changes_too() -> None:
    single = [(name, value) for name, values in CHANGES.items() for value in values]
    variants = [replace(BASE, **{a: x, b: y}) for (a, x), (b, y) in itertools.combinations(single, 2) if a != b]
    assert len({identity.digest for identity in variants}) == len(variants)


def test_equal_identities_have_equal_digests() -> None:
    assert BASE.digest == ModelIdentity(kv_dtype="bfloat16", weights="ab" * 32).digest
    assert replace(BASE) == BASE
    assert hash(BASE) == hash(replace(BASE))


def test_the_namespace_is_not_shown() -> None:
    secret = b"do not print me"
    identity = replace(BASE, namespace=secret)
    for text in (repr(identity), str(identity), f"{identity}", repr([identity])):
        assert "do not print me" not in text
        assert secret.hex() not in text
    assert secret not in identity.digest


def test_tenants_differ_by_their_secret_and_nothing_else() -> None:
    secrets: list[bytes] = [b"", *CHANGES["namespace"]]
    assert len({tenant_of(secret) for secret in secrets}) == len(secrets)
    assert tenant_of(b"") == b""


def test_weights_are_needed() -> None:
    with pytest.raises(LayoutError, match="digest"):
        ModelIdentity("", "bfloat16")


texts = st.text(alphabet="ab", max_size=3)


@given(first=st.lists(texts, max_size=4), second=st.lists(texts, max_size=4))
def test_parts_cannot_be_shifted(first: list[str], second: list[str]) -> None:
    digests = [derive(b"secret", b"test", (part.encode() for part in parts)) for parts in (first, second)]
    assert (digests[0] == digests[1]) == (first == second)


def test_derive_separates_purposes_and_secrets() -> None:
    made = {derive(s, p, [b"part"]) for s in (b"", b"one", b"two") for p in (b"", b"purpose", b"purpose 2")}
    assert len(made) == 9
    assert derive(b"s", b"p", [b"q"]) != derive(b"s", b"", [b"p", b"q"])
