"""What the commands show and do of values in a directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

import kvkeep
from kvkeep.cli.app import app
from kvkeep.testing.servers import RedisServer


def test_stats_names_values_and_clear_drops_them(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as cache:
        for number in range(5):
            cache.set_value(number, np.arange(100 + number))
        cache.set_value("small", "secret")
    runner = CliRunner()
    (row,) = json.loads(runner.invoke(app, ["stats", str(tmp_path), "--json"]).stdout)["models"]
    assert (row["model"], row["blocks"]) == ("values", 5)
    cleared = runner.invoke(app, ["clear", str(tmp_path), "--all"])
    assert cleared.exit_code == 0
    said = " ".join(cleared.stdout.split())
    assert "dropped 5 blocks" in said
    assert "6 names of values" in said
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.glob("values.sqlite*"))
    with kvkeep.open(tmp_path, memory="4MiB", disk="8MiB") as cache:
        assert cache.get_values([0, "small"]) == [None, None]
        assert cache.set_value("small", 1)


def test_stats_names_values_on_a_server(redis_shared: RedisServer) -> None:
    with kvkeep.open(redis_shared.url + "?lookup_timeout=20&load_timeout=20&save_timeout=20", memory="4MiB") as cache:
        assert cache.set_value("a", np.arange(100))
    (row,) = json.loads(CliRunner().invoke(app, ["stats", redis_shared.url, "--json"]).stdout)["models"]
    assert (row["model"], row["blocks"]) == ("values", 1)
