"""``python -m benchmarks.report [FILE ...]``: the README's tables, and a page with everything and its pictures.

Without files it reports every one in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.case import OURS
from benchmarks.entries import MAIN, Entry, Run
from benchmarks.markdown import grid, megabytes, share, thousands, time, times
from benchmarks.page import machine, page, scaling_table

ROOT = Path(__file__).parent.parent
# What stands between these lines of the README is written by this program.
BEGIN, END = "<!-- measured: written by make bench and make bench-gpu -->", "<!-- end of measured -->"


def table(path: str | Path) -> str:
    """What the README says of a file, in Markdown.

    A row for each case, dtype and work, of its largest size (of those with the most main sides): our time, how many times
    ours the time of each main other side is, the share of the bandwidth that we reach, and peak memory beyond the inputs in
    MB, ours and eager's. Where no main side is measured (whole judges), a second table has the useful tokens per second of
    every side, and its time over ours. Entries without a shape are the page's alone.

    Raises:
        OSError, ValueError, KeyError: where that is no file of pytest-benchmark.
    """
    run = Run.read(path)
    others = [name for name in MAIN if any(name in sides for sides in run.operations.values())]
    tables = []
    if run.operations:
        header = ["case", "work", OURS, *others, "of bandwidth", "MB, ours / eager"]
        rows = [[*key, *_comparison(run, sides, others)] for key, sides in _largest(run)]
        tables.append(grid(header, rows))
    rows = [
        [
            ", ".join(filter(None, key)),
            side,
            thousands(entry.useful_tokens_per_second),
            "" if side == OURS else times(run.speedup(entry)),
        ]
        for key, sides in run.cases.items()
        if key not in run.operations
        for side, entry in sides.items()
        if entry.shape and entry.useful_tokens_per_second
    ]
    if rows:
        tables.append(grid(["whole judge", "side", "useful tokens per second", "over ours"], rows))
    return "\n\n".join(tables)


def tables(paths: Sequence[Path]) -> str:
    """Of each file its machine and its `table`."""
    return "\n\n".join(f"{machine(Run.read(path))}:\n\n{table(path)}" for path in paths)


def with_tables(readme: str, written: str) -> str:
    """The README with these tables.

    Raises:
        ValueError: it does not hold the two lines between which tables stand.
    """
    before, begin, rest = readme.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"\n{END}\n")
    if not begin or not end:
        raise ValueError(f"expected a line {BEGIN!r} and after it a line {END!r}")
    return f"{before}{begin}\n{written}\n{end}{after}"


def _largest(run: Run) -> list[tuple[tuple[str, str], dict[str, Entry]]]:
    """Of `Run.operations` one size of each case, dtype and work, in their order."""

    def case(sides: dict[str, Entry]) -> tuple[str, ...]:
        ours = sides[OURS]
        return ours.source, ours.family, ours.dtype, ours.work

    def size(sides: dict[str, Entry]) -> tuple[int, int]:
        return len(set(MAIN) & set(sides)), sides[OURS].bytes_that_must_move or 0

    most: dict[tuple[str, ...], tuple[int, int]] = {}
    for sides in run.operations.values():
        most[case(sides)] = max(most.get(case(sides), (0, 0)), size(sides))
    return [(key, sides) for key, sides in run.operations.items() if size(sides) == most[case(sides)]]


def _comparison(run: Run, sides: dict[str, Entry], others: Sequence[str]) -> list[str]:
    ours = sides[OURS]
    ratios = [times(run.speedup(sides[name])) if name in sides else "" for name in others]
    peaks = [entry.peak_bytes for entry in (ours, sides.get("eager", ours))]
    memory = "" if None in peaks or "eager" not in sides else " / ".join(map(megabytes, peaks))
    return [time(ours.seconds), *ratios, share(ours.share_of_bandwidth), memory]


def price(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} came, expected a positive number")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its pictures, and the README's tables if asked to; print each file's table and exponents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="default: benchmarks/results/*.json"
    )
    parser.add_argument("--price-per-hour", type=price, default=1.0, help="of the machine, in any currency")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where page and pictures go")
    parser.add_argument("--readme", type=Path, help="whose tables are replaced by these")
    given = parser.parse_args(arguments)
    files = given.files or sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if given.docs.exists() and not given.docs.is_dir():
        parser.error(f"--docs: {given.docs} is no folder")
    given.docs.mkdir(parents=True, exist_ok=True)
    runs = []
    for path in files:
        try:
            runs.append(Run.read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"{path}: expected a file that --benchmark-json has written: {error!r}")
    pictures = [plots.draw(run, given.docs) for run in runs]
    text = page(runs, pictures, given.price_per_hour)
    (given.docs / "benchmarks.md").write_text(text, encoding="utf-8")
    if given.readme:
        try:
            readme = with_tables(given.readme.read_text(encoding="utf-8"), tables(files))
        except (OSError, ValueError) as error:
            parser.error(f"--readme: {given.readme}: {error}")
        given.readme.write_text(readme, encoding="utf-8")
    for path, run in zip(files, runs, strict=True):
        print(f"{run.device}, {run.date}:\n\n{table(path)}\n\n{scaling_table(run)}\n")


if __name__ == "__main__":
    main()
