"""All commands in one Typer application."""

from __future__ import annotations

import typer

from kvkeep.cli.check import check
from kvkeep.cli.clear import clear
from kvkeep.cli.demo import demo
from kvkeep.cli.demo_vllm import demo_vllm
from kvkeep.cli.quality import quality
from kvkeep.cli.replay import replay
from kvkeep.cli.rotate import rotate
from kvkeep.cli.size import size
from kvkeep.cli.stats import stats
from kvkeep.cli.verify import verify
from kvkeep.cli.version import version
from kvkeep.cli.vllm_args import vllm_args

app = typer.Typer(
    name="kvkeep",
    help="Keep what a language model has already read: look at, check and clear a cache directory; see a demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (demo, stats, check, verify, clear, rotate, quality, replay, size, vllm_args, demo_vllm, version):
    app.command()(command)
