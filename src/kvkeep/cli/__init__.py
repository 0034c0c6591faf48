"""The command line: one file a command. What is heavy is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

from kvkeep.cli.app import app

__all__ = ["app"]
