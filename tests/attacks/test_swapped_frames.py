"""Attack: whoever can write to the disk or to a server moves, cuts, changes and repeats frames. A cache gives back what
was saved under the key that it asked for, or nothing; with encryption, nothing that was not written with its key."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

import kvkeep
from kvkeep import frame
from kvkeep.crypt import Cipher
from kvkeep.keys import BlockKey, block_keys
from kvkeep.stores.base import Store

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
TOKENS, OTHERS = list(range(64)), list(range(100, 164))
PLAIN, ENCRYPTED = None, [lambda: KEY]


def layout(weights: str = "one", namespace: bytes = b"") -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights=weights, kv_dtype="float32", namespace=namespace)
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


class Values:
    """Source and sink of values that depend on all that a key should depend on."""

    def __init__(self, shape: kvkeep.KVLayout, tokens: list[int]) -> None:
        self._seed = shape.fingerprint + repr(tokens).encode()
        self.got = 0

    def read(self, index: int, out: memoryview) -> None:
        out[:] = random.Random(self._seed + bytes([index])).randbytes(len(out))

    def write(self, index: int, payload: memoryview) -> None:
        expected = bytearray(len(payload))
        self.read(index, memoryview(expected))
        assert payload == expected, "a wrong block"
        self.got += 1


class Cache:
    """A cache on disk, and an attacker's hands on it."""

    def __init__(self, path: Path, encryption: object, codec: str = "raw") -> None:
        self.path = path
        self.root = kvkeep.open(path, memory=0, disk="16MiB", encryption=encryption, codec=codec)  # type: ignore[arg-type]

    def save(self, shape: kvkeep.KVLayout, tokens: list[int] = TOKENS) -> list[BlockKey]:
        assert self.root.bind(shape).save(tokens, Values(shape, tokens)) == 4
        assert self.root.flush(10)
        # What waits in memory is not the attacker's.
        for key in block_keys(shape, tokens):
            self.root.store.tiers[0].delete(key)
        return block_keys(shape, tokens)

    def load(self, shape: kvkeep.KVLayout, tokens: list[int] = TOKENS) -> int:
        """Blocks that were given back, which were right."""
        bound = self.root.bind(shape)
        values = Values(shape, tokens)
        with bound.lease(bound.match(tokens)) as lease:
            bound.load(lease, values)
        self.root.flush(10)
        return values.got

    @property
    def medium(self) -> Store:
        return self.root.store.tiers[1].store

    def take(self, key: BlockKey) -> bytes:
        value = self.medium.get(key)
        assert value is not None
        return bytes(value)

    def plant(self, key: BlockKey, value: bytes) -> None:
        self.root.store.tiers[0].delete(key)
        self.medium.delete(key)
        self.medium.put(key, [value])

    def causes(self) -> set[str]:
        rows = self.root.counters.rows()
        return {str(row["cause"]) for row in rows if row["event"] in ("corrupt", "lost")} - {"gone"}


@pytest.fixture(params=[PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "kept", request.param)
    yield made
    made.root.close()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "locked", ENCRYPTED)
    yield made
    made.root.close()


def forged(value: bytes, **fields: bytes) -> bytes:
    """``value`` with other fields in its header and a right seal: xxh3 is no secret."""
    data = bytearray(value)
    for name, field in fields.items():
        at = {"key": 32, "layout": 64, "codec": 96, "key_id": 112, "nonce": 120, "salt": 132, "tenant": 148}[name]
        data[at : at + len(field)] = field
    if data[10] == 0:
        data[176:192] = xxhash.xxh3_128(bytes(data[:176]) + bytes(data[192:])).digest()
    return bytes(data)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the payload": lambda value: value[:1000] + bytes([value[1000] ^ 1]) + value[1001:],
    "a bit of the header": lambda value: value[:33] + bytes([value[33] ^ 1]) + value[34:],
    "a bit of the seal": lambda value: value[:190] + bytes([value[190] ^ 1]) + value[191:],
    "the last bit": lambda value: value[:-1] + bytes([value[-1] ^ 0x80]),
    "cut by one": lambda value: value[:-1],
    "cut to its header": lambda value: value[:192],
    "cut to nothing": lambda value: b"",
    "one byte more": lambda value: value + b"\0",
    "twice": lambda value: value + value,
    "zeros": lambda value: bytes(len(value)),
    "two halves exchanged": lambda value: value[:192] + value[2000:] + value[192:2000],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage(cache: Cache, how: str) -> None:
    keys = cache.save(layout())
    assert cache.load(layout()) == 4
    cache.plant(keys[2], DAMAGE[how](cache.take(keys[2])))
    assert cache.load(layout()) == 2
    assert cache.causes() <= set(frame.CAUSES)
    assert len(cache.causes()) == 1
    assert cache.medium.get(keys[2]) is None, "what is damaged is deleted"


