"""Imports point down only (docs/design.md). Parsed, not run, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvkeep

ROOT = Path(kvkeep.__file__).parent

LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "buffers", "sizes", "secret"),
    ("identity", "layout"),
    ("keys",),
    ("stores", "codecs", "policies"),
    ("frame", "events", "crypt", "labels", "quality", "registry", "breaker", "tier", "trace", "admission"),
    ("framing", "writing"),
    ("tiered", "flight", "sim", "values"),
    ("cache", "metrics", "options"),
    ("opening",),
    ("config",),
    ("engines", "web"),
    ("cli",),
    ("testing",),
)
"""From the bottom up. ``events`` and ``registry`` know only errors themselves; who uses them stands above."""

WITHIN: dict[str, tuple[str, ...]] = {
    "identity": ("errors", "buffers"),
    "layout": ("errors", "buffers", "identity"),
    "events": ("errors",),
    "registry": ("errors",),
    "frame": ("errors", "buffers", "keys"),
    "breaker": ("errors", "events"),
    "tier": (
        "errors",
        "buffers",
        "identity",
        "layout",
        "keys",
        "stores",
        "codecs",
        "policies",
        "frame",
        "events",
        "breaker",
        "admission",
    ),
}
"""Where a module may use less than all of its level and below."""

SIBLINGS = ("stores", "codecs", "policies", "engines")
"""Folders whose modules never import one another, but for ``base`` and what is named here."""

SHARED = {
    "stores.extents",
    "stores.slabs",
    "stores.url",
    "stores.redis_wire",
    "stores.redis_servers",
    "stores.redis_cluster",
    "engines.weights",
}
SHARED |= {f"codecs.{part}" for part in ("values", "kernels", "reference", "compiled", "entropy", "lossy")}
SHARED |= {
    "policies.queue",
    "policies.ranking",
    "policies.survival",
    "policies.turns",
    "policies.lru",
    "policies.shadow",
}
"""Parts of one implementation, or of several, in a file of their own."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": ("engines", "testing.vllm_offload", "cli.measure", "cli.losses", "cli.smollm2"),
    "transformers": ("engines.transformers", "cli.measure", "cli.losses", "cli.smollm2"),
    "huggingface_hub": (
        "engines.transformers",
        "engines.weights",
        "engines.vllm",
        "cli.demo",
        "cli.measure",
        "cli.losses",
    ),
    "vllm": ("engines.vllm", "testing.vllm_offload"),
    "prometheus_client": ("engines.vllm",),
    "openai": ("cli",),
    "llama_cpp": ("engines.llamacpp",),
    "redis": (
        "stores.redis",
        "stores.redis_servers",
        "stores.redis_cluster",
        "stores.redis_wire",
        "cli.check",
        "testing",
    ),
    "uhashring": ("stores.memcached",),
    "obstore": ("stores.s3",),
    "zstandard": ("codecs.entropy",),
    "cryptography": ("crypt",),
    "tokenizers": ("trace.logs",),
    "pandas": ("sim", "values"),
    "typer": ("cli",),
    "rich": ("cli",),
    "click": ("cli",),
    "matplotlib": ("cli",),
    "gguf": ("engines.weights", "cli"),
    "pytest": ("testing",),
    "hypothesis": ("testing",),
}
"""Third-party packages and who may import them."""

CORE = {"numpy", "xxhash"}


def modules() -> list[str]:
    """Dotted names below ``kvkeep``; the package itself is ``""``."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py")]
    return sorted(".".join(path.parts).removesuffix("__init__").removesuffix(".") for path in paths)


def imports(module: str) -> Iterator[str]:
    """Absolute names of all modules that ``module`` imports, anywhere in it."""
    path = ROOT.joinpath(*module.split(".")) if module else ROOT
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    known = {f"kvkeep.{name}" for name in modules()}
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def inner(module: str) -> list[str]:
    """What ``module`` imports of kvkeep, without the package's own name."""
    return [name.removeprefix("kvkeep").removeprefix(".") for name in imports(module) if name.split(".")[0] == "kvkeep"]


def level(module: str) -> int:
    top = module.split(".")[0]
    for number, names in enumerate(LEVELS):
        if top in names:
            return number
    raise AssertionError(f"{module} has no level: put it into LEVELS and into docs/design.md")


MODULES = [module for module in modules() if module]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    top = module.split(".")[0]
    for used in inner(module):
        if not used:  # the package itself, which imports everything
            assert top in ("cli", "testing"), f"{module} imports kvkeep, not the modules it needs"
            continue
        other = used.split(".")[0]
        if other == top:
            continue
        allowed = WITHIN.get(top)
        if allowed is not None:
            assert other in allowed, f"{module} may not import {used}"
        elif top == "cli":
            assert level(used) < level(module) or other == "engines", f"{module} imports {used} from above"
        else:
            assert level(used) < level(module) or (level(used) == level(module) and top not in SIBLINGS), (
                f"{module} imports {used}, which stands beside or above it"
            )


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] in SIBLINGS])
def test_siblings_do_not_know_each_other(module: str) -> None:
    for used in inner(module):
        if used.split(".")[:2] == module.split(".")[:2]:
            continue  # parts of one implementation
        if used.split(".")[0] in SIBLINGS:
            folder, _, name = used.partition(".")
            if folder == module.split(".")[0]:
                assert name in ("", "base") or used in SHARED, f"{module} imports its sibling {used}"
            else:
                assert module.startswith("engines."), f"{module} imports {used}"


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_have_their_place(module: str) -> None:
    for name in imports(module):
        package = name.split(".")[0]
        if package in sys.stdlib_module_names or package == "kvkeep" or package in CORE:
            continue
        places = ONLY_IN.get(package)
        assert places is not None, f"{module} imports {package}, which has no place in ONLY_IN"
        assert any(module == place or module.startswith(f"{place}.") for place in places), (
            f"{module} imports {package}: only {', '.join(places)} may"
        )


def test_no_module_is_unreachable_by_these_rules() -> None:
    assert {"errors", "keys", "frame", "stores.base", "codecs.lossless"} <= set(MODULES)
    assert "kvkeep.errors" in set(imports("keys"))


def test_the_package_loads_nothing_but_the_core_and_fast() -> None:
    program = (
        "import sys, time\n"
        "begin = time.process_time()\n"
        "import kvkeep\n"
        "seconds = time.process_time() - begin\n"
        "early = {'numpy', 'kvkeep.cache'} & set(sys.modules)\n"
        "assert all(hasattr(kvkeep, name) for name in kvkeep.__all__)\n"
        "heavy = {'torch', 'transformers', 'typer', 'rich', 'zstandard', 'pytest', 'hypothesis', 'matplotlib'}\n"
        "print(seconds, *sorted(early | heavy & set(sys.modules)))\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert [run.stdout.split()[1:] for run in runs] == [[], [], []]
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.2  # a hundred times what it takes


def test_what_is_exported_is_what_is_told() -> None:
    assert sorted(kvkeep.__all__) == sorted(name for names in kvkeep._HOMES.values() for name in names)
    assert set(kvkeep.__all__) <= set(dir(kvkeep))
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        kvkeep.opne  # noqa: B018
