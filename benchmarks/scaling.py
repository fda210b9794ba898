"""How time and memory grow with a case's size."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from benchmarks.entries import Entry

FEWEST_SIZES = 3  # two points fit any exponent
GROW_TOGETHER = {"T": ("T", "B"), "B": ("B",)}  # a batch of more tokens has more sequences too
SMALL_PEAK = 4 << 20  # bytes: what a process takes by the way, so no law can be read from less


@dataclasses.dataclass(frozen=True)
class Fit:
    """Exponents of one side of a case: its seconds, and its peak bytes, are proportional to size ** exponent."""

    family: str
    work: str
    fixed: str  # the sizes that stay as they are, and the dtype
    side: str
    letter: str  # the size that grows
    sizes: list[int]
    time: float
    memory: float | None  # None where too few sizes have a peak, or where it stays `small`
    small: bool  # no peak reaches SMALL_PEAK


def exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """The slope of log(amount) over log(size), by least squares. Raises ValueError at numbers that are not positive and
    statistics.StatisticsError where all sizes are equal."""
    line = statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in amounts])
    return line.slope


def series(entries: Sequence[Entry], letter: str) -> list[list[Entry]]:
    """Entries of the same case, work, dtype and side that differ in ``T`` (and B) or in ``B`` alone, in its order."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if letter in entry.sizes:
            key = entry.family, entry.work, fixed_sizes(entry, letter), entry.dtype, entry.side
            found.setdefault(key, []).append(entry)
    return [sorted(group, key=lambda entry: entry.sizes[letter]) for group in found.values()]


def fixed_sizes(entry: Entry, letter: str) -> str:
    """Of a shape, what stays as it is where `letter` grows: "d=1024 K=3"."""
    return " ".join(f"{x}={size}" for x, size in entry.sizes.items() if x not in GROW_TOGETHER[letter])


def fits(entries: Sequence[Entry]) -> list[Fit]:
    """Of every side that has been measured at three sizes or more."""
    found = []
    for letter in ("T", "B"):
        for group in series(entries, letter):
            sizes = [entry.sizes[letter] for entry in group]
            if len(set(sizes)) >= FEWEST_SIZES:
                found.append(_fit(group, letter, sizes))
    return found


def _fit(group: list[Entry], letter: str, sizes: list[int]) -> Fit:
    first = group[0]
    peaks = [
        (size, entry.peak_bytes)
        for size, entry in zip(sizes, group, strict=True)
        if (entry.peak_bytes or 0) > 0
    ]
    small = any(entry.peak_bytes is not None for entry in group) and all(y < SMALL_PEAK for _, y in peaks)
    enough = len({size for size, _ in peaks}) >= FEWEST_SIZES and not small
    return Fit(
        family=first.family,
        work=first.work,
        fixed=f"{fixed_sizes(first, letter)} {first.dtype}".strip(),
        side=first.side,
        letter=letter,
        sizes=sizes,
        time=exponent(sizes, [entry.seconds for entry in group]),
        memory=exponent(*zip(*peaks, strict=True)) if enough else None,
        small=small,
    )
