"""A file of rows scored in windows, each kept as it is done: what was killed goes on, with the same bytes in the end.

    rows -> windows -> (those without a part: scored) -> OUT.parts/ -> merged in the order of the input -> OUT

On one kind of machine a window's part depends on the window's rows and on what the job was asked for: not on when it was made,
nor by which process. So a job may be killed at any moment, and several processes may share it.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from adajudge.data import DataFileError, Row, RowError
from adajudge.data.writing import RecordWriter, check_target
from adajudge.scoring.description import describe, describe_machine, differences
from adajudge.scoring.parts import Part, PartFolder, is_part_folder, window_digest, write_atomically
from adajudge.scoring.ranks import Ranks
from adajudge.scoring.results import record_schema
from adajudge.scoring.scorer import Scorer

_DESCRIPTION = "job.json"
_LOCK = "lock"
_MERGED = "merged"
_MERGED_ERRORS = "merged.errors"


class JobError(ValueError):
    """A job cannot go on from what is there; the message names what differs and what helps."""


class ScoringJob:
    """Scores rows into a file, by way of one part file per window in the folder ``OUT.parts``.

    The same job after an interruption takes up the parts that are there: their rows are read again, but neither encoded nor
    scored. Of every such window the rows are compared with those that were scored, by a digest; what the job is asked for is
    compared field by field.

    ::

        with ScoringJob(scorer, "scores.jsonl") as job:
            job.run(read_rows("rows.jsonl", keep_ties=True))
            job.merge()

    Args:
        scorer: its window decides which rows a part holds.
        output: name of the file, in a format of `RecordWriter`; rows that cannot be scored go to ``OUT.errors.jsonl``.
        ranks: the processes that share the job; default: this one alone.
        fresh: begin anew, whatever is there.

    Attributes:
        notice: what is to be known about an earlier run's parts, or None.
        resumed: windows that were scored before.
        rows_passed: rows of the input up to the latest finished window.
        rows_resumed: those of them whose scores were there.
        rows_scored: those that this process scored.

    Raises:
        JobError: on entry, there are parts of a job that was asked for differently, or another process is at it.
    """

    def __init__(
        self,
        scorer: Scorer,
        output: str | os.PathLike[str],
        *,
        ranks: Ranks | None = None,
        fresh: bool = False,
    ) -> None:
        self.scorer = scorer
        self.output = os.fspath(output)
        self.ranks = ranks or Ranks()
        self.fresh = fresh
        self.folder = job_folder(self.output)
        self.notice: str | None = None
        self.resumed: set[int] = set()
        self.rows_passed = self.rows_resumed = self.rows_scored = 0
        self._parts = PartFolder(self.folder)
        self._windows: int | None = None
        self._rows = 0
        self._lock: IO[str] | None = None
        check_target(self.output)

    def __enter__(self) -> ScoringJob:
        """Prepare the folder, or take up what is in it."""
        try:
            mine = describe(self.scorer)
            first = self.ranks.from_first(lambda: self._prepare(mine))
            if different := differences(first["asked"], mine):
                reason = f"rank 0 and rank {self.ranks.rank} were asked for different things: {different}"
                self.ranks.finish(reason)
                raise JobError(reason)
            self.notice = first["notice"]
            self.resumed = _indices_of(first["done"])
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the other processes if this one failed; the parts stay, if there are any."""
        if error is not None:
            self.ranks.finish(str(error) or type(error).__name__)
            if self.ranks.size == 1 and not self._parts.indices():
                shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def rows_done_before(self) -> int:
        """Rows of the windows in `resumed`; only the last window of an input is shorter than others."""
        if not self.resumed:
            return 0
        last = self._parts.read_header(max(self.resumed))[1]
        return (len(self.resumed) - 1) * self.scorer.window + last.rows + last.errors

    def run(self, rows: Iterable[Row | RowError], progress: Callable[[], object] = lambda: None) -> None:
        """Score this process's share of the windows that have no part yet.

        Args:
            rows: all rows of the input, ties too; the same in every process.
            progress: called whenever the counts of rows have changed.

        Raises:
            DataFileError: the input breaks off; the whole windows before are scored.
            JobError: the rows of a window that was scored before are not those that were scored.
        """
        waiting: deque[tuple[int, str, int]] = deque()  # of the windows that the scorer has taken
        for results in self.scorer.score_windows(self._windows_to_score(rows, waiting, progress)):
            index, digest, passed = waiting.popleft()
            self._parts.write(index, Part.of(results, digest))
            self.rows_scored += len(results)
            self.rows_passed = passed
            progress()
        self.rows_passed = self._rows
        self.ranks.finish()

    def merge(
        self,
        each: Callable[[Part, bool], object] = lambda part, resumed: None,
        waiting: Callable[[], object] = lambda: None,
    ) -> None:
        """Write the output and the error file from all parts, in the order of the input, and remove the parts.

        Called in the first process; it waits for the others first.

        Args:
            each: called with every part, in order, and whether it was there before.
            waiting: called now and then while other processes are at work.
        """
        if self._windows is None:
            raise RuntimeError("merge() came before run() was through")
        self.ranks.wait_for_others(waiting)
        kinds: set[str] = set()
        if self.output.lower().endswith(".parquet"):
            kinds.update(*(self._parts.read_header(i)[1].kinds for i in range(self._windows)))
        error_path = error_file(self.output)
        errors: RecordWriter | None = None
        with ExitStack() as files:  # the last opened is the first to get its name: the error file
            writer = files.enter_context(
                RecordWriter(self.output, partial=self.folder / _MERGED, schema=lambda: record_schema(kinds))
            )
            for index in range(self._windows):
                part = self._parts.read(index)
                for record in part.records:
                    writer.write_json(record)
                if part.errors and errors is None:
                    errors = files.enter_context(
                        RecordWriter(error_path, partial=self.folder / _MERGED_ERRORS)
                    )
                for record in part.errors:
                    assert errors is not None
                    errors.write_json(record)
                each(part, index in self.resumed)
            if errors is None:
                Path(error_path).unlink(missing_ok=True)  # of an earlier run; this one has no errors
        (self.folder / _DESCRIPTION).unlink()  # from here on there is no job, only a folder to remove
        shutil.rmtree(self.folder)

    def _prepare(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The folder as the job needs it; what every process has to know."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise JobError(f"{self.folder}: expected a folder for the parts of the job, or no such name")
        existed = self.folder.exists()
        if existed and (strange := _strange_entry(self.folder)):
            raise JobError(f"{self.folder}: expected a folder of parts, but it holds {strange!r}")
        self.folder.mkdir(exist_ok=True)
        self._take_lock()
        description = self.folder / _DESCRIPTION
        if existed and (self.fresh or not description.exists() or not self._parts.indices()):
            _empty(self.folder)  # without a finished part there is nothing to go on with
        now = {"asked": asked, "machine": describe_machine(self.scorer.engine.device)}
        if not description.exists():
            write_atomically(description, (json.dumps(now, indent=1) + "\n").encode())
            return now | {"notice": None, "done": ""}
        was = _read_description(description)
        if different := differences(was["asked"], asked):
            raise JobError(
                f"{self.folder} holds a job that was asked for differently: {different}; the same options go on with it, "
                "--fresh begins anew"
            )
        notice = None
        if was["machine"] != now["machine"]:
            notice = f"it was begun on {was['machine']}, this is {now['machine']}: last digits may differ"
        return now | {"notice": notice, "done": _bits_of(self._parts.indices())}

    def _take_lock(self) -> None:
        self._lock = open(self.folder / _LOCK, "a")  # noqa: SIM115 (as long as the job)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            raise JobError(f"{self.output}: another process is scoring into it ({self.folder})") from None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _windows_to_score(
        self,
        rows: Iterable[Row | RowError],
        waiting: deque[tuple[int, str, int]],
        progress: Callable[[], object],
    ) -> Iterator[list[Row | RowError]]:
        """This process's windows without a part; `waiting` has their index, digest and the rows up to their end."""
        loads = [0] * self.ranks.size
        passed = 0
        index = -1
        for index, window in enumerate(_whole_windows(rows, self.scorer.window)):
            passed += len(window)
            if index in self.resumed:
                if index % self.ranks.size == self.ranks.rank:
                    self._check_same(index, window, passed)
                self.rows_resumed += len(window)
                if not waiting:
                    self.rows_passed = passed
                    progress()
                continue
            rank = loads.index(min(loads))  # the same in every process: all read all rows
            loads[rank] += _length(window)
            if rank == self.ranks.rank:
                waiting.append((index, window_digest(window), passed))
                yield window
        self._windows, self._rows = index + 1, passed
        if any(done > index for done in self.resumed):
            raise JobError(self._changed(f"it ends at row {passed}, but rows behind that were scored before"))

    def _check_same(self, index: int, window: list[Row | RowError], passed: int) -> None:
        if self._parts.read_header(index)[0] != window_digest(window):
            first = passed - len(window) + 1
            raise JobError(self._changed(f"rows {first} to {passed} are not those that were scored before"))

    def _changed(self, how: str) -> str:
        return f"input: {how} ({self.folder}); the same rows go on with that job, --fresh begins anew"


