"""check on real servers: what it reaches, what it measures, what it says to change, and that it leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.cli.check import memcached_advice, redis_advice
from kvkeep.testing.servers import memcached_server, redis_binary, redis_cluster, redis_server, valkey_binary

from .test_commands import run

PATIENT = "?lookup_timeout=5&load_timeout=5"


def test_all_tiers_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server("--maxmemory-policy", "noeviction", maxmemory="0") as server:
        config = tmp_path / "kvkeep.toml"
        config.write_text(
            f'dir = "{tmp_path}/kept"\nmemory = "64MiB"\ndisk = "100TiB"\nremote = "{server.url}{PATIENT}"\n'
        )
        monkeypatch.setenv("KVKEEP_CONFIG", str(config))
        result = run("check", "--json")
        assert result.exit_code == 0, result.output
        tiers = {each["tier"]: each for each in json.loads(result.stdout)["tiers"]}
        assert list(tiers) == ["memory", "disk", "remote"]
        for each in tiers.values():
            assert each["reached"]
            assert 0 < each["round_trip_ms"] < 5000
            assert each["write_mb_s"] > 0
            assert each["read_mb_s"] > 0
        assert "are free" in tiers["disk"]["advice"][0]
        assert [advice.split(" ")[1] for advice in tiers["remote"]["advice"]] == ["maxmemory", "maxmemory-policy"]
        assert server.call("DBSIZE") == 0, "it deletes what it wrote"
    assert not list((tmp_path / "kept").iterdir())


def test_a_memory_that_is_smaller_than_what_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "kvkeep.toml"
    monkeypatch.setenv("KVKEEP_CONFIG", str(config))
    for size in ("16MiB", "1MiB"):
        config.write_text(f'memory = "{size}"\ndisk = 0\n')
        result = run("check", "--json")
        assert result.exit_code == 0, result.output
        (tier,) = json.loads(result.stdout)["tiers"]
        assert tier["read_mb_s"] > 0


def test_a_well_kept_server_has_nothing_to_change() -> None:
    with redis_server() as server:
        result = run("check", f"{server.url}{PATIENT}")
        assert result.exit_code == 0, result.output
        assert "Nothing to change" in result.stdout
        server.call("CONFIG", "SET", "proto-max-bulk-len", "1mb")
        said = run("check", f"{server.url}{PATIENT}").stdout
        assert "proto-max-bulk-len is 1048576" in said
        assert "does not take values of this size" in said
        server.call("CONFIG", "SET", "proto-max-bulk-len", "512mb")
        server.call("CONFIG", "SET", "client-query-buffer-limit", "1mb")
        server.call("CONFIG", "SET", "save", "3600 1 300 100 60 10000")
        said = run("check", f"{server.url}{PATIENT}").stdout
        assert "client-query-buffer-limit is 1048576" in said
        assert 'CONFIG SET save ""' in said


@pytest.mark.parametrize("maxmemory", ["2mb", "20mb"])
def test_a_server_with_too_little_memory(maxmemory: str) -> None:
    with redis_server(maxmemory=maxmemory) as server:
        result = run("check", f"{server.url}{PATIENT}")
        assert result.exit_code == 1
        assert f"maxmemory is {maxmemory[:-2]} MiB, too small" in result.stdout
        assert "policy evicts nothing" not in result.stdout


FOR_BLOCKS = "+get +set +getrange +exists +strlen +unlink +persist +pexpire +scan +ping +select +client|setname"
FOR_VALUES = "+eval +sadd +srem +scard +smembers +del +pttl"


@pytest.mark.parametrize("binary", [redis_binary, valkey_binary])
def test_a_user_who_may_not_do_what_values_need(binary: Callable[[], str]) -> None:
    with redis_server(binary=binary()) as server:
        address = server.url.replace("redis://", "redis://kvkeep:secret@") + PATIENT
        words = f"on >secret resetkeys ~kvkeep:* resetchannels -@all {FOR_BLOCKS} {FOR_VALUES}"
        server.call("ACL", "SETUSER", "kvkeep", *words.split())
        assert run("check", address).exit_code == 0
        assert server.call("DBSIZE") == 0, "it deletes what it wrote"
        for each in FOR_VALUES.split():
            server.call("ACL", "SETUSER", "kvkeep", each.replace("+", "-"))
            result = run("check", address)
            assert result.exit_code == 1, each
            assert "set_value" in result.stdout
            assert "may not use a command" in result.stdout
            server.call("ACL", "SETUSER", "kvkeep", each)
        assert all(server.call("PTTL", key) > 0 for key in server.call("KEYS", "*")), "what may not be deleted expires"


def test_a_cluster_is_asked_node_by_node() -> None:
    with redis_cluster(3, 0, "--maxmemory-policy", "noeviction") as cluster:
        result = run("check", f"{cluster.url}{PATIENT}", "--json")
        (tier,) = json.loads(result.stdout)["tiers"]
        assert len([advice for advice in tier["advice"] if "noeviction" in advice]) == 3


def test_memcached_with_small_items_and_little_memory() -> None:
    with memcached_server("-I", "512k", "-M") as server:
        result = run("check", f"memcached://{server.where}{PATIENT}", "--json")
        (tier,) = json.loads(result.stdout)["tiers"]
        assert "full" in "".join(tier["advice"]) or "too large" in "".join(tier["advice"])
        assert tier["reached"]
    with memcached_server() as server:
        result = run("check", f"memcached://{server.where}{PATIENT}", "--json")
        (tier,) = json.loads(result.stdout)["tiers"]
        assert tier["write_mb_s"] > 0
        assert "-m 4096" in tier["advice"][0]


def test_a_server_that_is_not_there_is_exit_status_1() -> None:
    result = run("check", "redis://somebody:hunter2@127.0.0.1:1/0")
    assert result.exit_code == 1
    assert "unreachable" in result.stdout
    assert "hunter2" not in result.output


def test_a_server_that_refuses_writes_is_exit_status_1() -> None:
    with redis_server("--maxmemory-policy", "noeviction", maxmemory="3mb") as server:
        result = run("check", f"{server.url}{PATIENT}", "--json")
        (tier,) = json.loads(result.stdout)["tiers"]
        assert tier["reached"]
        assert "full" in tier["advice"][-1]
        assert result.exit_code == 1
        server.call("CONFIG", "SET", "maxmemory", "256mb")
        server.call("REPLICAOF", "127.0.0.1", "1")
        assert run("check", f"{server.url}{PATIENT}").exit_code == 1


def test_nodes_of_memcached_that_are_not_there_are_named() -> None:
    result = run("check", "memcached://127.0.0.1:1")
    assert result.exit_code == 1
    assert "unreachable" in result.stdout
    with memcached_server() as server:
        result = run("check", f"memcached://{server.where},127.0.0.1:1{PATIENT}")
        assert result.exit_code == 0
        assert "127.0.0.1:1: cannot reach" in result.stdout


def test_a_server_without_tls_that_is_asked_for_it() -> None:
    with redis_server() as server:
        result = run("check", server.url.replace("redis://", "rediss://"))
        assert result.exit_code == 1
        assert "say redis://" in result.stdout


def test_another_server_than_the_address_says() -> None:
    with redis_server() as redis, memcached_server() as memcached:
        for address, hint in (
            (redis.url.replace("redis://", "redis+cluster://"), "say redis:// instead of redis+cluster://"),
            (redis.url.replace("redis://", "memcached://").removesuffix("/0"), "say redis:// instead of memcached://"),
            (f"redis://{memcached.where}", "something else than redis seems to listen there"),
        ):
            result = run("check", address)
            assert result.exit_code == 1
            assert hint in result.stdout
            assert "yes" not in result.stdout, "nothing was reached that could be used"


def test_a_password_that_is_wanted_is_asked_for() -> None:
    with redis_server() as server:
        server.call("CONFIG", "SET", "requirepass", "open-sesame")
        result = run("check", f"{server.url}{PATIENT}")
        assert result.exit_code == 1
        assert "asks for a password" in result.stdout


def test_a_wrong_address_is_exit_status_2() -> None:
    result = run("check", "redsi://127.0.0.1")
    assert result.exit_code == 2
    assert "did you mean 'redis'" in result.output


def test_advice() -> None:
    enough = 1 << 30
    assert redis_advice({"maxmemory": enough, "maxmemory_policy": "allkeys-lru", "save": ""}) == []
    assert "too small" in redis_advice({"maxmemory": 1})[0]
    assert "ttl" in redis_advice({"maxmemory": enough, "maxmemory_policy": "volatile-lru"})[0]
    assert "appendonly" in redis_advice({"maxmemory": enough, "aof_enabled": 1})[0]
    assert "does not show its settings" in redis_advice({})[0]
    assert "up to 7335936 bytes" in redis_advice({"maxmemory": enough, "proto-max-bulk-len": "5242880"})[0]
    assert redis_advice({"maxmemory": enough, "proto-max-bulk-len": "536870912"}) == []
    assert memcached_advice({"limit_maxbytes": str(4 << 30)}) == []
    assert "-I 1m" in memcached_advice({"item_size_max": "524288"})[0]
    assert "-M" in memcached_advice({"evictions": "off"})[0]
    assert "older" in memcached_advice({"version": "1.5.22"})[0]
