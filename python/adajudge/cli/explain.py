"""Explain rewards: what each view says, which tokens are read, and the reward without each part of a response.

Exit code 0: every row was explained. 1: some rows could not be (they are named). 2: the input, the output or the judge cannot
be used.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.cli import judge_options
from adajudge.cli.targets import check_extension, check_targets

if TYPE_CHECKING:
    from adajudge.data import Row, RowError
    from adajudge.explain import Explanation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge explain``."""
    parser.add_argument(
        "input", help="rows: .jsonl, .jsonl.gz, .json, .parquet, or - (jsonl on standard input)"
    )
    parser.add_argument("--output", required=True, metavar="OUT.html",
                        help="a page to look at; .jsonl or .jsonl.gz for the numbers")  # fmt: skip
    parser.add_argument("--rows", type=_count, default=20, help="the first so many rows; default 20")
    judge_options.add_arguments(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} came, expected at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Explain the first rows of `args.input`."""
    from adajudge.data import RowError, read_rows
    from adajudge.explain import explain, write_page

    try:
        check_extension("output", args.output, [".html", ".jsonl", ".jsonl.gz"])
        check_targets({"output": args.output}, [args.input])
        reader = read_rows(args.input, keep_ties=True)
        scorer = judge_options.load_scorer(args, args.device)
        found: list[tuple[Row, list[Explanation]] | RowError] = []
        for row in itertools.islice(reader, args.rows):
            outcome = row if isinstance(row, RowError) else explain(scorer, row)
            found.append(outcome if isinstance(outcome, RowError) else (row, outcome))  # type: ignore[arg-type]
        if args.output.lower().endswith(".html"):
            write_page(
                args.output, found, f"{Path(args.input).name}, by {args.model or 'the built-in judge'}"
            )
        else:
            _write_records(args.output, found)
    except (OSError, ValueError) as error:
        print(f"adajudge explain: {error}", file=sys.stderr)
        return 2
    errors = [item for item in found if isinstance(item, RowError)]
    for item in errors:
        print(f"not explained: {item}", file=sys.stderr)
    print(f"{len(found) - len(errors)} rows explained: {args.output}")
    return 1 if errors else 0


def _write_records(target: str, found: list[tuple[Row, list[Explanation]] | RowError]) -> None:
    from dataclasses import asdict

    from adajudge.data import RowError
    from adajudge.data.writing import RecordWriter

    with RecordWriter(target) as writer:
        for item in found:
            record: dict[str, Any]
            if isinstance(item, RowError):
                record = {"id": item.id, "error": asdict(item)}
            else:
                record = {"id": item[0].id, "explanations": [x.to_record() for x in item[1]]}
            writer.write(record)
