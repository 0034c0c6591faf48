"""``python -m kvkeep.cli``."""

from __future__ import annotations

from kvkeep.cli.app import app

app(prog_name="kvkeep")
