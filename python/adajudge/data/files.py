"""Reading rows from local files and standard input, one after another, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .json_text import RepeatedKeyError, parse_json
from .rows import Row, RowError, parse_row

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
STDIN = "-"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH = 256  # records held at once; a conversation is rarely over 100 kB


class DataFileError(ValueError):
    """The file as a whole cannot be read; the message names the path and what was expected."""


@dataclass
class ReadCounts:
    """What one pass over a source has met so far."""

    rows: int = 0
    errors: int = 0
    ties: int = 0


def read_rows(source: str | os.PathLike[str], *, keep_ties: bool = False) -> RowReader:
    """Open a data file (``"-"``: standard input, one JSON object a line) and return its rows as an iterable.

    Raises:
        DataFileError: missing file, unknown extension or unreadable content, naming the path.
    """
    return RowReader(source, keep_ties=keep_ties)


def read_records(source: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Line (json and parquet: number) and record of a data file as it is, from 1; a line that is no JSON is a `RowError`.

    Raises:
        DataFileError: missing file, unknown extension or unreadable content, naming the path.
    """
    name = os.fspath(source)
    return _records(name, _check_source(name))


class RowReader:
    """Iterable over `Row` and `RowError` values, in the order of the file.

    Every record gives exactly one value, except ties of preference data: those are left out and counted in
    ``counts.ties``, or with ``keep_ties=True`` come as pairs of weight 0. Empty lines are no records.
    ``counts`` is that of the latest pass. jsonl and parquet are streamed, json is read whole; beyond that
    only the explicit ids are kept.

    Ids are unique over all rows that are read: a second record with the same ``id`` is a `RowError`
    that names the first line, whether or not the first was sound (of several faults of one record the first
    found is reported), unless the first could not be read at all. A record without an ``id`` goes by its line
    number; if another record of the file carries that number as its explicit ``id``, the later of the two is
    the error.
    """

    def __init__(self, source: str | os.PathLike[str], *, keep_ties: bool = False) -> None:
        self.source = os.fspath(source)
        self.keep_ties = keep_ties
        self.counts = ReadCounts()
        self._extension = _check_source(self.source)
        if self._extension == ".parquet":
            _open_parquet(self.source).close()

    def __iter__(self) -> Iterator[Row | RowError]:
        """Begin a pass over the source."""
        self.counts = counts = ReadCounts()
        ids = _SeenIds()
        for line, record in _records(self.source, self._extension):
            if isinstance(record, RowError):  # it cannot be read, its id neither
                counts.errors += 1
                yield record
                continue
            row = parse_row(record, line)
            explicit = _has_explicit_id(record, row)
            first = ids.register(row.id, line, explicit)
            if first is not None and isinstance(row, Row):
                row = row.error("id", _duplicate_reason(row.id, first, explicit, ids.is_number_of(first)))
            if isinstance(row, RowError):
                counts.errors += 1
            elif row.tie:
                counts.ties += 1
                if not self.keep_ties:
                    continue
                counts.rows += 1
            else:
                counts.rows += 1
            yield row

    def total(self) -> int | None:
        """Number of records, for a progress bar (a quick pass over jsonl); ``None`` for standard input."""
        if self._extension == STDIN:
            return None
        if self._extension == ".parquet":
            with _open_parquet(self.source) as file:
                return int(file.metadata.num_rows)
        return sum(1 for _ in _records(self.source, self._extension, decode=False))


def _records(source: str, extension: str, decode: bool = True) -> Iterator[tuple[int, Any]]:
    if extension == STDIN:
        yield from _json_lines(sys.stdin.buffer, decode)
    elif extension == ".json":
        yield from enumerate(_load_json(source), start=1)
    elif extension == ".parquet":
        yield from _parquet_records(source)
    else:
        yield from _json_line_file(source, decode)


def _check_source(source: str) -> str:
    if source == STDIN:
        return STDIN
    path = Path(source)
    extension = next(
        (e for e in sorted(EXTENSIONS, key=len, reverse=True) if path.name.lower().endswith(e)), None
    )
    expected = f"a local file ({', '.join(EXTENSIONS)}) or '-' for standard input"
    if path.is_dir():
        raise DataFileError(f"{source}: is a directory; expected {expected}")
    if not path.exists():
        raise DataFileError(f"{source}: no such file; expected {expected}")
    if extension is None:
        raise DataFileError(
            f"{source}: unknown extension {''.join(path.suffixes) or '(none)'!r}; expected {expected}"
        )
    return extension