def job_folder(output: str) -> Path:
    """Where the parts of a job lie until it is done."""
    return Path(f"{output}.parts")


def holds_parts_since(output: str, time_ns: int) -> bool:
    """Whether a job has left parts that were written after so many nanoseconds of the epoch, and can go on."""
    folder = job_folder(output)
    if not (folder / _DESCRIPTION).is_file():
        return False
    parts = (entry for entry in folder.iterdir() if is_part_folder(entry.name))
    return any(entry.stat().st_mtime_ns >= time_ns for entry in parts)


def error_file(output: str) -> str:
    """Where the rows of a job go that cannot be scored."""
    return f"{output}.errors.jsonl"


def _whole_windows(rows: Iterable[Row | RowError], size: int) -> Iterator[list[Row | RowError]]:
    """The rows in runs of `size`; none is cut short where the input breaks off, as the mended input has no such window."""
    remaining = iter(rows)
    while window := list(itertools.islice(remaining, size)):
        yield window


def _length(window: list[Row | RowError]) -> int:
    """Characters that have to be read; all processes balance by them."""
    rows = [row for row in window if isinstance(row, Row)]
    prompts = sum(len(message.content) for row in rows for message in row.prompt)
    return 1 + prompts + sum(len(response) for row in rows for response in row.responses)


def _strange_entry(folder: Path) -> str | None:
    """The name of something there that no job has made."""
    ours = (_DESCRIPTION, _LOCK, _MERGED, _MERGED_ERRORS)
    for name in os.listdir(folder):
        if name not in ours and not is_part_folder(name) and not name.startswith(f"{_DESCRIPTION}."):
            return name
    return None


def _empty(folder: Path) -> None:
    """Remove everything but the lock, the description first: there is no job from then on."""
    (folder / _DESCRIPTION).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if is_part_folder(entry.name):
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _read_description(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"asked": dict(content["asked"]), "machine": str(content["machine"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataFileError(f"{path}: not a job's description ({error}); --fresh begins anew") from error


def _bits_of(indices: set[int]) -> str:
    """A set of integers in little space."""
    bits = np.zeros(max(indices, default=-1) + 1, dtype=bool)
    bits[list(indices)] = True
    return np.packbits(bits).tobytes().hex()


def _indices_of(bits: str) -> set[int]:
    packed = np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)
    return set(np.flatnonzero(np.unpackbits(packed)).tolist())
