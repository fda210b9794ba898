"""Score the rows of a file with a judge.

Exit code 0: every row scored. 1: some rows could not be (each has a record in the error file, every other row is
in the output). 2: the input, the output or the judge cannot be used at all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adajudge.cli.summary import Summary
    from adajudge.data import RowReader
    from adajudge.scoring import Scorer

_TABLE_ROWS = 100
_FILE_WIDTH = 120  # of what is printed to no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge score``."""
    parser.add_argument(
        "input", help="rows: .jsonl, .jsonl.gz, .json, .parquet, or - (jsonl on standard input)"
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="same formats; - is standard output")
    parser.add_argument("--model", metavar="DIR", help="folder of a saved judge; default: the built-in judge")
    parser.add_argument(
        "--max_length", "--max-length", type=int, help="tokens; default: the backbone's limit"
    )
    parser.add_argument(
        "--token_budget", "--token-budget", type=int, default=8192, help="padded tokens a batch"
    )
    parser.add_argument("--truncate_response", "--truncate-response", action="store_true",
                        help="cut a response that does not fit instead of refusing its row")  # fmt: skip
    parser.add_argument("--allow_unknown", "--allow-unknown", action="store_true",
                        help="score rows although the judge does not know their words")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ..; default: CUDA where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=None,
                        help=f"print the first {_TABLE_ROWS} rows as a table; default: on a terminal")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Score `args.input` into `args.output`."""
    from adajudge.data import DataFileError, read_rows

    partial, existed = Path(f"{args.output}.partial"), os.path.exists(args.output)
    before = _modified(partial)
    try:
        _check_outputs(args.input, args.output)
        reader = read_rows(args.input, keep_ties=True)
        scorer = _load(args)
        return _score(args, reader, scorer)
    except (DataFileError, OSError, ValueError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"adajudge score: {'interrupted' if interrupted else error}", file=sys.stderr)
        if args.output != "-" and _modified(partial) != before:
            state = "is as it was before" if existed else "does not exist"
            print(f"what was scored until then is in {partial}; {args.output} {state}", file=sys.stderr)
        return 130 if interrupted else 2


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _check_outputs(source: str, target: str) -> None:
    """The input is not lost: no file that the command writes or removes may be it. Nor is any of them a folder."""
    if target != "-" and os.path.isdir(f"{target}.errors.jsonl"):
        raise ValueError(f"--output {target}: its error file {target}.errors.jsonl is a folder")
    for name in (target, f"{target}.partial", f"{target}.errors.jsonl", f"{target}.errors.jsonl.partial"):
        if (
            source != "-"
            and os.path.exists(name)
            and os.path.exists(source)
            and os.path.samefile(source, name)
        ):
            raise ValueError(f"--output {target}: the input {source} would be overwritten; name another file")


def _load(args: argparse.Namespace) -> Scorer:
    import torch
    from transformers.utils import logging as transformers_logging

    from adajudge.scoring import Scorer

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"token_budget": args.token_budget, "truncate_response": args.truncate_response}
    if args.max_length is not None:
        options["max_length"] = args.max_length
    if args.allow_unknown:
        options["unknown_limit"] = 1.0
    if args.model is None:
        print("judge: the built-in one, which knows only its own small world (see its card); "
              "--model DIR names another", file=sys.stderr)  # fmt: skip
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.device is not None:
        try:
            torch.empty(0, device=args.device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {args.device} cannot be used: {reason}") from None
    try:
        return Scorer.from_pretrained(args.model, device=args.device, dtype=dtype, **options)
    except (TypeError, AttributeError, KeyError) as error:  # of a config.json that is something else
        raise ValueError(
            f"{args.model}: cannot be loaded as a judge: {type(error).__name__}: {error}"
        ) from error


def _score(args: argparse.Namespace, reader: RowReader, scorer: Scorer) -> int:
    from adajudge.cli.summary import Summary
    from adajudge.data import RowError
    from adajudge.data.writing import RecordWriter
    from adajudge_kernels.backends import FAMILIES, choose_backend

    device = next(scorer.model.parameters()).device
    choices = {family: choose_backend(device, family) for family in FAMILIES}  # or say now what is wrong
    summary = Summary(_TABLE_ROWS)
    error_path = None if args.output == "-" else f"{args.output}.errors.jsonl"
    started = time.perf_counter()
    with ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(args.output))
        errors: RecordWriter | None = None
        for result in _with_progress(scorer, reader):
            summary.add(result)
            if not isinstance(result, RowError):
                writer.write(result.to_record())
            elif error_path is None:
                print(json.dumps({"error": asdict(result)}, ensure_ascii=False), file=sys.stderr)
            else:
                errors = errors or stack.enter_context(RecordWriter(error_path))
                errors.write(asdict(result))
    if error_path is not None and errors is None and os.path.exists(error_path):
        os.remove(error_path)  # of an earlier run of the same command; this one has no errors
    summary.seconds, summary.tokens = time.perf_counter() - started, scorer.tokens_scored
    backend = f"{choices['pooling'].backend} on {device} ({choices['pooling'].reason})"
    _report(args, summary, backend, error_path)
    return 1 if summary.errors else 0


def _with_progress(scorer: Scorer, reader: RowReader) -> Iterator[Any]:
    """The results, under a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = reader.total() if console.is_terminal else None
        task, started = progress.add_task("", total=total, rate=""), time.perf_counter()
        for count, result in enumerate(scorer.score(reader), 1):
            seconds = time.perf_counter() - started
            rate = f"{count / seconds:,.0f} rows/s, {scorer.tokens_scored / seconds:,.0f} tokens/s"
            progress.update(task, completed=count, rate=rate)
            yield result


def _report(args: argparse.Namespace, summary: Summary, backend: str, error_path: str | None) -> None:
    from rich.console import Console

    from adajudge.scoring import BUILT_IN_JUDGE

    console = Console(stderr=args.output == "-")
    if not console.is_terminal:
        console = Console(stderr=args.output == "-", width=_FILE_WIDTH)
    shown = console.is_terminal and args.output != "-" if args.table is None else args.table
    if shown:
        summary.print_table(console)
    card = BUILT_IN_JUDGE / "results.json" if args.model is None else None
    summary.print_figures(console, card)
    console.print(f"backend: {backend}", highlight=False)
    if args.output != "-":
        console.print(f"written: {args.output}", highlight=False, soft_wrap=True, markup=False)
    if summary.errors and error_path is not None:
        console.print(
            f"not scored: {len(summary.errors)} rows, see {error_path}",
            style="red",
            soft_wrap=True,
            markup=False,
        )
