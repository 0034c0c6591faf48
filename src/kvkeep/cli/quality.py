"""``kvkeep quality``: what each codec costs and saves on the user's own model and texts.

Writes ``quality.json`` and ``quality.png`` to the output folder, and the report to the cache's directory, where a cache
looks it up (see :mod:`kvkeep.quality`).
"""

from __future__ import annotations

import json
import math
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvkeep.cli.directory import fail
from kvkeep.errors import ConfigError, KVKeepError

if TYPE_CHECKING:
    from kvkeep.cli.losses import Loss
    from kvkeep.layout import KVLayout

MODEL = "SmolLM2-135M-Instruct"

CODECS = ("raw", "lossless", "int8", "uqz-hq", "uqz", "uqz-max", "int4")


@dataclass(frozen=True, slots=True)
class Row:
    """One codec's figures, named as in the JSON. ``kl_max`` is the worst prompt's mean, nats a token."""

    codec: str
    bits: float
    encode_gbs: float
    decode_gbs: float
    kl_mean: float
    kl_max: float
    kl_worst_token: float
    top1: float
    perplexity_change: float
    greedy_match: float | None
    load_ms: dict[str, float]
    tokens_per_gb: int


def tabulate(losses: dict[str, Loss], layout: KVLayout) -> list[Row]:
    values = layout.token_nbytes // layout.np_dtype.itemsize
    return [
        Row(
            codec=name,
            bits=round(loss.bits, 3),
            encode_gbs=round(loss.encode_gbs, 2),
            decode_gbs=round(loss.decode_gbs, 2),
            kl_mean=_figures(statistics.fmean(loss.kl)),
            kl_max=_figures(max(loss.kl)),
            kl_worst_token=_figures(loss.worst_token_kl),
            top1=round(statistics.fmean(loss.top1), 4),
            perplexity_change=_figures(math.exp(statistics.fmean(loss.nats)) - 1),
            greedy_match=round(statistics.fmean(loss.greedy), 1) if loss.greedy else None,
            load_ms={tier: round(1000 * seconds, 2) for tier, seconds in loss.load_seconds.items()},
            tokens_per_gb=int(8e9 / (loss.bits * values)),
        )
        for name, loss in losses.items()
    ]


def _figures(number: float) -> float:
    return float(f"{number:.3g}")


def advise(rows: list[Row], max_kl: float, raw_bits: int = 16) -> str:
    """One sentence. A lossy codec is only advised where it costs clearly less than the limit."""
    exact = [row for row in rows if row.codec in ("raw", "lossless")]
    lossy = [row for row in rows if row not in exact]
    safe = [row for row in lossy if row.kl_mean <= max_kl / 10 and row.kl_max <= max_kl]
    usable = [row for row in lossy if row.kl_mean <= max_kl]
    refused = [row.codec for row in lossy if row not in usable]
    tail = f"; {', '.join(refused)} would be refused (KL above {max_kl:g})" if refused else ""
    if safe:
        best = min(safe, key=lambda row: row.bits)
        text = f"use {best.codec}: {raw_bits / best.bits:.1f} × the tokens a gigabyte at KL {best.kl_mean:.4f}"
        smaller = [row for row in usable if row.bits < best.bits]
        if smaller:
            least = min(smaller, key=lambda row: row.bits)
            text += f", or {least.codec} where room is scarce ({raw_bits / least.bits:.1f} ×, KL {least.kl_mean:.4f})"
        return f"On this model {text}{tail}."
    if usable:
        least = min(usable, key=lambda row: row.kl_mean)
        return (
            f"On this model no lossy codec is free: {least.codec} costs least (KL {least.kl_mean:.4f}); keep lossless"
            f" where that matters{tail}."
        )
    if lossy:
        return f"Keep lossless: every lossy codec measured passes the limit of {max_kl:g} on this model."
    return "Nothing lossy was measured, so there is nothing to weigh: lossless never changes an answer."


