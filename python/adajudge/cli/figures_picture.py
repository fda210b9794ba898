"""A picture of an evaluation: a bar for each figure of each group, with its interval and its number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adajudge.evaluation import Evaluation

_BLUES = ("#1f3b63", "#4a6fa5", "#8fb0d9", "#c9d8ec")


def save_picture(path: Path, evaluation: Evaluation) -> None:
    """Draw the figures in per cent, groups from the top, then totals; the extension names the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no such format.
    """
    from matplotlib.figure import Figure as Drawing

    every = sum(evaluation.rows.values())
    lines = [(group, evaluation.rows[group], columns) for group, columns in evaluation.figures.items()]
    if len(lines) > 1:
        lines += [(group, every, columns) for group, columns in evaluation.totals.items()]
    titles = list(lines[0][2])
    height = 0.8 / len(titles)
    drawing = Drawing(figsize=(7.0, 1.3 + 0.22 * len(lines) * (len(titles) + 0.7)), layout="constrained")
    axes = drawing.add_subplot()
    for place, title in enumerate(titles):
        for line, (_, _, columns) in enumerate(lines):
            figure = columns[title]
            at = line + (place - (len(titles) - 1) / 2) * height
            value = 0.0 if math.isnan(figure.value) else figure.value
            spread = None if math.isnan(figure.value) else [[value - figure.low], [figure.high - value]]
            axes.barh(
                at, value, height, xerr=spread, color=_BLUES[place % len(_BLUES)], label=None if line else title,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.35"},
            )  # fmt: skip
            number = "none" if math.isnan(figure.value) else f"{figure.value:.1f}"
            end = max(0.0, value if spread is None else figure.high)
            axes.annotate(number, (end, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [f"{group} ({rows})" for group, rows, _ in lines]
    axes.set_yticks(range(len(lines)), names)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.invert_yaxis()
    lowest = min((x.low for _, _, columns in lines for x in columns.values() if x.low < 0), default=0.0)
    axes.set_xlim(1.1 * lowest, 108)
    axes.set_xlabel("per cent, with 95 % interval")
    axes.set_title(f"{evaluation.benchmark}: groups, and their rows", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if len(titles) > 1:
        axes.legend(
            frameon=False, ncols=len(titles), fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.08)
        )
    drawing.savefig(path, dpi=120)
