"""The pairs of ``adajudge train``: read, reported on, refused where that was not agreed to."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.cli.options import UsageError

if TYPE_CHECKING:
    from adajudge.data import Row, RowError
    from adajudge.training import LoadedPairs

BAD_ROWS_NAME = "bad_rows.jsonl"

_SHOWN_ROWS = 20


def check_sources(args: argparse.Namespace) -> None:
    """The list of bad rows of an earlier run is no file to train on: this run would write its own there.

    Raises:
        UsageError: it is one of the files.
    """
    bad_rows = Path(args.output_dir) / BAD_ROWS_NAME
    for option, source in (("train_data", args.train_data), ("eval_data", args.eval_data)):
        if source is not None and os.path.exists(source) and bad_rows.exists() and bad_rows.samefile(source):
            raise UsageError(
                f"{option}: {source} would be overwritten by the list of bad rows; move it elsewhere"
            )


def load_data(
    args: argparse.Namespace, encoder: Any, main_process: bool
) -> tuple[LoadedPairs, LoadedPairs | None]:
    """Read both files, say what was met, refuse what was not agreed to.

    Raises:
        UsageError: a file cannot be read, has bad rows without --skip_bad_rows, or no usable pair.
    """
    from adajudge.data import DataFileError
    from adajudge.training import load_pairs

    sources = [("train_data", args.train_data)]
    if args.eval_data is not None:
        sources.append(("eval_data", args.eval_data))
    loaded = []
    for option, source in sources:
        try:
            loaded.append(load_pairs(source, encoder, progress=_progress(option)))
        except DataFileError as error:
            raise UsageError(f"{option}: {error}") from error
    if main_process:
        for (option, _), pairs in zip(sources, loaded, strict=True):
            print(f"{option}: {pairs.summary()}", file=sys.stderr)
        _write_bad_rows(Path(args.output_dir) / BAD_ROWS_NAME, loaded)
        for pairs in loaded:
            _print_rows(pairs)
    bad = sum(len(pairs.bad_rows) for pairs in loaded)
    if bad and not args.skip_bad_rows:
        raise UsageError(f"{bad} bad rows; mend them, or leave them out with --skip_bad_rows")
    for (option, source), pairs in zip(sources, loaded, strict=True):
        if not len(pairs.dataset):
            raise UsageError(f"{option}: no usable pair in {source}")
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def _write_bad_rows(path: Path, loaded: Iterable[LoadedPairs]) -> None:
    records = [
        {"file": pairs.source, **asdict(row)} for pairs in loaded for row in pairs.bad_rows + pairs.too_long
    ]
    if not records:
        path.unlink(missing_ok=True)  # of an earlier run of the same command
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    print(f"not used for training: {len(records)} rows, see {path}", file=sys.stderr)


def _print_rows(pairs: LoadedPairs) -> None:
    rows: list[RowError] = pairs.bad_rows + pairs.too_long
    for row in rows[:_SHOWN_ROWS]:
        print(f"  {pairs.source}: {row}", file=sys.stderr)
    if len(rows) > _SHOWN_ROWS:
        print(f"  {pairs.source}: and {len(rows) - _SHOWN_ROWS} more", file=sys.stderr)


def _progress(option: str) -> Callable[[Iterable[Row | RowError]], Iterable[Row | RowError]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda rows: track(rows, option, console=console, transient=True, disable=not console.is_terminal)
