"""Evaluate a judge on RM-Bench, JudgeBench, RewardBench 2 or pairs of your own, from local files.

Exit code 0: every row was scored. 1: some rows could not be (they are listed, and count in no figure). 2: the files or the
judge cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adajudge.cli import judge_options
from adajudge.cli.progress import progress
from adajudge.cli.targets import check_extension, check_picture, check_targets

if TYPE_CHECKING:
    from adajudge.evaluation import Evaluation
    from adajudge.scoring import Scorer

_SHOWN_ERRORS = 20
_NAMES = ("judge-bench", "reward-bench-2", "rm-bench", "pairs")  # BENCHMARKS, which is slow to import
_DOMAINS = ("safety-refuse", "safety-response", "chat", "code", "math", "safety")  # likewise
_FILE_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge eval``."""
    parser.add_argument("input", nargs="+", help="files of one benchmark: .jsonl, .jsonl.gz, .json, .parquet")
    parser.add_argument("--benchmark", choices=_NAMES, help="default: what the first record looks like")
    parser.add_argument("--domain", choices=_DOMAINS,
                        help="of RM-Bench's rows that have none; default: what the file's name says")  # fmt: skip
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the figures; needs matplotlib")
    judge_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate on `args.input`."""
    from adajudge.evaluation.evaluation import check_files, evaluate

    try:
        _check_targets(args)
        check_files(args.input, args.benchmark, args.domain)
        scorer = judge_options.load_scorer(args, args.device)
        with progress(lambda: _total(args.input), lambda: scorer.tokens_scored) as show:
            evaluation = evaluate(
                scorer,
                args.input,
                benchmark=args.benchmark,
                domain=args.domain,
                on_row=lambda rows: show("scoring", rows, rows),
            )
        if args.output is not None:
            _write(args, scorer, evaluation)
        if args.plot is not None:
            from adajudge.cli.figures_picture import save_picture

            save_picture(Path(args.plot), evaluation)
        _print(evaluation)
    except (OSError, ValueError) as error:
        print(f"adajudge eval: {error}", file=sys.stderr)
        return 2
    return 1 if evaluation.errors else 0


def _check_targets(args: argparse.Namespace) -> None:
    if args.output is not None:
        check_extension("output", args.output, [".json"])
    if args.plot is not None:
        check_picture(args.plot)
    check_targets({"output": args.output, "plot": args.plot}, args.input)


def _total(files: Sequence[str]) -> int | None:
    from adajudge.data import read_rows

    totals = [read_rows(file).total() for file in files]
    return None if None in totals else sum(filter(None, totals))


def _print(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    titles = next(iter(evaluation.figures.values()))
    heading = f"{evaluation.benchmark}, per cent [95 % interval]"
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("rows", justify="right")
    for title in titles:
        table.add_column(title, justify="right")
    every = sum(evaluation.rows.values())
    lines = [(group, evaluation.rows[group], columns) for group, columns in evaluation.figures.items()]
    if len(lines) > 1:  # else its figures are the total's
        lines += [(group, every, columns) for group, columns in evaluation.totals.items()]
    for group, rows, columns in lines:
        table.add_row(escape(group), str(rows), *(str(columns[title]) for title in titles))
    console.print(table)
    for count, what in (
        (evaluation.ties, "pairs without a preference were left out"),
        (evaluation.truncated, "rows were cut to the judge's length, and count"),
        (evaluation.with_control_tokens, "rows hold control tokens, and count"),
    ):
        if count:
            console.print(f"{count} {what}", highlight=False)
    for group, columns in evaluation.figures.items():
        if any(math.isnan(figure.value) for figure in columns.values()):
            reason = "no row has the other row that its figure needs"
            console.print(f"{group}: {reason}; in no total", highlight=False, markup=False)
    for file, error in evaluation.errors[:_SHOWN_ERRORS]:
        print(f"not scored: {file}: {error}", file=sys.stderr)
    if len(evaluation.errors) > _SHOWN_ERRORS:
        print(f"not scored: and {len(evaluation.errors) - _SHOWN_ERRORS} more", file=sys.stderr)


def _write(args: argparse.Namespace, scorer: Scorer, evaluation: Evaluation) -> None:
    """The figures, and what they are of."""
    from adajudge.data.writing import write_text
    from adajudge.scoring.description import describe, describe_machine

    record = {
        **evaluation.to_record(),
        "files": list(args.input),
        "model": args.model or "built-in judge",
        "judge": describe(scorer),
        "machine": describe_machine(scorer.engine.device),
    }
    write_text(args.output, json.dumps(record, indent=1) + "\n")
