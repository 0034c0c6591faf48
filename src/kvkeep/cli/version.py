"""``kvkeep version``."""

from __future__ import annotations

from importlib.metadata import version as version_of


def version() -> None:
    """Print the version."""
    print(f"kvkeep {version_of('kvkeep')}")
