"""The registry: names to classes, plugins loaded only when asked for, misspelt names answered with the nearest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from kvkeep import registry
from kvkeep.codecs.base import Codec
from kvkeep.errors import ConfigError
from kvkeep.policies.base import EvictionPolicy
from kvkeep.stores.base import Store

BASES: dict[str, type] = {"codecs": Codec, "policies": EvictionPolicy, "stores": Store}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in registry.BUILTIN for name in registry.BUILTIN[kind]]
)
def test_every_name_leads_to_a_class_of_its_kind(kind: str, name: str) -> None:
    found = registry.lookup(kind, name)
    assert issubclass(found, BASES[kind])
    if kind != "stores":
        assert found.name == name, "a frame's or a report's name looks the class up again"


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        ("codecs", "losless", "lossless"),
        ("codecs", "uqq", "uqz"),  # uqz-hq has as much of it, and more of something else
        ("policies", "LRU", "lru"),
        ("policies", "siève", "sieve"),
        ("stores", "dsik", "disk"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(kind: str, name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        registry.lookup(kind, name)


def test_a_name_like_none_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=r"no policy is called 'qqqq'; known: .*fifo.*lru.*sieve"):
        registry.lookup("policies", "qqqq")


def test_names_are_sorted_and_complete() -> None:
    assert registry.names("policies") == sorted(registry.names("policies"))
    assert set(registry.BUILTIN["codecs"]) <= set(registry.names("codecs"))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution on the path that offers one codec that works, one that does not, and one that poses as raw."""
    (tmp_path / "kvkeep_plugin.py").write_text("class Mine:\n    name = 'mine'\n")
    (tmp_path / "kvkeep_broken.py").write_text("raise RuntimeError('this plugin is broken')\n")
    info = tmp_path / "kvkeep_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvkeep-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvkeep.codecs]\nmine = kvkeep_plugin:Mine\nbroken = kvkeep_broken:Mine\nraw = kvkeep_broken:Mine\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in ("kvkeep_plugin", "kvkeep_broken"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("plugins")
def test_a_plugin_is_imported_only_when_its_name_is_asked_for() -> None:
    assert {"mine", "broken"} <= set(registry.names("codecs"))
    registry.lookup("codecs", "lossless")
    assert "kvkeep_plugin" not in sys.modules
    assert registry.lookup("codecs", "mine").name == "mine"
    assert "kvkeep_plugin" in sys.modules
    assert "kvkeep_broken" not in sys.modules


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_says_so() -> None:
    with pytest.raises(RuntimeError, match="this plugin is broken"):
        registry.lookup("codecs", "broken")


@pytest.mark.usefixtures("plugins")
def test_a_plugin_cannot_take_a_built_in_name() -> None:
    assert registry.lookup("codecs", "raw").__module__ == "kvkeep.codecs.raw"


def test_built_in_names_need_no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: Any) -> EntryPoints:
        raise AssertionError("entry points were read: that takes tens of milliseconds")

    monkeypatch.setattr(registry, "entry_points", never)
    registry.lookup("policies", "lru")


def test_an_entry_point_that_lacks_its_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("absent", "kvkeep.errors:Absent", "kvkeep.stores")
    monkeypatch.setattr(registry, "entry_points", lambda **_: EntryPoints([point]))
    with pytest.raises(AttributeError):
        registry.lookup("stores", "absent")


def test_without_zstandard_the_codec_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from kvkeep.errors import ConfigError\n"
        "from kvkeep.registry import lookup\n"
        "lookup('codecs', 'raw')\n"
        "try: lookup('codecs', 'lossless')\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'kvkeep[zstd]'" in done.stdout
