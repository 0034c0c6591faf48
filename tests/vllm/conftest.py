"""Real vLLM, in this process: one engine at a time, on tiny models with random weights.

Only ``.venv-vllm`` has vLLM (``make test-vllm``); anywhere else there is nothing to collect here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_spec = importlib.util.find_spec("vllm")
if _spec is None or _spec.origin is None:  # this folder itself would pass for a package without an origin
    collect_ignore_glob = ["test_*.py"]

# Read when vLLM is imported. Threads that spin on a busy machine would take minutes.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


def pytest_configure(config: pytest.Config) -> None:
    # vLLM's and torch's own, while they are imported too: kvkeep's are errors in all other tests.
    config.addinivalue_line("filterwarnings", "ignore")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by kind, made when they are asked for."""
    from serving import write_model

    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_model(root / kind, kind)
        return made[kind]

    return model


@pytest.fixture(autouse=True, scope="module")
def _no_engine_left() -> Iterator[None]:
    yield
    from serving import Engine

    if Engine.running is not None:
        Engine.running.stop()
