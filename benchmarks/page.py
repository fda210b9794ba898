"""The page ``docs/benchmarks.md``: every case with all its sides, how time and memory grow, what scoring costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.case import FLOOR, OURS
from benchmarks.entries import Entry, Run
from benchmarks.markdown import grid, megabytes, share, thousands, time, times
from benchmarks.scaling import FEWEST_SIZES, SMALL_PEAK, Fit, fits

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.report` from the files in [benchmarks/results](../benchmarks/results), which `make bench` and
`make bench-gpu` write. Every side is compared with the exact result (fp64; for whole judges on a GPU fp32) before it is timed,
but for "backbone alone": what ours would take if its head cost nothing.

- **time**: the median of the rounds, on GPUs between two CUDA events.
- **over ours**: how many times our time a side takes, on CPUs asked in every round, and the median of that: a machine's memory
  is not equally fast from second to second, so it is not the quotient of two rows' times. Right before each of the two a sum
  over memory empties the caches of both.
- **useful per second**: tokens of the sequences, without padding, a shared prompt's once for each of its responses; for experts
  and loss, sequences.
- **of bandwidth**: the bytes that must move at least, per second, over what a sum (CPU) or a copy (GPU) of the same states
  reaches between the rounds, or of other numbers where these have fewer than 32 MiB. For matrix products of many rows
  bandwidth is not the limit, and inputs that stay in a cache can exceed it.
- **peak MB**: memory that the computation takes at most beyond its inputs, in 10^6 bytes.
- **eager products** of pooling: what is linear in the states is done before they are mixed, so that no mixed state is formed.
- **eager packed**: plain PyTorch on packed rows. Liger-Kernel and flash-linear-attention are there where a
  GPU has them installed (`pip install -e '.[bench-libraries]'`): their norms and SwiGLU, the same matrix products, and our
  attention, flash-linear-attention's its own.
- **prompts not shared** of scoring: our judge on packed rows, each with its own prompt.
- **scoring** reads prompts of RM-Bench, of 10 to 100 tokens: what it gains is padding, hardly shared prompts. "Candidates of
  one prompt" has a long one.
- **eager cost of**: what a call of the Triton backend costs the CPU, launches left out on all sides, beside the same call
  through its `torch.library` operator; "launches prepared" is the part of it that readies outputs, scratch memory and grids."""

PICTURES = {
    "bandwidth": "share of bandwidth, and roofline",
    "speedup": "speed-up over T",
    "memory": "memory over T",
}


def page(runs: Sequence[Run], pictures: Sequence[Sequence[Path]], price_per_hour: float) -> str:
    """The page in Markdown.

    Args:
        pictures: the files of each run, in the page's folder.
        price_per_hour: of each run's machine, for what a million tokens cost.
    """
    sections = [INTRODUCTION]
    for run, files in zip(runs, pictures, strict=True):
        sections += [f"## {run.device}", f"{machine(run)}."]
        sections += [f"![{PICTURES[path.stem.rpartition('-')[2]]}]({path.name})" for path in files]
        sections += _cases(run)
        sections += ["### Scaling", SCALING, scaling_table(run)] if fits(run.entries) else []
        sections += _costs(run, price_per_hour)
    return "\n\n".join(sections) + "\n"


SCALING = f"""Time and peak memory as size ** exponent, by least squares of the logarithms over {FEWEST_SIZES} sizes
or more. Where T grows, so does the number of sequences. An exponent below 1: something does not grow with the size, as a call's
own cost. Peaks that stay below {SMALL_PEAK >> 20} MiB say nothing."""


def scaling_table(run: Run) -> str:
    """The fitted exponents of a run, in Markdown."""
    header = ["case", "work", "side", "over", "time exponent", "memory exponent"]
    return grid(header, [_fit_row(fit) for fit in fits(run.entries)])


def _fit_row(fit: Fit) -> list[str]:
    over = f"{fit.letter} = {', '.join(map(str, fit.sizes))}"
    memory = f"below {SMALL_PEAK >> 20} MiB" if fit.small else ""
    if fit.memory is not None:
        memory = f"{fit.memory:.2f}"
    return [f"{fit.family}, {fit.fixed}", fit.work, fit.side, over, f"{fit.time:.2f}", memory]


def cost_per_million_tokens(tokens_per_second: float, price_per_hour: float) -> float:
    """In the price's currency: ``price_per_hour / (tokens_per_second * 3600) * 1e6``. Raises ZeroDivisionError at no tokens."""
    return price_per_hour / (tokens_per_second * 3600) * 1e6


def machine(run: Run) -> str:
    """What a run was measured on and with, and when."""
    threads = sorted({entry.threads for entry in run.entries if entry.threads})
    said = [f"{run.machine.get('processor', 'unknown')}, {run.machine.get('cores')} cores"]
    said += [f"{' and '.join(map(str, threads))} threads"] if threads else []
    said += [
        f"{name} {run.machine[name]}" for name in ("python", "torch", "cuda", "triton") if name in run.machine
    ]
    measured = f"{run.date}, commit {run.commit}" if run.commit else run.date
    return f"{', '.join(said)}; {measured}"


def _cases(run: Run) -> list[str]:
    """A heading and a table for each of the test files."""
    sources: dict[str, list[Entry]] = {}
    for sides in run.cases.values():
        for entry in sides.values():
            sources.setdefault(entry.source, []).append(entry)
    sections = []
    for source, entries in sources.items():
        title = source.removeprefix("test_").removesuffix(".py").replace("_", " ").capitalize()
        header = ["case", "work", "side", "time", "over ours", "useful per second", "of bandwidth", "peak MB"]
        sections.append(f"### {title}\n\n[{source}](../benchmarks/{source})")
        sections.append(grid(header, [_side_row(run, entry) for entry in entries]))
        sections += [
            _head_overhead(run, entry) for entry in entries if entry.head_share and entry.side == FLOOR
        ]
    return sections


def _head_overhead(run: Run, floor: Entry) -> str:
    """What scoring takes beyond the backbone, beside what the head has of the arithmetic."""
    ratio = run.speedup(floor)
    assert ratio is not None
    assert floor.head_share is not None
    return (
        f"{floor.name}: {share(1 - ratio)} of the time is not the backbone's, and {share(floor.head_share)} of the "
        "multiply-adds are the head's."
    )


def _side_row(run: Run, entry: Entry) -> list[str]:
    return [
        entry.name,
        entry.work,
        entry.side,
        time(entry.seconds),
        "" if entry.side == OURS else times(run.speedup(entry)),
        thousands(entry.useful_tokens_per_second),
        share(entry.share_of_bandwidth),
        megabytes(entry.peak_bytes),
    ]


def _costs(run: Run, price_per_hour: float) -> list[str]:
    rows = [
        [
            entry.name,
            entry.side,
            thousands(entry.useful_tokens_per_second),
            f"{cost_per_million_tokens(entry.useful_tokens_per_second, price_per_hour):.3g}",
        ]
        for entry in run.entries
        if entry.case.startswith("scoring") and entry.useful_tokens_per_second
    ]
    if not rows:
        return []
    formula = f"""Of a million useful tokens, for a machine at {price_per_hour:g} an hour:
`price_per_hour / (tokens_per_second * 3600) * 1e6`. For another price multiply, or
`python -m benchmarks.report --price-per-hour PRICE`."""
    header = ["case", "side", "useful tokens per second", "cost per million"]
    return ["### What scoring costs", formula, grid(header, rows)]
