"""The pictures of the benchmark page: shares of bandwidth with the roofline, speed-up over T, memory over T."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.case import OURS
from benchmarks.entries import Entry, Run
from benchmarks.scaling import fixed_sizes, series

COLOURS = {  # of a side, the same in every picture
    OURS: "#1f77b4",
    "eager": "#d62728",
    "torch.compile": "#ff7f0e",
    "eager products": "#e377c2",
    "eager packed": "#9467bd",
    "eager packed, torch.compile": "#ffbb78",
    "prompts not shared": "#bcbd22",
    "adajudge_kernels padded": "#17becf",
    "triton": "#2ca02c",
    "cuda": "#8c564b",
}
OTHER_COLOUR = "0.5"
MARKERS = {"fp32": "o", "bf16": "s"}
LEAST_MEGABYTES = 0.1  # what takes less is drawn there: a logarithmic axis has no zero
DOTS_PER_INCH = 130


def draw(run: Run, folder: Path) -> list[Path]:
    """Write a run's pictures as ``benchmarks-<device kind>-<picture>.png`` and return their paths; a picture that nothing was
    measured for is left out. Raises OSError where the folder cannot be written."""
    paths = []
    for name, make in (("bandwidth", bandwidth), ("speedup", speedup), ("memory", memory)):
        figure = make(run)
        if figure is not None:
            paths.append(folder / f"benchmarks-{run.device_kind}-{name}.png")
            figure.suptitle(run.device)
            figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    return paths


def bandwidth(run: Run) -> Figure | None:
    """Operations without matrix products as shares of the measured bandwidth; below them the roofline of the others."""
    entries = [entry for sides in run.operations.values() for entry in sides.values() if entry.bandwidth]
    reached = [entry for entry in entries if not entry.multiply_adds]
    multiplying = [entry for entry in entries if entry.multiply_adds]
    if not reached and not multiplying:
        return None
    works = _distinct(entry.work for entry in [*reached, *multiplying])
    cases = _distinct(entry.name for entry in reached)
    heights = [0.28 * len(cases) + 1] * bool(cases) + [3.5] * bool(multiplying)
    figure = Figure(figsize=(4.2 * len(works) + 3, sum(heights) + 1), layout="constrained")
    grid = figure.subplots(len(heights), len(works), squeeze=False, height_ratios=heights, sharey="row")
    for column, work in enumerate(works):
        if reached:
            _shares(grid[0, column], [entry for entry in reached if entry.work == work], cases)
            grid[0, column].set_title(work)
        products = [entry for entry in multiplying if entry.work == work]
        if products:
            _roofline(grid[-1, column], products)
            grid[-1, column].set_title(f"matrix products, {work}")
        elif multiplying:
            grid[-1, column].set_visible(False)
    if multiplying:
        grid[-1, 0].set_ylabel("GFLOP/s")
        grid[-1, 0].set_ylim(bottom=min(map(_gigaflops, multiplying)) / 20)  # the sizes stand there
    _legend(figure, [*reached, *multiplying], {entry.dtype for entry in multiplying})
    return figure


def _shares(axes: Axes, entries: Sequence[Entry], cases: Sequence[str]) -> None:
    for entry in entries:
        row, share = cases.index(entry.name), 100 * entry.share_of_bandwidth
        if entry.side == OURS:
            axes.barh(row, share, height=0.7, color=COLOURS[OURS], alpha=0.45)
        else:
            axes.plot(share, row, "o", color=_colour(entry), markeredgecolor="white", markersize=8)
    axes.axvline(100, color="0.3", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of bandwidth (bar: adajudge_kernels)")
    axes.grid(axis="x", alpha=0.3)


def _gigaflops(entry: Entry) -> float:
    return 2 * entry.multiply_adds / entry.seconds / 1e9


def _roofline(axes: Axes, entries: Sequence[Entry]) -> None:
    """Operations per second over operations per byte, and what bandwidth allows."""
    labels: dict[tuple[str, str], float] = {}
    intensities = [2 * entry.multiply_adds / entry.bytes_that_must_move for entry in entries]
    for entry, intensity in zip(entries, intensities, strict=True):
        marker = MARKERS.get(entry.dtype, "^")
        axes.plot(intensity, _gigaflops(entry), marker, color=_colour(entry), alpha=0.8, markersize=7)
        labels[entry.shape.partition(" ")[0], entry.dtype] = intensity
    for index, ((size, _), intensity) in enumerate(sorted(labels.items(), key=lambda label: label[1])):
        place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        height = (0.02, 0.16, 0.30)[index % 3]  # neighbours can come close to each other
        axes.text(intensity, height, size, rotation=90, fontsize=8, **place)
    allowed = statistics.median(entry.bandwidth for entry in entries) / 1e9
    ends = [min(intensities), max(map(_gigaflops, entries)) / allowed]
    axes.plot(ends, [allowed * end for end in ends], "--", color="0.3", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel(f"operations per byte (dashed: {allowed:.0f} GB/s)")
    axes.grid(alpha=0.3)


def _plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis: 1, 2, 5, 10 .."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def speedup(run: Run) -> Figure | None:
    """How many times our time the others take, over T."""

    def curve(entry: Entry) -> float | None:
        return None if entry.side == OURS else run.speedup(entry)

    def finish(axes: Axes) -> None:
        axes.axhline(1, color="0.3", linewidth=1)
        axes.set_ylim(bottom=0)

    return _over_tokens(run, curve, "time over ours", finish)


def memory(run: Run) -> Figure | None:
    """What each side takes beyond its inputs, over T."""

    def curve(entry: Entry) -> float | None:
        return None if entry.peak_bytes is None else max(entry.peak_bytes / 1e6, LEAST_MEGABYTES)

    def finish(axes: Axes) -> None:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)

    return _over_tokens(run, curve, f"peak memory, MB ({LEAST_MEGABYTES}: or less)", finish)


def _over_tokens(
    run: Run, curve: Callable[[Entry], float | None], label: str, finish: Callable[[Axes], None]
) -> Figure | None:
    """A row of panels for each case that was measured at several T, a column for each work, a line for each side."""
    panels: dict[str, dict[str, list[list[Entry]]]] = {}
    drawn: list[Entry] = []
    for group in series(run.entries, "T"):
        shown = [entry for entry in group if curve(entry) is not None]
        if len({entry.sizes["T"] for entry in shown}) > 1:
            first = shown[0]
            title = ", ".join([first.family, f"{fixed_sizes(first, 'T')} {first.dtype}"])
            panels.setdefault(title, {}).setdefault(first.work, []).append(shown)
            drawn += shown
    if not drawn:
        return None
    works = _distinct(entry.work for entry in drawn)
    figure = Figure(figsize=(4.6 * len(works) + 0.6, 3.2 * len(panels) + 1), layout="constrained")
    grid = figure.subplots(len(panels), len(works), squeeze=False, sharey="row")
    for row, (title, by_work) in zip(grid, panels.items(), strict=True):
        for axes, work in zip(row, works, strict=True):
            axes.set_visible(work in by_work)
            if work in by_work:
                _lines(axes, by_work[work], curve)
                axes.set_title(f"{title}\n{work}", fontsize=10)
                finish(axes)
        row[0].set_ylabel(label)
    _legend(figure, drawn, set())
    return figure


def _lines(axes: Axes, groups: Sequence[Sequence[Entry]], curve: Callable[[Entry], float | None]) -> None:
    for group in groups:
        tokens = [entry.sizes["T"] for entry in group]
        axes.plot(tokens, [curve(entry) for entry in group], "o-", color=_colour(group[0]), markersize=5)
    ticks = sorted({entry.sizes["T"] for group in groups for entry in group})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}".replace(",", " ") for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("T, tokens")
    axes.grid(alpha=0.3)


def _legend(figure: Figure, entries: Sequence[Entry], dtypes: set[str]) -> None:
    """Below the panels: sides by colour, and dtypes by marker."""
    sides = {entry.side: _colour(entry) for entry in entries}
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=side) for side, colour in sides.items()
    ]
    handles += [
        Line2D([], [], color="0.3", marker=MARKERS.get(dtype, "^"), linestyle="", label=dtype)
        for dtype in sorted(dtypes)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _colour(entry: Entry) -> str:
    return COLOURS.get(entry.side, OTHER_COLOUR)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