def show(rows: list[Row], title: str, advice: str, console: Console) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    tiers = list(rows[0].load_ms)
    table.add_column("codec", no_wrap=True)
    headings = ["bits", "enc\nGB/s", "dec\nGB/s", "KL\nmean", "KL\nmax", "top-1\n%", "perpl.\n%", "greedy"]
    for heading in (*headings, *(f"{tier}\nms" for tier in tiers), "tokens\na GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speeds = ["–", "–"] if row.codec == "raw" else [f"{row.encode_gbs:.1f}", f"{row.decode_gbs:.1f}"]
        table.add_row(
            row.codec,
            f"{row.bits:.2f}",
            *speeds,
            f"{row.kl_mean:.4f}",
            f"{row.kl_max:.4f}",
            f"{100 * row.top1:.1f}",
            f"{100 * row.perplexity_change:+.2f}",
            "–" if row.greedy_match is None else f"{row.greedy_match:.0f}",
            *(f"{row.load_ms[tier]:.0f}" for tier in tiers),
            f"{row.tokens_per_gb / 1000:.0f}k",
        )
    console.print(table)
    console.print(
        "KL: nats a token against exact KV, mean over all prompts and worst prompt. perpl.: change of the perplexity."
        " greedy: equal tokens before the first other one. ms: to load 2,048 tokens (or all that were read) from that"
        " tier, disk cold.",
        style="dim",
        highlight=False,
    )
    console.print(advice, highlight=False, style="bold")


def draw(rows: list[Row], title: str, max_kl: float, path: Path) -> None:
    """Size against damage: one point a codec, with the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    floor = 1e-5  # a logarithmic axis has no zero
    for row in rows:
        axes.plot([row.bits] * 2, [max(row.kl_mean, floor), max(row.kl_max, floor)], color="#8a8f98", linewidth=1)
        refused = row.kl_mean > max_kl
        axes.plot(row.bits, max(row.kl_mean, floor), "o", color="#b8352c" if refused else "#2f6db3", markersize=8)
        text = f"{row.codec}, {row.tokens_per_gb / 1000:.0f}k tokens/GB"
        axes.annotate(text, (row.bits, max(row.kl_mean, floor)), xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.axhline(max_kl, color="#b8352c", linestyle="--", linewidth=1)
    axes.annotate(f"max_kl = {max_kl:g}", (axes.get_xlim()[1], max_kl), ha="right", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("bits a value")
    axes.set_ylabel("KL, nats a token; the line ends at the worst prompt")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _read(texts: Path) -> list[str]:
    try:
        return texts.read_text(encoding="utf-8").split("\f")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--texts {texts}: not a text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"--texts {texts}: {error.strerror}") from error


def quality(
    model: Annotated[
        str, typer.Argument(help=f"A Transformers model id, a folder, or a .gguf file. Default: {MODEL}.")
    ] = "",
    codecs: Annotated[str, typer.Option(help="Names with commas between them, or all.")] = "all",
    texts: Annotated[
        Path | None,
        typer.Option(
            help="A text file to measure on, prompts separated by form feeds. Default: English, code, Chinese."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of the longest prompt.")] = 1536,
    block_tokens: Annotated[int, typer.Option(min=0, help="Tokens a block; 0: the model's default.")] = 0,
    kv_dtype: Annotated[str, typer.Option(help="Type of the KV: bfloat16, float16 or float32.")] = "bfloat16",
    greedy: Annotated[int, typer.Option(min=0, help="Tokens to write greedily after each prompt; 0: none.")] = 32,
    max_kl: Annotated[float, typer.Option(min=0, help="The limit above which a codec is refused.")] = 0.01,
    out: Annotated[Path, typer.Option(help="Folder for quality.json and quality.png.")] = Path("quality-out"),
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="The cache's directory, where the report is kept. Default: that of KVKEEP_CONFIG."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the model; 0: as torch sees fit.")] = 0,
    json_only: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
) -> None:
    """Measure what each codec costs and saves on your own model and texts, and say which to use.

    Runs on the CPU; a few minutes for the default model. The report is kept in the cache's directory: from then on a
    cache refuses a codec whose KL on this model is above its max_kl. Exit status 2: it could not be measured.
    """
    from kvkeep import config, registry
    from kvkeep import quality as reports
    from kvkeep.cli import losses
    from kvkeep.codecs import kernels

    errors = Console(stderr=True)
    name = model or MODEL
    names = list(CODECS) if codecs == "all" else [part.strip() for part in codecs.split(",") if part.strip()]
    if not names:
        fail("--codecs: name at least one codec, or all")
    if kv_dtype not in ("bfloat16", "float16", "float32"):
        fail(f"--kv-dtype {kv_dtype}: bfloat16, float16 or float32")
    try:
        configured = config.load()
        for each in names:
            registry.lookup("codecs", each)
        prompts = list(losses.default_texts()) if texts is None else _read(texts)
        # What cannot be written shall say so now, not after minutes of measuring.
        place = (directory or configured.dir).expanduser()
        reports.prepare(place)
        out.mkdir(parents=True, exist_ok=True)
        for made in (out / "quality.json", out / "quality.png"):
            made.open("ab").close()
            if not made.stat().st_size:
                made.unlink()
        with errors.status("loading the tokenizer", spinner="dots") as status:

            def progress(text: str) -> None:
                status.update(text)
                if not json_only and not errors.is_terminal:
                    errors.print(text, highlight=False)

            loaded = losses.Model(model, kv_dtype, threads, progress)
            least = max(losses.SHORTEST, block_tokens) + losses.FOLLOWING
            if texts is not None and not any(loaded.count(text) >= least for text in prompts):
                raise ConfigError(f"--texts {texts}: no text has {least} tokens")
            progress("loading the model")
            kernels.wait(60)
            loaded.load()
            identity = loaded.identity()
            layout = loaded.layout(identity, block_tokens)
            measured, count = losses.measure(
                loaded, layout, prompts, names, tokens=tokens, greedy=greedy, remote=configured.remote,
                progress=progress,
            )  # fmt: skip
        rows = tabulate(measured, layout)
        report = {
            "model": name,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "block_tokens": layout.block_tokens,
            "kv_dtype": kv_dtype,
            "prompts": count,
            "codecs": {row.codec: asdict(row) for row in rows},
        }
        place = reports.save(place, identity, report)
        advice = advise(rows, max_kl, 8 * layout.np_dtype.itemsize)
        whole = {**report, "codecs": [asdict(row) for row in rows], "max_kl": max_kl, "advice": advice}
        (out / "quality.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except (KVKeepError, OSError) as error:
        fail(str(error))
    title = f"{Path(name).name}: {count} prompts, KV in {kv_dtype}, blocks of {layout.block_tokens} tokens"
    drawn = False
    with suppress(ImportError):
        draw(rows, title, max_kl, out / "quality.png")
        drawn = True
    if json_only:
        print(json.dumps(whole, ensure_ascii=False))
        return
    console = Console()
    show(rows, title, advice, console)
    saved = [str(out / "quality.json"), *([str(out / "quality.png")] if drawn else [])]
    console.print(f"saved: {', '.join(saved)}; kept for kvkeep.open: {place}", highlight=False)
    if not drawn:
        console.print("no plot: pip install 'kvkeep[plot]'", highlight=False)