def test_frames_of_other_blocks(cache: Cache) -> None:
    keys, others = cache.save(layout()), cache.save(layout(), OTHERS)
    first, second, other = cache.take(keys[0]), cache.take(keys[1]), cache.take(others[0])
    cache.plant(keys[0], second)
    assert cache.load(layout()) == 0
    cache.plant(keys[0], other)
    assert cache.load(layout()) == 0
    cache.plant(keys[0], first)
    assert cache.load(layout()) == 4
    assert cache.causes() == {"key"}


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (layout(), layout("two")),
        (layout(namespace=b"a"), layout(namespace=b"b")),
        (layout(namespace=b"a"), layout()),
        (layout(), layout(namespace=b"a")),
    ],
    ids=["models", "tenants", "a tenant and nobody", "nobody and a tenant"],
)
def test_frames_of_other_models_and_tenants(cache: Cache, mine: kvkeep.KVLayout, theirs: kvkeep.KVLayout) -> None:
    keys, others = cache.save(mine), cache.save(theirs)
    assert not set(keys) & set(others)
    value = cache.take(others[0])
    cache.plant(keys[0], value)
    assert cache.load(mine) == 0
    cache.plant(keys[0], forged(value, key=keys[0]))
    assert cache.load(mine) == 0
    assert cache.load(theirs) == 4
    assert "key" in cache.causes()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(layout(), layout("two")), (layout(namespace=b"a"), layout(namespace=b"b"))],
    ids=["models", "tenants"],
)
def test_forged_headers_under_encryption(locked: Cache, mine: kvkeep.KVLayout, theirs: kvkeep.KVLayout) -> None:
    """The whole header is authenticated: no field of it can be made to fit another block."""
    keys, others = locked.save(mine), locked.save(theirs)
    right, value = locked.take(keys[0]), locked.take(others[0])
    header, _ = frame.parse(right)
    other, _ = frame.parse(value)
    attempts = [
        forged(value, key=keys[0], layout=mine.fingerprint),
        forged(value, key=keys[0], layout=mine.fingerprint, tenant=header.tenant or bytes(16)),
        forged(value, key=keys[0], layout=mine.fingerprint, nonce=header.nonce, salt=header.salt),
        right[:192] + value[192:],
        value[:192] + right[192:],
        forged(right, nonce=other.nonce),
        forged(right, salt=other.salt[:15] + b"\1"),
        forged(right, codec=b"lossless".ljust(16, b"\0")),
        forged(right, tenant=b"somebody else!!!"),
        right[:-16] + value[-16:],
    ]
    for attempt in attempts:
        assert attempt != right
        locked.plant(keys[0], attempt)
        assert locked.load(mine) == 0
    assert locked.causes() <= {"checksum", "key"}
    locked.plant(keys[0], right)
    assert locked.load(mine) == 4


def test_blocks_of_the_attackers_own_making(locked: Cache, tmp_path: Path) -> None:
    """Right in all but the key: unencrypted, sealed, of these tokens; and encrypted with another key."""
    keys = locked.save(layout())
    for encryption, cause in ((None, "plain"), ([lambda: OTHER], "locked")):
        theirs = Cache(tmp_path / f"their {cause}", encryption)
        theirs.save(layout())
        locked.plant(keys[0], theirs.take(keys[0]))
        theirs.root.close()
        assert locked.load(layout()) == 0
        assert cause in locked.causes()


def test_an_old_frame_again(cache: Cache) -> None:
    """Blocks are named by what they hold: an old frame of a key is a right one, whenever it comes back."""
    keys = cache.save(layout())
    old = [cache.take(key) for key in keys]
    for key in keys:
        cache.medium.delete(key)
    assert cache.load(layout()) == 0
    for key, value in zip(keys, old, strict=True):
        cache.plant(key, value)
    assert cache.load(layout()) == 4


def test_an_old_frame_under_a_key_that_is_no_longer_given(tmp_path: Path) -> None:
    before = Cache(tmp_path / "kept", ENCRYPTED)
    keys = before.save(layout())
    old = before.take(keys[0])
    before.root.close()
    after = Cache(tmp_path / "other", [lambda: OTHER])
    after.save(layout())
    after.plant(keys[0], old)
    assert after.load(layout()) == 0
    assert after.causes() == {"locked"}
    after.root.close()


def test_a_bomb_behind_a_right_tag(tmp_path: Path) -> None:
    """Who has the key may still have a bug: what was decrypted is decoded with the same suspicion."""
    zstandard = pytest.importorskip("zstandard")
    made = Cache(tmp_path / "kept", ENCRYPTED, codec="lossless")
    shape = layout()
    keys = made.save(shape)
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(64 << 20))
    room = memoryview(bytearray(len(bomb) + 8 + frame.TAG_NBYTES))
    payload = len(bomb).to_bytes(4, "little") + bytes(4) + bomb
    made.plant(keys[0], Cipher([KEY]).encrypt(keys[0], shape, "lossless", payload, room) + bytes(room))
    assert made.load(shape) == 0
    assert made.causes() == {"codec"}
    made.root.close()


def test_a_tenant_cannot_guess_what_another_keeps(tmp_path: Path) -> None:
    """The keys of equal prompts differ in every byte, so neither a lookup nor a look at the index tells."""
    for encryption in (PLAIN, ENCRYPTED):
        made = Cache(tmp_path / str(bool(encryption)), encryption)
        secret = layout(namespace=b"a long and random secret of tenant a")
        keys = made.save(secret)
        for guess in (b"", b"tenant b's own secret", b"a long and random secret of tenant "):
            tried = layout(namespace=guess)
            assert made.root.bind(tried).match(TOKENS).num_blocks == 0
            assert not set(block_keys(tried, TOKENS)) & set(keys)
            assert tried.fingerprint != secret.fingerprint
            assert tried.identity.tenant != secret.identity.tenant
        made.root.close()
        for file in (tmp_path / str(bool(encryption))).iterdir():
            assert b"secret of tenant" not in file.read_bytes()