def _json_line_file(path: str, decode: bool) -> Iterator[tuple[int, Any]]:
    packed = path.lower().endswith(".gz")
    line = 0
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as stream:
            for line, record in _json_lines(stream, decode):
                yield line, record
    except (EOFError, zlib.error, OSError) as error:
        expected = "a complete gzip file of JSON lines" if packed else "a readable file of JSON lines"
        raise DataFileError(
            f"{path}: unreadable behind line {line} ({error}); expected {expected}"
        ) from error


def _json_lines(stream: IO[bytes] | gzip.GzipFile, decode: bool) -> Iterator[tuple[int, Any]]:
    for line, raw in enumerate(stream, start=1):  # binary: lines end at \n only, never at U+2028
        if line == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        raw = raw.strip()
        if raw:
            yield line, _decode_json(raw, line) if decode else None


def _decode_json(raw: bytes, line: int) -> Any:
    try:
        return parse_json(raw.decode("utf-8"))
    except RepeatedKeyError as error:
        return RowError(line, str(line), error.key, "the key comes twice in one object; expected once")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}"
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            reason += "; the file is UTF-16, expected UTF-8"
    except json.JSONDecodeError as error:
        reason = f"invalid JSON at column {error.colno}: {error.msg.removesuffix(' at')}"
        if b"\r" in raw:
            reason += "; a carriage return alone ends no line, expected a line feed"
    except (ValueError, RecursionError) as error:  # a number with too many digits, a list too deep
        reason = f"invalid JSON: {error}"
    return RowError(line, str(line), "row", reason)


def _load_json(path: str) -> list[Any]:
    hint = "expected one JSON list of objects (one object a line belongs in a file named .jsonl)"
    try:
        value = parse_json(Path(path).read_bytes().decode("utf-8-sig"))
    except RepeatedKeyError as error:
        raise DataFileError(f"{path}: {error}; expected once") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataFileError(f"{path}: {error}; {hint}") from error
    if not isinstance(value, list):
        raise DataFileError(f"{path}: holds a JSON {type(value).__name__}; {hint}")
    return value


def _open_parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataFileError(
            f"{path}: reading parquet needs the package pyarrow, which is not installed"
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: {error}; expected a parquet file") from error


def _parquet_records(path: str) -> Iterator[tuple[int, Any]]:
    line = 0
    try:
        with _open_parquet(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except (OSError, ValueError, OverflowError) as error:  # also a date that Python has none for
        raise DataFileError(
            f"{path}: unreadable behind row {line} ({error}); expected a parquet file"
        ) from error


def _has_explicit_id(record: object, row: Row | RowError) -> bool:
    sound = isinstance(row, Row) or row.field != "id"
    return sound and isinstance(record, dict) and record.get("id") is not None


def _duplicate_reason(row_id: str, first: int, explicit: bool, numbered: bool) -> str:
    if numbered:
        return f"duplicate id {row_id!r}: line {first} has no id and goes by its number"
    reason = f"duplicate id {row_id!r}: first at line {first}"
    if explicit:
        return reason
    return f"{reason}; this row has no id and goes by its line number: give it an id of its own"


class _SeenIds:
    """Which line first carried an id. Line numbers serving as ids are kept as runs: no memory."""

    def __init__(self) -> None:
        self._explicit: dict[str, int] = {}
        self._run_starts: list[int] = []
        self._run_ends: list[int] = []

    def register(self, row_id: str, line: int, explicit: bool) -> int | None:
        """Record the id of a line; returns the earlier line that has it, if any."""
        first = self._explicit.get(row_id)
        if first is None and explicit:
            first = self._numbered_line(row_id)
        if first is not None:
            return first
        if explicit:
            self._explicit[row_id] = line
        elif self._run_ends and self._run_ends[-1] == line - 1:
            self._run_ends[-1] = line
        else:
            self._run_starts.append(line)
            self._run_ends.append(line)
        return None

    def is_number_of(self, line: int) -> bool:
        """Whether a line's number serves as its id."""
        run = bisect_right(self._run_starts, line) - 1
        return run >= 0 and line <= self._run_ends[run]

    def _numbered_line(self, row_id: str) -> int | None:
        if not row_id.isascii() or not row_id.isdigit() or row_id != row_id.lstrip("0") or len(row_id) > 18:
            return None
        number = int(row_id)
        return number if self.is_number_of(number) else None
