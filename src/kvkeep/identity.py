"""What shapes the values of a KV cache.

Two equal identities produce interchangeable KV; anything that could change a value belongs in here. Names and paths
stand in for nothing: weights and adapters come in as digests of their bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvkeep.errors import LayoutError


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """All that shapes KV values, the tenant included.

    ``weights``: hex digest over the weights' bytes and the model's config.
    ``adapters``: hex digest of each LoRA's bytes and scale, in the order applied.
    ``rope``: the rope parameters as used, scaling included.
    ``kv_dtype``: of the values handed over (``"bfloat16"``…), which can differ from the weights'.
    ``numerics``: whatever else changes values: sliding window, quantization of the weights, attention variant.
    ``namespace``: the tenant's secret. It keys an HMAC and is never stored, printed or sent.
    ``lossy``: the codecs that the values may have been through since. A cache knows, and says so when it is bound.
    """

    weights: str
    kv_dtype: str
    adapters: tuple[str, ...] = ()
    rope: str = ""
    numerics: str = ""
    namespace: bytes = field(default=b"", repr=False)
    lossy: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            raise LayoutError("ModelIdentity.weights is empty: give a digest of the weights' bytes, not a name")

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for this identity; without the namespace's secret nobody can compute them."""
        fields = (self.weights, self.kv_dtype, self.rope, self.numerics, *self.adapters)
        exact = derive(key_of(self.namespace), b"kvkeep identity 1", (text.encode() for text in fields))
        return derive(exact, b"kvkeep lossy 1", (name.encode() for name in self.lossy)) if self.lossy else exact

    @property
    def tenant(self) -> bytes:
        """16 bytes that mark a tenant's blocks, for quotas and clearing; empty without a namespace."""
        return tenant_of(self.namespace)


def tenant_of(namespace: bytes) -> bytes:
    """What marks the blocks of ``namespace``: see :attr:`ModelIdentity.tenant`."""
    return derive(key_of(namespace), b"kvkeep tenant 1", ())[:16] if namespace else b""


def key_of(namespace: bytes) -> bytes:
    """A tenant's secret as a key of :func:`derive`: 32 bytes, or none without a namespace. HMAC itself fills short keys
    up with zeros and hashes long ones, so that some secrets would be one tenant."""
    return hashlib.sha256(namespace).digest() if namespace else b""


def derive(key: bytes, purpose: bytes, parts: Iterable[bytes]) -> bytes:
    """HMAC-SHA-256 of length-prefixed ``parts`` under ``key``, 32 bytes or none, separated by ``purpose``.

    Lengths are part of the message, so ("ab", "c") and ("a", "bc") differ.
    """
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in (purpose, *parts):
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()
