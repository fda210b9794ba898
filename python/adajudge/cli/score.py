"""Score the rows of a file with a judge.

Exit code 0: every row scored. 1: some rows could not be (each has a record in the error file, every other row is
in the output). 2: the input, the output or the judge cannot be used at all, or scoring crashed. 130: interrupted.

What is scored is kept in parts in the folder OUT.parts until all is. Killed at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from adajudge.builtin import BUILT_IN_JUDGE
from adajudge.cli import judge_options
from adajudge.cli.judge_options import load_scorer
from adajudge.cli.progress import progress
from adajudge.cli.targets import check_picture

if TYPE_CHECKING:
    from adajudge.cli.summary import Summary
    from adajudge.data import RowReader
    from adajudge.scoring import Scorer, ScoringJob
    from adajudge.scoring.parts import Part
    from adajudge.scoring.ranks import Ranks

_TABLE_ROWS = 100
_FILE_WIDTH = 120  # of what is printed to no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge score``."""
    parser.add_argument(
        "input", help="rows: .jsonl, .jsonl.gz, .json, .parquet, or - (jsonl on standard input)"
    )
    parser.add_argument("--output", required=True, metavar="OUT",
                        help="same formats; what is scored is kept in OUT.parts until all is, and the same command goes "
                        "on after an interruption. - is standard output: streamed, cannot go on")  # fmt: skip
    parser.add_argument("--fresh", action="store_true",
                        help="begin anew, although OUT.parts has parts of an interrupted run")  # fmt: skip
    parser.add_argument("--window", type=int, default=512,
                        help="rows that are sorted and packed together, and make a part; default 512")  # fmt: skip
    judge_options.add_arguments(parser)
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=None,
                        help=f"print the first {_TABLE_ROWS} rows as a table; default: on a terminal")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE.png", help="histogram of the rewards, and of the margins of pairs; "
                        "needs matplotlib")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Score `args.input` into `args.output`."""
    from adajudge.data import DataFileError, read_rows
    from adajudge.scoring.ranks import RankError, Ranks

    started = time.time_ns()
    try:
        ranks = Ranks.from_environment()
        with ranks.told_of_errors():
            _check_ranks(args, ranks)
            _check_outputs(args)
            reader = read_rows(args.input, keep_ties=True)
            scorer = _load(args, ranks)
            return _score(args, reader, scorer, ranks)
    except ModuleNotFoundError:  # the command line says what to install
        raise
    except (DataFileError, OSError, ValueError, RankError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        print(f"adajudge score: {'interrupted' if interrupted else error}", file=sys.stderr)
        _print_what_is_left(args.output, started)
        return 130 if interrupted else 2
    except Exception as error:  # of a kernel, the device, this program; 1 would say that OUT is there
        traceback.print_exc()
        print(f"adajudge score: crashed with {type(error).__name__}, see above", file=sys.stderr)
        _print_what_is_left(args.output, started)
        return 2


def _print_what_is_left(output: str, started: int) -> None:
    """Where the work of this run is, if it left any."""
    from adajudge.scoring.jobs import holds_parts_since, job_folder

    if output != "-" and holds_parts_since(output, started):
        state = "is as it was before" if os.path.exists(output) else "does not exist"
        print(
            f"what was scored until then is in {job_folder(output)}, and the same command goes on from there; "
            f"{output} {state}",
            file=sys.stderr,
        )


def _check_outputs(args: argparse.Namespace) -> None:
    """The input is not lost: nothing that the command writes or removes may be it. Nor is any of it a folder."""
    from adajudge.data.writing import check_target
    from adajudge.scoring.jobs import error_file, job_folder

    source, target = args.input, args.output
    check_target(target)
    errors = error_file(target)
    written = [] if target == "-" else [target, errors]
    if target != "-" and os.path.isdir(errors):
        raise ValueError(f"--output {target}: its error file {errors} is a folder")
    if args.plot is not None:
        _check_plot(args.plot)
        if any(os.path.abspath(name) == os.path.abspath(args.plot) for name in written):
            raise ValueError(f"--plot {args.plot}: scores are written there; name another file")
        written.append(args.plot)
    if source == "-" or not os.path.exists(source):
        return
    parts = job_folder(target).resolve()
    overwritten = any(os.path.exists(name) and os.path.samefile(source, name) for name in written)
    if overwritten or (target != "-" and parts in Path(source).resolve().parents):
        raise ValueError(f"--output {target}: the input {source} would be overwritten; name another file")


def _check_plot(path: str) -> None:
    check_picture(path)
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: the folder {Path(path).parent} does not exist")


def _check_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.size > 1 and "-" in (args.input, args.output):
        raise ValueError(
            f"{ranks.size} processes cannot share standard input or output; expected the names of files"
        )


def _device(args: argparse.Namespace, ranks: Ranks) -> str | None:
    """The device that was asked for, or of several processes of a machine each its own."""
    import torch

    device: str | None = args.device
    if ranks.size > 1 and device in (None, "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if ranks.local_rank >= count:
            raise ValueError(
                f"LOCAL_RANK {ranks.local_rank}: this machine has {count} CUDA devices; start as many processes"
            )
        device = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(ranks.local_rank)
    return device


def _load(args: argparse.Namespace, ranks: Ranks) -> Scorer:
    if args.model is None and ranks.first:
        print("judge: the built-in one, which knows only its own small world (see its card); "
              "--model DIR names another", file=sys.stderr)  # fmt: skip
    return load_scorer(args, _device(args, ranks), window=args.window)


def _score(args: argparse.Namespace, reader: RowReader, scorer: Scorer, ranks: Ranks) -> int:
    from adajudge.cli.summary import Summary
    from adajudge_kernels.backends import FAMILIES, choose_backend

    device = scorer.engine.device
    choices = {family: choose_backend(device, family) for family in FAMILIES}  # or say now what is wrong
    summary = Summary(_TABLE_ROWS)
    started = time.perf_counter()
    if args.output == "-":
        _stream(reader, scorer, summary)
    else:
        _run_job(args, reader, scorer, ranks, summary)
    if not ranks.first:
        return 0
    summary.seconds = time.perf_counter() - started
    backend = f"{choices['pooling'].backend} on {device} ({choices['pooling'].reason})"
    _report(args, summary, backend)
    if args.plot is not None:
        from adajudge.cli.histogram import save_picture

        save_picture(Path(args.plot), summary.rewards, summary.margins, Path(args.input).name)
    if summary.total.errors and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        print(
            "exit code 0 although rows are in the error file: torchrun would restart the job", file=sys.stderr
        )
        return 0
    return 1 if summary.total.errors else 0


def _stream(reader: RowReader, scorer: Scorer, summary: Summary) -> None:
    """To standard output, errors to standard error; a window is through the pipe before the next one is scored."""
    from adajudge.data.writing import RecordWriter
    from adajudge.scoring.parts import Part
    from adajudge.scoring.scorer import windows_of

    with RecordWriter("-") as writer, progress(reader.total, lambda: scorer.tokens_scored) as show:
        for results in scorer.score_windows(windows_of(summary.watch(reader), scorer.window)):
            part = Part.of(results)
            for record in part.records:
                writer.write_json(record)
            for error in part.errors:
                print(f'{{"error": {error}}}', file=sys.stderr)
            sys.stdout.flush()
            summary.add(part)
            show("scoring", summary.rows_now, summary.rows_now)


def _run_job(
    args: argparse.Namespace, reader: RowReader, scorer: Scorer, ranks: Ranks, summary: Summary
) -> None:
    from adajudge.scoring import ScoringJob

    with ScoringJob(scorer, args.output, ranks=ranks, fresh=args.fresh) as job:
        if ranks.first:
            _print_resumed(job)
        with progress(reader.total, lambda: scorer.tokens_scored, ranks.rank, ranks.size) as show:

            def merged(part: Part, resumed: bool) -> None:
                summary.add(part, resumed)
                show("merging", summary.total.rows + summary.total.errors, job.rows_scored)

            job.run(summary.watch(reader), lambda: show("scoring", job.rows_passed, job.rows_scored))
            if ranks.first:
                job.merge(
                    merged, lambda: show("waiting for other processes", job.rows_passed, job.rows_scored)
                )


def _print_resumed(job: ScoringJob) -> None:
    if job.resumed:
        rows = job.rows_done_before()
        print(f"goes on from {job.folder}: {rows} rows are scored already", file=sys.stderr)
    if job.notice is not None:
        print(f"{job.folder}: {job.notice}", file=sys.stderr)


def _report(args: argparse.Namespace, summary: Summary, backend: str) -> None:
    from rich.console import Console

    from adajudge.scoring.jobs import error_file

    console = Console(stderr=args.output == "-")
    if not console.is_terminal:
        console = Console(stderr=args.output == "-", width=_FILE_WIDTH)
    shown = console.is_terminal and args.output != "-" if args.table is None else args.table
    if shown:
        summary.print_table(console)
    card = BUILT_IN_JUDGE / "results.json" if args.model is None else None
    summary.print_spread(console)
    summary.print_figures(console, card)
    console.print(f"backend: {backend}", highlight=False)
    if args.output == "-":
        return
    console.print(f"written: {args.output}", highlight=False, soft_wrap=True, markup=False)
    if summary.total.errors:
        console.print(
            f"not scored: {summary.total.errors} rows, see {error_file(args.output)}",
            style="red",
            soft_wrap=True,
            markup=False,
        )
