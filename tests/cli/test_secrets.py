"""rotate, verify, clear and stats on encrypted caches and those of tenants."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import kvkeep
from kvkeep import frame
from kvkeep.cli import app
from kvkeep.crypt import Cipher
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.slabs import Slab

from .conftest import TOKENS, Pattern

_numbers = itertools.count()
NEW, OLD = bytes(range(32)), bytes(range(50, 82))


def layout(weights: str, namespace: bytes = b"") -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights=weights, kv_dtype="float32", namespace=namespace)
    return kvkeep.KVLayout.uniform(identity, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def fill(path: Path, key: bytes | None, namespace: bytes, tokens: list[int] = TOKENS) -> None:
    """Four blocks."""
    with kvkeep.open(
        path,
        memory="4MiB",
        disk="16MiB",
        codec="raw",
        encryption=None if key is None else lambda: key,
        namespace=namespace,
    ) as cache:
        assert cache.bind(layout("one", namespace), description="model one").save(tokens, Pattern()) == 4
        assert cache.flush(10)


def cached(path: Path, namespace: bytes, *keys: bytes, tokens: list[int] = TOKENS) -> int:
    """Blocks that a cache with ``keys`` can load, checked."""

    class Sink:
        def write(self, index: int, payload: memoryview) -> None:
            assert payload == bytes([index + 1]) * len(payload)

    with kvkeep.open(path, memory=0, disk="16MiB", encryption=[lambda key=key: key for key in keys] or None) as cache:
        bound = cache.bind(layout("one", namespace))
        with bound.lease(bound.match(tokens)) as lease:
            return bound.load(lease, Sink()) // 16


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Encrypted with OLD: four blocks of nobody, of tenants a and b."""
    monkeypatch.setenv("K_NEW", NEW.hex())
    monkeypatch.setenv("K_OLD", OLD.hex())
    monkeypatch.setenv("T_A", "tenant a")
    (tmp_path / "b").write_bytes(b"tenant b\n")
    (tmp_path / "b").chmod(0o600)
    for namespace in (b"", b"tenant a", b"tenant b"):
        fill(tmp_path / "kept", OLD, namespace)
    return tmp_path / "kept"


def both(tmp_path: Path) -> list[str]:
    return ["--namespace", "env:T_A", "--namespace", f"file:{tmp_path / 'b'}"]


KEYS = ["--encryption", "env:K_NEW", "--encryption", "env:K_OLD"]


