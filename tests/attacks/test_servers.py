"""Attack: whoever reads a server finds nothing plain on it; its keys are rotated and its tenants cleared by address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner

import kvkeep
from kvkeep import frame
from kvkeep.cli import app
from kvkeep.crypt import Cipher
from kvkeep.stores.url import open_store
from kvkeep.testing.servers import MemcachedServer, RedisServer, S3Server

NEW, OLD = bytes(range(32)), bytes(range(50, 82))
TOKENS = list(range(64))
MARK = b"the values of a very private prompt"
PATIENT = "lookup_timeout=20&load_timeout=20&save_timeout=20"


def layout(namespace: bytes = b"") -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32", namespace=namespace)
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


class Marked:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = (MARK * (len(out) // len(MARK) + 1))[: len(out)]

    def write(self, index: int, payload: memoryview) -> None:
        expected = bytearray(len(payload))
        self.read(index, memoryview(expected))
        assert payload == expected


@pytest.fixture(params=["redis", "memcached", "s3"])
def address(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a real server, with a prefix of this test's own."""
    prefix = f"crypt{abs(hash(request.node.name)) % 10**9}"
    match request.param:
        case "redis":
            redis: RedisServer = request.getfixturevalue("redis_shared")
            return f"{redis.url}?prefix={prefix}&{PATIENT}"
        case "memcached":
            memcached: MemcachedServer = request.getfixturevalue("memcached_shared")
            return f"memcached://127.0.0.1:{memcached.port}?prefix={prefix}&{PATIENT}"
        case _:
            s3: S3Server = request.getfixturevalue("s3_shared")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-of-the-bucket")
            monkeypatch.setenv("AWS_REGION", "us-east-1")
            return f"s3://{S3Server.bucket}/{prefix}?endpoint={s3.endpoint}&{PATIENT}"


def save(address: str, key: bytes | None, namespace: bytes = b"") -> None:
    encryption = None if key is None else lambda: key
    with kvkeep.open(address, memory="4MiB", codec="raw", encryption=encryption) as cache:
        assert cache.bind(layout(namespace)).save(TOKENS, Marked()) == 4
        assert cache.flush(30)


def load(address: str, key: bytes | None, namespace: bytes = b"") -> tuple[int, set[object]]:
    """Blocks that a new process can load, and why no more."""
    encryption = None if key is None else lambda: key
    with kvkeep.open(address, memory="1MiB", encryption=encryption) as cache:
        bound = cache.bind(layout(namespace))
        with bound.lease(bound.match(TOKENS)) as lease:
            found = bound.load(lease, Marked()) // 16
        rows = cache.counters.rows()
        return found, {row["cause"] for row in rows if row["event"] in ("lost", "corrupt")} - {"gone"}


def stored(address: str) -> list[bytes]:
    store = open_store(address)
    values = [store.get(key) for key in kvkeep.block_keys(layout(), TOKENS)]
    store.close()
    return [bytes(value) for value in values if value is not None]


def test_nothing_plain_on_a_server(address: str) -> None:
    save(address, OLD)
    values = stored(address)
    assert len(values) == 4
    for value in values:
        header, _ = frame.parse(value)
        assert header.key_id == Cipher([OLD]).key_ids[0]
        assert MARK not in value
        assert MARK[:12] not in value
    assert load(address, OLD) == (4, set())
    assert load(address, NEW) == (0, {"locked"})
    assert load(address, None) == (0, {"locked"})
    assert len(stored(address)) == 4, "who lacks the key deletes nothing"


def test_a_plain_block_on_a_server_is_not_believed(address: str) -> None:
    save(address, None)
    assert MARK in stored(address)[0]
    assert load(address, None) == (4, set())
    assert load(address, NEW) == (0, {"plain"})


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_keys_are_rotated_and_tenants_cleared_by_address(
    redis_shared: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{redis_shared.url}?prefix=rotated&{PATIENT}"
    monkeypatch.setenv("K_NEW", NEW.hex())
    monkeypatch.setenv("K_OLD", OLD.hex())
    monkeypatch.setenv("T_A", "tenant a")
    save(address, OLD)
    save(address, OLD, b"tenant a")
    keys = ["--encryption", "env:K_NEW", "--encryption", "env:K_OLD", "--namespace", "env:T_A"]
    assert "8 blocks encrypted with the new key" in run("rotate", address, *keys)
    assert load(address, NEW) == load(address, NEW, b"tenant a") == (4, set())
    assert "8 blocks" in run("verify", address, "--encryption", "env:K_NEW", "--namespace", "env:T_A")
    assert "dropped 4 blocks" in run("clear", address, "--namespace", "env:T_A")
    assert load(address, NEW, b"tenant a") == (0, set())
    assert load(address, NEW) == (4, set())


def test_values_on_a_server(redis_shared: RedisServer) -> None:
    address = f"{redis_shared.url}?prefix=values-crypt&{PATIENT}"
    with kvkeep.open(address, memory="4MiB", codec="raw", encryption=lambda: NEW) as cache:
        assert cache.set_value("the name of a patient", "a small private value")
        assert cache.set_value("another name", MARK.decode() * 100)
    dump: Callable[..., list[bytes]] = redis_shared.call
    found = b"".join(
        dump("GET", name) if dump("TYPE", name) in (b"string", "string") else repr(dump("DUMP", name)).encode()
        for name in dump("KEYS", "*values-crypt*")
    )  # fmt: skip
    assert len(found) > 3000
    for text in (b"the name of a patient", b"another name", b"a small private value", MARK):
        assert text not in found
    with kvkeep.open(address, memory="1MiB", encryption=lambda: NEW) as cache:
        assert cache.get_value("the name of a patient") == "a small private value"
        assert cache.get_value("another name") == MARK.decode() * 100
