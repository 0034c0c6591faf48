"""Configuration: every key arrives, every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvkeep
from kvkeep.config import Config, from_dict, from_file, load
from kvkeep.errors import ConfigError
from kvkeep.sizes import format_size, parse_age, parse_size


def test_every_key_arrives(tmp_path: Path) -> None:
    file = tmp_path / "kvkeep.toml"
    file.write_text(
        f'dir = "{tmp_path}/kept"\nmemory = "2MiB"\ndisk = 4194304\npolicy = "sieve"\ncodec = "lossless"\n'
        "block_tokens = 32\n"
    )
    config = from_file(file)
    assert config == Config(tmp_path / "kept", 2 << 20, 4 << 20, policy="sieve", codec="lossless", block_tokens=32)
    with config.open() as cache:
        assert cache.block_tokens == 32
        assert [tier.name for tier in cache.stats().tiers] == ["memory", "disk"]


def test_defaults_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVKEEP_CONFIG", raising=False)
    assert load() == Config() == from_dict({})
    file = tmp_path / "kvkeep.toml"
    file.write_text('memory = "7MB"\n')
    monkeypatch.setenv("KVKEEP_CONFIG", str(file))
    assert load().memory == 7_000_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memroy = 1", "did you mean 'memory'"),
        ('policy = "lruu"', "did you mean 'lru'"),
        ('codec = "losless"', "did you mean 'lossless'"),
        ('disk = "lots"', "is no size"),
        ("disk = 1.5", "disk is a size"),
        ("memory = true", "memory is a size"),
        ("block_tokens = -1", "block_tokens"),
        ("block_tokens = true", "block_tokens"),
        ("dir = 3", "dir is a path"),
        ("dir = ", "kvkeep.toml"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "kvkeep.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        from_file(file)
    assert str(file) in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml"):
        from_file(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (7, 7)]
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("nbytes", [0, 1, 1023, 1024, 1 << 20, 3 << 30, 5 << 40])
def test_a_formatted_size_reads_back(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes / 100


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 parsec", "1e3"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)])
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "soon"])
def test_no_ages(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_age(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": 1.5e9}, 'a size such as 1048576 or "2GiB"'),
        ({"disk": None}, "a size"),
        ({"codec": ["raw"]}, "codec is a text"),
        ({"policy": {"memory": 5}}, "policy is a text"),
        ({"ttl": [7]}, 'an age such as "7d"'),
        ({"ttl": float("nan")}, "above 0"),
        ({"quota": {"disk": 1.5}}, "quota is a size"),
        ({"max_kl": "small"}, "nats a token"),
        ({"max_kl": -1}, "nats a token"),
        ({"force": "no"}, "true or false"),
        ({"prefault": 1}, "prefault is true or false"),
        ({"block_tokens": "16"}, "number of tokens"),
        ({"block_tokens": -1}, "number of tokens"),
        ({"namespace": "tenant a"}, "namespace is bytes"),
        ({"encryption": lambda: None}, "returned a NoneType"),
    ],
)
def test_open_is_as_strict_as_a_file(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kvkeep.open(**{"memory": "1MiB"} | options)


def test_a_namespace_that_can_be_guessed_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    kvkeep.open(memory="1MiB", namespace=b"alice").close()
    assert "can be guessed" in caplog.text
    assert "alice" not in caplog.text
    caplog.clear()
    kvkeep.open(memory="1MiB", namespace=bytes(16), ttl={"memory": None}).close()
    assert not caplog.text
