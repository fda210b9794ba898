"""Figures that a page takes from the measured ones are those of the last run."""

import re
from pathlib import Path

from benchmarks.entries import Run

ROOT = Path(__file__).parents[2]


def test_the_arithmetic_of_a_billion_responses_is_of_the_last_run():
    page = " ".join((ROOT / "docs/scale.md").read_text().split())
    measured = re.search(
        r"([\d,]+) useful tokens a second .* one by one ([\d,]+)\)\. A response has 576 of them: (\d+) responses a "
        r"second, so a billion take ([\d,]+) hours of such a machine, or 24 hours of (\d+) of them",
        page,
    )
    said = [int(figure.replace(",", "")) for figure in measured.groups()]
    (results,) = ROOT.glob("benchmarks/results/cpu-*.json")
    entries = [
        x for x in Run.read(results).entries if x.family == "candidates of one prompt" and x.work == "forward"
    ]
    ours, alone = (
        next(x.useful_tokens_per_second for x in entries if x.side == side)
        for side in ("adajudge_kernels", "one by one")
    )
    rows = ours / 576
    hours = 1e9 / rows / 3600
    assert said == [round(x) for x in (ours, alone, rows, hours, hours / 24)]
