"""Users and passwords come from addresses, the environment or files, and appear in no log, repr, error or metric."""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvkeep
from kvkeep import config
from kvkeep.cli import app
from kvkeep.errors import ConfigError, KVKeepError
from kvkeep.stores import url
from kvkeep.testing.servers import S3Server, redis_server

USER, PASSWORD = "user-6f1d", "p4ss/w0rd:with@all?of#it"
ENCODED = "p4ss%2Fw0rd%3Awith%40all%3Fof%23it"
SECRETS = (USER, PASSWORD, ENCODED, "p4ss", "w0rd", "all?of")
PATIENT = "lookup_timeout=5&connect_timeout=10"
TOKENS = list(range(64))


def layout() -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32", namespace=b"namespace-93ab")
    return kvkeep.KVLayout.uniform(identity, num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_tokens=16)


class Ones:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = b"\1" * len(out)

    def write(self, index: int, payload: memoryview) -> None:
        assert payload == b"\1" * len(payload)


class Said:
    """All that a program could print, log or send of a cache, gathered."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    def add(self, *things: object) -> None:
        for thing in things:
            self.text.write(f"{thing!s} {thing!r}\n")

    def attempt(self, work: Callable[[], object]) -> None:
        """What ``work`` says, above all when it fails: the whole traceback, causes included."""
        try:
            self.add(work())
        except KVKeepError as error:
            self.add(error)
            self.text.write("".join(traceback.format_exception(error)))
            cause: BaseException | None = error
            while cause is not None:
                self.add(*cause.args)
                cause = cause.__cause__ or cause.__context__

    def check(self, *more: str) -> None:
        text = self.text.getvalue()
        assert text
        for word in (*SECRETS, *more):
            assert word not in text, f"{word!r} was said"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Said]:
    with caplog.at_level(logging.DEBUG):
        made = Said()
        yield made
        made.add(caplog.text, *(record.__dict__ for record in caplog.records))
    made.check()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """``host:port`` of a real server that lets only USER in."""
    with redis_server(*f"--user default off --user {USER} on >{PASSWORD} ~* +@all".split()) as running:
        yield f"{running.host}:{running.port}"


def use(said: Said, cache: kvkeep.KVCache) -> int:
    """Save, load and look at a cache in every way; how many tokens were found."""
    bound = cache.bind(layout())
    bound.save(TOKENS, Ones())
    cache.flush(10)
    match = bound.match(TOKENS)
    with bound.lease(match) as lease:
        found = bound.load(lease, Ones())
    said.add(cache, bound, cache.store, bound.stats(), match, bound.layout, *cache.counters.rows())
    for tier in cache.store.tiers:
        said.add(tier, tier.store, tier.usage)
        said.attempt(lambda store=tier.store: list(store.items()))
        said.attempt(lambda store=tier.store: store.ping())
    return found


def test_the_right_password(said: Said, server: str) -> None:
    address = f"redis://{USER}:{ENCODED}@{server}/0?{PATIENT}"
    with kvkeep.open(address, memory="1MiB", namespace=b"namespace-93ab") as cache:
        assert use(said, cache) == 64
        assert cache.store.tiers[1].store.contains(kvkeep.block_keys(layout(), TOKENS)[0])
    said.check("namespace-93ab")


@pytest.mark.parametrize(
    "address",
    [
        f"redis://{USER}:{ENCODED}wrong@SERVER/0",
        f"redis://{USER}:{ENCODED}@127.0.0.1:1/0",
        f"redis://{USER}:{ENCODED}@no-such-host.invalid:6379/0",
        f"rediss://{USER}:{ENCODED}@SERVER/0",
        f"redis+cluster://{USER}:{ENCODED}@SERVER/0",
        f"redis+sentinel://{USER}:{ENCODED}@SERVER/master?sentinel_password={ENCODED}",
    ],
)
def test_a_server_that_does_not_let_us_in(said: Said, server: str, address: str) -> None:
    with kvkeep.open(address.replace("SERVER", server), memory="1MiB") as cache:
        assert use(said, cache) == 64, "from memory"
        assert not cache.store.tiers[1].contains_many(kvkeep.block_keys(layout(), TOKENS))[0]


@pytest.mark.parametrize("there", [True, False], ids=["lets us in", "is not there"])
def test_s3_takes_its_keys_from_the_environment(
    said: Said, s3_shared: S3Server, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    endpoint = s3_shared.endpoint if there else "http://127.0.0.1:1"
    patient = "lookup_timeout=20&load_timeout=20&save_timeout=20" if there else "lookup_timeout=1"
    address = f"s3://{S3Server.bucket}/credentials?endpoint={endpoint}&{patient}"
    with kvkeep.open(address, memory="1MiB", namespace=b"namespace-93ab") as cache:
        assert use(said, cache) == 64
    result = CliRunner().invoke(app, ["verify", address])
    assert result.exit_code == (0 if there else 2), result.output
    said.add(result.output, result.stderr)
    said.check("namespace-93ab")


@pytest.mark.parametrize(
    "address",
    [
        f"redis://{USER}:{PASSWORD}@localhost:6379/0",  # not encoded
        f"redis://{USER}:{ENCODED}@localhost:port/0",
        f"redis://{USER}:{ENCODED}@localhost:99999/0",
        f"redis://{USER}:{ENCODED}@/0",
        f"redis://{USER}:{ENCODED}@localhost/zero",
        f"redis://{USER}:{ENCODED}@localhost/0?pasword={ENCODED}",
        f"reddis://{USER}:{ENCODED}@localhost/0",
        f"redis:/{USER}:{ENCODED}@localhost",
        "env:KVKEEP_TEST_NOT_SET",
        "file:/nonexistent",
    ],
)
def test_wrong_addresses(said: Said, address: str) -> None:
    said.attempt(lambda: kvkeep.open(remote=address))
    said.attempt(lambda: url.shown(address))
    result = CliRunner().invoke(app, ["verify", address])
    said.add(result.output, result.stderr, result.exception)
    assert result.exit_code == 2
    said.check()


def test_from_the_environment_and_from_a_file(
    said: Said, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"redis://{USER}:{ENCODED}@{server}/0?{PATIENT}"
    monkeypatch.setenv("KVKEEP_TEST_URL", address)
    (tmp_path / "url").write_text(address + "\n")
    (tmp_path / "url").chmod(0o600)
    for source in ("env:KVKEEP_TEST_URL", f"file:{tmp_path / 'url'}"):
        with kvkeep.open(remote=source, memory="1MiB") as cache:
            assert use(said, cache) == 64
            assert cache.store.tiers[1].store.contains(kvkeep.block_keys(layout(), TOKENS)[0])
        result = CliRunner().invoke(app, ["verify", source])
        assert result.exit_code == 0, result.output
        assert server in result.output
        said.add(result.output)


def test_a_configuration(said: Said, tmp_path: Path) -> None:
    file = tmp_path / "kvkeep.toml"
    address = f"redis://{USER}:{ENCODED}@127.0.0.1:1/0"
    file.write_text(f'remote = "{address}"\nencryption = "{ENCODED}"\n')
    said.add(config.from_file(file))
    said.attempt(lambda: config.from_file(file).open())
    file.write_text(f'remotes = "{address}"\n')
    said.attempt(lambda: config.from_file(file))
    file.write_text(f'remote = ["{address}"]\n')
    said.attempt(lambda: config.from_file(file))
    with pytest.raises(ConfigError):
        config.from_file(file)


def test_identities_and_layouts_do_not_show_a_namespace(said: Said) -> None:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32", namespace=PASSWORD.encode())
    said.add(identity, layout(), kvkeep.KVLayout.uniform(
        identity, num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32"
    ))  # fmt: skip
