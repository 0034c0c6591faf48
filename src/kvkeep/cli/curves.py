"""The picture of ``kvkeep replay --plot``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvkeep.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")
STRONG = {"lru": ("black", "-"), "hazard": ("tab:red", "-"), "opt": ("dimgray", "--"), "unlimited": ("dimgray", ":")}
"""The lines that a reader looks for; the others share the palette."""


def require(path: Path, *, tiers: bool) -> None:
    """Say before the work what would fail after it. Raises :class:`ConfigError`."""
    if tiers:
        raise ConfigError("--plot draws curves over capacities: with --tiers there are none")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name ends in one of {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no such directory")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'kvkeep[plot]'")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Token-hit ratio over capacity, one panel a trace. May raise ``OSError``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    names = list(dict.fromkeys(row["trace"] for row in rows))
    figure = Figure(figsize=(7.5 * len(names), 5.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        part = [row for row in rows if row["trace"] == name]
        others = iter(matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
        for policy in dict.fromkeys(row["policy"] for row in part):
            points = [(row["capacity_share"], row["token_hit_ratio"]) for row in part if row["policy"] == policy]
            if policy == "unlimited":
                panel.axhline(points[0][1], color="dimgray", linestyle=":", label=policy)
                continue
            color, line = STRONG.get(policy) or (next(others, "gray"), "-")
            strong = policy in STRONG
            panel.plot(
                *zip(*points, strict=True),
                line,
                color=color,
                marker="o",
                markersize=4 if strong else 3,
                linewidth=2 if strong else 1,
                label=policy,
                zorder=3 if strong else 2,
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        panel.set_ylim(bottom=0)
        panel.set_xlabel(f"capacity, share of {part[-1]['capacity_blocks']:,} unique blocks")
        panel.set_ylabel("token-hit ratio")
        panel.set_title(name)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
