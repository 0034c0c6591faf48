"""``kvkeep size``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvkeep.cli.directory import fail
from kvkeep.cli.replay import cores, progress_bar

if TYPE_CHECKING:
    from kvkeep.sim.models import ModelSize
    from kvkeep.sim.sizing import Prices, Recommendation, Speeds


def size(
    trace: Annotated[list[Path], typer.Option(help="The trace; may be given several times (files of one service).")],
    model: Annotated[
        str,
        typer.Option(help="A model's folder or config.json, a known name (llama-3.1-8b), or bytes a token (131072)."),
    ],
    memory_price: Annotated[float, typer.Option(min=0, help="Of a GiB of memory, a month.")] = 3.0,
    disk_price: Annotated[float, typer.Option(min=0, help="Of a GiB of disk, a month.")] = 0.08,
    gpu_price: Annotated[float, typer.Option(min=0, help="Of the GPU that runs the prefills, an hour.")] = 2.0,
    target_hit_ratio: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The cheapest sizes that reach this token-hit ratio, in place of the best net."
        ),
    ] = None,
    max_memory: Annotated[str, typer.Option(help="No more memory than this (64GiB).")] = "",
    max_disk: Annotated[str, typer.Option(help="No more disk than this (2TiB); 0: no disk.")] = "",
    disk_fills: Annotated[
        float | None, typer.Option(min=0, help="How often a day the disk may be written full (its DWPD).")
    ] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="What a prefill really gets, in 10^12 a second.")] = 200.0,
    memory_bandwidth: Annotated[float, typer.Option(min=0.001, help="Memory to engine, GB/s.")] = 20.0,
    disk_bandwidth: Annotated[float, typer.Option(min=0.001, help="Disk to engine, GB/s.")] = 4.0,
    policies: Annotated[str, typer.Option(help="Policies to choose from. Default: lru and hazard.")] = "",
    block_tokens: Annotated[int, typer.Option(min=0, help="Tokens a block, where the trace does not say.")] = 0,
    tokenizer: Annotated[str, typer.Option(help='For logs of text: a tokenizer.json, its folder, or "bytes".')] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")] = False,
) -> None:
    """Recommend memory, disk, policy and write rule for a trace, and say what they buy.

    A found prefix saves GPU time, memory and disk cost money: the best difference is recommended, or with
    --target-hit-ratio the least money. The trace stands for every hour of a month.
    """
    from kvkeep.errors import ConfigError
    from kvkeep.sim import models, sizing
    from kvkeep.sizes import parse_size
    from kvkeep.trace import merge, read_all

    with progress_bar() as bar:
        try:
            prices = sizing.Prices(memory_price, disk_price, gpu_price)
            if disk_fills is not None:
                prices = sizing.Prices(memory_price, disk_price, gpu_price, disk_fills)
            speeds = sizing.Speeds(tflops * 1e12, memory_bandwidth * 1e9, disk_bandwidth * 1e9)
            kind = models.load(model)
            task = bar.add_task("reading", total=None)
            found = merge(read_all(trace, block_tokens=block_tokens, tokenizer=tokenizer))
            # A cache may have served several models: that whose blocks are recorded, else what most was asked of.
            chosen = max(
                found, key=lambda one: (one.block_nbytes == one.block_tokens * kind.token_nbytes, one.num_tokens)
            )
            result = sizing.size(
                chosen,
                kind,
                prices,
                speeds,
                target=target_hit_ratio,
                policies=[name.strip() for name in policies.split(",")] if policies else (),
                max_memory=parse_size(max_memory) if max_memory else None,
                max_disk=parse_size(max_disk) if max_disk else None,
                jobs=jobs or cores(),
                progress=lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            )
        except ConfigError as error:
            bar.stop()
            fail(str(error))
    for other in found:
        if other is not chosen:
            typer.echo(
                f"left out: {other.name}, whose blocks have another size ({other.num_tokens:,} tokens)", err=True
            )
    if as_json:
        print(json.dumps(result.row(), indent=1))
        return
    _tell(result, kind, prices, speeds)


def _tell(result: Recommendation, model: ModelSize, prices: Prices, speeds: Speeds) -> None:
    from kvkeep.sizes import format_size

    console = Console(highlight=False)
    chosen = result.chosen
    memory, disk = format_size(result.memory_bytes), format_size(result.disk_bytes)
    where = f"[bold]{memory} of memory[/bold]" + (f" and [bold]{disk} of disk[/bold]" if result.disk_bytes else "")
    rule = f", writing [bold]{chosen.write_rule}[/bold] blocks to disk" if result.disk_bytes else ""
    console.print(f"{result.trace} with {model.name}: {where}, policy [bold]{result.policy}[/bold]{rule}.\n")
    if result.net_a_month < 0:
        console.print("[bold]No cache pays at these prices[/bold]: this is the one that loses least.\n")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "expected hit ratio",
        f"{chosen.token_hit_ratio:.1%} of the prompts' tokens ({chosen.memory_hit_ratio:.1%} from memory, "
        f"{chosen.disk_hit_ratio:.1%} from disk); without limits it would be {result.ceiling:.1%}",
    )
    table.add_row("prefill saved", f"{chosen.compute_saved:.1%} of its arithmetic")
    table.add_row(
        "TTFT saved",
        f"{_seconds(chosen.ttft_saved)} of {_seconds(chosen.ttft_without)} on average; "
        f"95th percentile {_seconds(chosen.ttft_without_p95)} → {_seconds(chosen.ttft_p95)} "
        "(prefill and load, no queue)",
    )
    if result.disk_bytes:
        table.add_row(
            "disk writes a day",
            f"{format_size(round(chosen.disk_written_bytes_a_day))}: the disk {chosen.disk_fills_a_day:.3g} times over",
        )
    table.add_row(
        "a month",
        f"costs {result.cost_a_month:,.0f}, saves GPU time for {chosen.worth_a_month:,.0f}: "
        f"net {result.net_a_month:+,.0f}",
    )
    for name, more in (("memory", result.next_memory), ("disk", result.next_disk)):
        table.add_row(
            f"the next GiB of {name}",
            f"{100 * more.token_hit_ratio:+.3f} points of hits, {_seconds(more.ttft_saved)} of TTFT, "
            f"worth {more.worth_a_month:,.2f} a month at a price of {more.cost_a_month:,.2f}",
        )
    console.print(table)
    if len(result.outcomes) > 1:
        console.print(_rules(result))
    console.print(
        f"Reckoned with {prices.memory:g} and {prices.disk:g} a GiB and month, {prices.gpu:g} a GPU hour, "
        f"{speeds.flops / 1e12:g} TFLOP/s, {speeds.memory / 1e9:g} and {speeds.disk / 1e9:g} GB/s, "
        f"{format_size(round(model.token_nbytes))} of KV a token; --help names the options.",
        style="dim",
    )
    options = f'memory="{_whole(result.memory_bytes)}", policy="{result.policy}"'
    if result.disk_bytes:
        options += f', disk="{_whole(result.disk_bytes)}", write_rule="{chosen.write_rule}"'
    console.print(f"\nkvkeep.open({'DIRECTORY, ' if result.disk_bytes else ''}{options})", markup=False, soft_wrap=True)


def _rules(result: Recommendation) -> Table:
    from kvkeep.sizes import format_size

    table = Table(title="write rules at these sizes")
    table.add_column("rule")
    for heading in ("hits", "from disk", "TTFT", "disk writes a day", "fills a day"):
        table.add_column(heading, justify="right")
    for one in result.outcomes:
        table.add_row(
            one.write_rule,
            f"{one.token_hit_ratio:.1%}",
            f"{one.disk_hit_ratio:.1%}",
            _seconds(one.ttft),
            format_size(round(one.disk_written_bytes_a_day)),
            f"{one.disk_fills_a_day:.3g}",
        )
    return table


def _seconds(seconds: float) -> str:
    if abs(seconds) < 0.0005:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.0f} ms" if abs(seconds) < 0.9995 else f"{seconds:.2f} s"


def _whole(nbytes: int) -> Any:
    """As an option of :func:`kvkeep.open`, rounded up."""
    return f"{-(-nbytes // (1 << 30))}GiB" if nbytes >= 4 << 30 else f"{-(-nbytes // (1 << 20))}MiB"