def test_rotate(path: Path, tmp_path: Path) -> None:
    with_ages = DiskStore(path, capacity=0, read_only=True)
    before = with_ages.stamps()
    with_ages.close()
    time.sleep(0.02)
    result = run("rotate", path, *KEYS, *both(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "place": str(path), "rotated": 12, "current": 0, "names": {"rotated": 0, "current": 0}, "left": {},
    }  # fmt: skip
    for namespace in (b"", b"tenant a", b"tenant b"):
        assert cached(path, namespace, NEW) == 4
        assert cached(path, namespace, OLD) == 0
    store = DiskStore(path, capacity=0, read_only=True)
    assert store.stamps() == before, "blocks keep their age"
    store.close()
    again = run("rotate", path, *KEYS, *both(tmp_path))
    assert again.exit_code == 0
    assert "0 blocks encrypted with the new key, 12 were already" in again.stdout


def test_rotate_may_be_killed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever that is, all blocks are there, under the old key or the new one."""
    seen: list[int] = []
    append = Slab.append_log

    def watched(slab: Slab, *arguments: Any) -> None:
        append(slab, *arguments)
        store = DiskStore(path, capacity=0, read_only=True)
        seen.append(len(list(store.items())))
        store.close()

    monkeypatch.setattr(Slab, "append_log", watched)
    assert run("rotate", path, *KEYS, *both(tmp_path)).exit_code == 0
    assert len(seen) >= 12
    assert set(seen) == {12}


def test_rotate_leaves_what_it_cannot_open(path: Path) -> None:
    result = run("rotate", path, *KEYS)
    assert result.exit_code == 1
    assert "4 blocks encrypted with the new key" in result.stdout
    assert "8 left: encrypted, and their key or namespace was not given" in result.stdout
    assert cached(path, b"", NEW) == 4
    assert cached(path, b"tenant a", OLD) == 4
    result = run("rotate", path, "--encryption", "env:K_OLD", "--json")  # without the key that is now in use
    assert json.loads(result.stdout)["current"] == 8
    assert json.loads(result.stdout)["left"] == {"locked": 4}
    assert cached(path, b"", NEW) == 4


def test_rotate_encrypts_a_plain_cache_only_if_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K_NEW", NEW.hex())
    fill(tmp_path / "kept", None, b"")
    result = run("rotate", tmp_path / "kept", "--encryption", "env:K_NEW")
    assert result.exit_code == 1
    assert "4 left: not encrypted; --plain" in result.stdout
    result = run("rotate", tmp_path / "kept", "--encryption", "env:K_NEW", "--plain")
    assert result.exit_code == 0, result.output
    assert cached(tmp_path / "kept", b"", NEW) == 4
    data = b"".join(file.read_bytes() for file in (tmp_path / "kept").glob("slab-*.data"))
    assert data.count(frame.MAGIC) == 4
    assert b"model one" not in (tmp_path / "kept" / "models.json").read_bytes()


def test_rotate_keeps_the_names_of_models(path: Path, tmp_path: Path) -> None:
    assert run("rotate", path, *KEYS, *both(tmp_path)).exit_code == 0
    assert "model one" in run("stats", path, "--encryption", "env:K_NEW").stdout
    assert "model one" not in run("stats", path, "--encryption", "env:K_OLD").stdout


def test_rotate_leaves_what_another_process_holds(path: Path, tmp_path: Path) -> None:
    with kvkeep.open(path, memory="4MiB", disk="16MiB", encryption=lambda: OLD):
        result = run("rotate", path, *KEYS, *both(tmp_path))
        assert result.exit_code == 1
        assert "12 left: held by a running process; stop it, then repeat" in result.stdout
    assert cached(path, b"", OLD) == 4


def test_rotate_without_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("rotate", path).exit_code == 2
    monkeypatch.delenv("K_OLD")
    result = run("rotate", path, *KEYS)
    assert result.exit_code == 2
    assert "'K_OLD' is not set" in result.stderr
    result = run("rotate", path, "--encryption", NEW.hex())
    assert result.exit_code == 2
    assert NEW.hex() not in result.output
    assert cached(path, b"", OLD) == 4


def test_keys_come_from_the_configuration(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kvkeep.toml"
    file.write_text(f'dir = "{path}"\nencryption = ["env:K_NEW", "env:K_OLD"]\n')
    monkeypatch.setenv("KVKEEP_CONFIG", str(file))
    assert run("rotate", *both(tmp_path)).exit_code == 0
    assert "model one" in run("stats").stdout


def test_verify_needs_the_key(path: Path, tmp_path: Path) -> None:
    facts = json.loads(run("verify", path, "--json").stdout)
    assert (facts["damaged"], facts["locked"]) == (0, 12)
    facts = json.loads(run("verify", path, "--encryption", "env:K_OLD", "--json").stdout)
    assert (facts["damaged"], facts["locked"]) == (0, 8)
    arguments = ["--encryption", "env:K_OLD", *both(tmp_path), "--json"]
    assert json.loads(run("verify", path, *arguments).stdout)["locked"] == 0
    flipped = 0
    for file in path.glob("slab-*.data"):
        data = bytearray(file.read_bytes())
        at = data.find(frame.MAGIC)
        if at >= 0:
            data[at + 1000] ^= 1
            file.write_bytes(data)
            flipped += 1
    assert flipped
    result = run("verify", path, *arguments)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["causes"] == {"checksum": flipped}
    assert json.loads(run("verify", path, *arguments, "--fix").stdout)["dropped"] == flipped
    fill(path, None, b"", tokens=list(range(500, 564)))
    assert json.loads(run("verify", path, *arguments).stdout)["causes"] == {"plain": 4}


def test_clear_a_tenant(path: Path, tmp_path: Path) -> None:
    """No key is needed: whose a block is stands in its header, for who has the namespace's secret."""
    result = run("clear", path, "--namespace", "env:T_A")
    assert result.exit_code == 0, result.output
    assert "dropped 4 blocks" in result.stdout
    assert [cached(path, name, OLD) for name in (b"", b"tenant a", b"tenant b")] == [4, 0, 4]
    assert "dropped 0 blocks" in run("clear", path, "--namespace", "env:K_OLD").stdout
    assert "dropped 4 blocks" in run("clear", path, "--namespace", f"file:{tmp_path / 'b'}").stdout
    assert cached(path, b"", OLD) == 4


def test_clear_a_tenant_of_a_plain_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_A", "tenant a")
    fill(tmp_path / "kept", None, b"tenant a")
    fill(tmp_path / "kept", None, b"")
    assert "dropped 4 blocks" in run("clear", tmp_path / "kept", "--namespace", "env:T_A").stdout
    assert cached(tmp_path / "kept", b"") == 4


# Values, whose names and small bytes stand in an index


@pytest.fixture(params=["directory", "redis", "memcached"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for variable, secret in (("K_NEW", NEW), ("K_OLD", OLD)):
        monkeypatch.setenv(variable, secret.hex())
    monkeypatch.setenv("T_A", "tenant a")
    patient = f"?lookup_timeout=20&load_timeout=20&prefix=secrets{next(_numbers)}"
    if request.param == "redis":
        return str(request.getfixturevalue("redis_shared").url) + patient
    if request.param == "memcached":
        return f"memcached://{request.getfixturevalue('memcached_shared').where}{patient}"
    return str(tmp_path)


def values(place: str, namespace: bytes, *keys: bytes) -> kvkeep.KVCache:
    sources = [lambda key=key: key for key in keys] or None
    return kvkeep.open(place, memory="4MiB", disk="16MiB", encryption=sources, namespace=namespace)


def set_values(place: str, *keys: bytes) -> None:
    for namespace in (b"", b"tenant a", b"tenant b"):
        with values(place, namespace, *keys) as cache:
            assert cache.set_value("small", "a secret", tags=["tag"])
            assert cache.set_value("large", "a secret" * 100, ttl=1000)


def seen(place: str, namespace: bytes, *keys: bytes) -> int:
    with values(place, namespace, *keys) as cache:
        assert cache.get_value("large") in (None, "a secret" * 100)
        return sum(value is not None for value in cache.get_values(["small", "large"]))


def test_rotate_values(place: str) -> None:
    set_values(place, OLD)
    keys = ("--encryption", "env:K_NEW", "--encryption", "env:K_OLD")
    result = run("rotate", place, *keys, "--namespace", "env:T_A")
    assert result.exit_code == 1, "tenant b's are left"
    assert "4 names of values encrypted" in result.stdout
    assert [seen(place, name, NEW) for name in (b"", b"tenant a", b"tenant b")] == [2, 2, 0]
    assert seen(place, b"tenant b", NEW, OLD) == 2
    again = run("rotate", place, *keys, "--namespace", "env:T_A", "--json")
    assert json.loads(again.stdout)["names"] == {"rotated": 0, "current": 4}
    with values(place, b"tenant a", NEW) as cache:
        assert cache.invalidate("tag")
        assert cache.get_values(["small", "large"]) == [None, "a secret" * 100]


def test_values_under_another_key_are_a_miss_with_a_cause(place: str, caplog: pytest.LogCaptureFixture) -> None:
    set_values(place, OLD)
    for keys in ((), (NEW,)):
        caplog.clear()
        with values(place, b"tenant a", *keys) as cache:
            assert cache.get_values(["small", "large"]) == [None, None]
            assert cache.counters.count("lost", tier="index", cause="locked") == 2
            assert cache.counters.count("value_miss", cause="locked") == 2
        (said,) = [record.getMessage() for record in caplog.records if "not given" in record.getMessage()]
        assert Cipher([OLD]).key_ids[0].hex() in said
    assert seen(place, b"tenant a", OLD) == 2


def test_stats_of_a_server_and_its_ages(place: str) -> None:
    set_values(place)
    facts = json.loads(run("stats", place, "--json").stdout)
    assert facts["blocks"] == 3
    said = run("stats", place)
    assert said.exit_code == 0
    assert "3 blocks" in said.stdout
    if "://" in place:
        assert "?ttl" in run("clear", place, "--older-than", "7d").stderr, "it would drop what is new"
        assert json.loads(run("stats", place, "--json").stdout)["blocks"] == 3
    said = run("stats", "redis://somebody:hunter2@127.0.0.1:1/0")
    assert said.exit_code == 2
    assert "hunter2" not in said.output


def test_rotate_plain_values(place: str) -> None:
    set_values(place)
    keys = ("--encryption", "env:K_NEW", "--namespace", "env:T_A")
    assert "not encrypted" in run("rotate", place, *keys).stdout
    assert [seen(place, name, NEW) for name in (b"", b"tenant a")] == [0, 0]
    run("rotate", place, *keys, "--plain")
    assert [seen(place, name, NEW) for name in (b"", b"tenant a")] == [2, 2]


@pytest.mark.parametrize("keys", [(), (OLD,)])
def test_clear_a_tenants_values(place: str, keys: tuple[bytes, ...]) -> None:
    set_values(place, *keys)
    if keys:
        result = run("clear", place, "--namespace", "env:T_A")
        assert result.exit_code == 1
        assert "6 names of values left" in result.stdout
    result = run("clear", place, "--namespace", "env:T_A", *(["--encryption", "env:K_OLD"] if keys else []))
    assert result.exit_code == 0, result.output
    assert "2 names of values" in result.stdout
    assert [seen(place, name, *keys) for name in (b"", b"tenant a", b"tenant b")] == [2, 0, 2]
    assert run("clear", place, "--all").exit_code == 0
    assert [seen(place, name, *keys) for name in (b"", b"tenant a", b"tenant b")] == [0, 0, 0]


def test_clear_says_which_secret_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_EMPTY", "")
    for source, said in (("env:T_NONE", "'T_NONE' is not set"), ("env:T_EMPTY", "is empty"), ("tenant a", "env:NAME")):
        result = run("clear", path, "--namespace", source)
        assert result.exit_code == 2
        assert said in result.stderr
        assert "tenant a" not in result.output


def test_a_key_id_is_no_key() -> None:
    assert Cipher([NEW]).key_ids[0] not in NEW
