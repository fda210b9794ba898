"""How far a command is: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 60.0


@contextmanager
def progress(
    total: Callable[[], int | None], tokens_scored: Callable[[], int], rank: int = 0, processes: int = 1
) -> Iterator[Callable[[str, int, int], None]]:
    """Tell the function that comes what is being done, the rows passed, and those that this process has scored.

    Args:
        total: gives the rows that there are, if that is known; called on a terminal only.
        tokens_scored: gives the tokens read so far.
        rank: of this process; the first one alone shows anything.
        processes: that share the work.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = rank == 0 and console.is_terminal
    several = f" (rank 0 of {processes})" if processes > 1 else ""
    texts = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (texts[0], BarColumn(), MofNCompleteColumn(), texts[1], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("scoring", total=total() if shown else None, rate="")
        started = told = time.perf_counter()

        def show(doing: str, passed: int, scored: int) -> None:
            nonlocal told
            now = time.perf_counter()
            seconds = max(now - started, 1e-9)
            rate = ""
            if doing == "scoring":
                rate = f"{scored / seconds:,.0f} rows/s, {tokens_scored() / seconds:,.0f} tokens/s{several}"
            bar.update(task, description=doing, completed=passed, rate=rate)
            if rank == 0 and not shown and now - told >= _LINE_SECONDS:
                told = now
                print(f"{doing}: {passed:,} rows passed {rate}".rstrip(), file=sys.stderr)

        yield show
