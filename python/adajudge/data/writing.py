"""Writing records to local files: jsonl, jsonl.gz, json, parquet and standard output, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .files import EXTENSIONS, STDIN, DataFileError


class RecordWriter:
    """Writes one record after another; the file appears under its name when the last one is written.

    Records go to ``NAME.partial`` beside the target, which takes its place on a clean exit from the ``with``
    block. ``"-"`` is standard output, one JSON object a line. parquet records are held in memory until then.

    Args:
        target: path whose extension names the format, or ``"-"``.

    Raises:
        DataFileError: unknown extension, or the folder does not exist.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = os.fspath(target)
        self._partial = Path(self.target + ".partial")
        self._extension = _check_target(self.target)
        self._text: IO[str] | None = None
        self._held: list[Mapping[str, Any]] = []
        self._empty = True

    def __enter__(self) -> RecordWriter:
        """Open the target."""
        if self._extension == STDIN:
            self._text = sys.stdout
        elif self._extension == ".jsonl.gz":
            self._text = gzip.open(self._partial, "wt", encoding="utf-8")
        elif self._extension != ".parquet":
            self._text = open(self._partial, "w", encoding="utf-8", newline="\n")
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        if self._text is None:
            self._held.append(record)  # parquet needs all records for its columns
            return
        if self._extension == ".json":
            self._text.write("[\n" if self._empty else ",\n")
        self._empty = False
        self._text.write(json.dumps(record, ensure_ascii=False, allow_nan=False))
        if self._extension != ".json":
            self._text.write("\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file and give it its name; after an exception only the partial file remains, if it has records."""
        if self._extension == STDIN:
            sys.stdout.flush()
            return
        if self._extension == ".json" and self._text is not None and kind is None:
            self._text.write("[]\n" if self._empty else "\n]\n")
        if self._text is not None:
            self._text.close()
        if kind is not None:
            if self._empty:
                self._partial.unlink(missing_ok=True)
            return
        if self._extension == ".parquet":
            self._write_parquet()
        os.replace(self._partial, self.target)

    def _write_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = dict.fromkeys(name for record in self._held for name in record)  # rows of every kind
        table = pyarrow.Table.from_pylist(
            [{name: record.get(name) for name in columns} for record in self._held]
        )
        pyarrow.parquet.write_table(table, self._partial)


def _check_target(target: str) -> str:
    if target == STDIN:
        return STDIN
    for extension in sorted(EXTENSIONS, key=len, reverse=True):
        if target.lower().endswith(extension):
            break
    else:
        raise DataFileError(f"{target}: unknown extension; expected one of {', '.join(EXTENSIONS)}, or '-'")
    folder = Path(target).parent
    if not folder.is_dir():
        raise DataFileError(f"{target}: the folder {folder} does not exist")
    if Path(target).is_dir():
        raise DataFileError(f"{target}: it is a folder; expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise DataFileError(f"{target}: the folder {folder} cannot be written to")
    return extension
