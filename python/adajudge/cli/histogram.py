"""How rewards and margins are spread: quantiles and bars on the terminal, and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adajudge.scoring.figures import Distribution

_QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
_LINES = 10
_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MOST_BARS = 60
_BLUE, _RED = "#4a6fa5", "#b04a4a"


def print_distribution(console: Console, distributions: Mapping[str, Distribution]) -> None:
    """Quantiles of each distribution that has numbers, and a histogram of the first in lines of text."""
    table = Table(box=None, pad_edge=False)
    for name in ("", *_QUANTILES):
        table.add_column(name, justify="right")
    for name, distribution in distributions.items():
        if distribution.count:
            table.add_row(name, *(f"{distribution.quantile(share):.4g}" for share in _QUANTILES.values()))
    console.print(table)
    counts, edges = next(iter(distributions.values())).histogram(_LINES)
    digits = max(0, 1 - math.floor(math.log10(edges[1] - edges[0])))
    edge_texts = ["", *(f"{edge:.{digits}f}" for edge in edges[1:-1]), ""]  # open at both ends
    width = max(map(len, edge_texts))
    ascii_only = console.options.ascii_only
    for line, count in enumerate(counts):
        bar = _bar(count / counts.max(), ascii_only)
        span = f"{edge_texts[line]:>{width}} .. {edge_texts[line + 1]:>{width}}"
        console.print(f"{span}  {bar:<{_BAR}} {count:>7,}", highlight=False, soft_wrap=True, markup=False)


def _bar(share: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * _BAR)
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + (_EIGHTHS[eighths] if eighths else "")


def save_picture(path: Path, rewards: Distribution, margins: Distribution, title: str) -> None:
    """A histogram of the rewards and, for pairs, one of the margins; the extension names the format.

    Args:
        path: of the picture.
        rewards: of all responses.
        margins: of all pairs; without any there is no second histogram.
        title: above it.

    Raises:
        ValueError: no such format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = [("reward", "responses", rewards), ("margin, chosen less rejected", "pairs", margins)]
    shown = [(name, what, distribution) for name, what, distribution in shown if distribution.count]
    figure = Figure(figsize=(6.4 * max(1, len(shown)), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for place, (name, what, distribution) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        bars = min(_MOST_BARS, 2 + math.ceil(2 * distribution.count ** (1 / 3)))  # Rice's rule
        counts, edges = distribution.histogram(bars)
        middles = (edges[1:] + edges[:-1]) / 2
        colors = [_RED if distribution is margins and x < 0 else _BLUE for x in middles]
        axes.bar(middles, counts, width=edges[1] - edges[0], color=colors, edgecolor="white", linewidth=0.4)
        median = distribution.quantile(0.5)
        axes.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {median:.3g}")
        axes.set_xlabel(f"{name} (what lies far out is in the outermost bars)")
        axes.set_ylabel(f"{what}, {distribution.count:,} in all")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
