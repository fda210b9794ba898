"""Writing records to local files: jsonl, jsonl.gz, json, parquet and standard output, whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .files import EXTENSIONS, STDIN, DataFileError

_GZIP_LEVEL = 6  # 9 takes three times as long for a per cent
_ROW_GROUP = 4096  # records of parquet that are held in memory


class RecordWriter:
    """Writes one record after another; the file appears under its name when the last one is written.

    Until then the records go to another file, which takes the target's place on a clean exit from the ``with`` block and
    is removed after an error. The same records give the same bytes: no time stamp goes in. ``"-"`` is standard output, one
    JSON object a line.

    Args:
        target: path whose extension names the format, or ``"-"``.
        partial: the other file, on the same file system; default ``TARGET.partial``.
        schema: gives the pyarrow schema of a parquet file, and is called for no other format. What comes for a column of
            texts is written as text.

    Raises:
        DataFileError: unknown extension, or the folder does not exist.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        partial: str | os.PathLike[str] | None = None,
        schema: Callable[[], Any] | None = None,
    ) -> None:
        self.target = os.fspath(target)
        self._partial = Path(self.target + ".partial" if partial is None else partial)
        self._extension = check_target(self.target)
        if self._extension == ".parquet" and schema is None:
            raise ValueError(f"schema: none came; expected that of {self.target}")
        self._schema = schema
        self._files = ExitStack()
        self._text: IO[str] | None = None
        self._parquet: Any = None
        self._held: list[dict[str, Any]] = []
        self._empty = True

    def __enter__(self) -> RecordWriter:
        """Open the target."""
        if self._extension == STDIN:
            self._text = sys.stdout
        elif self._extension == ".parquet":
            import pyarrow.parquet

            assert self._schema is not None
            self._parquet = pyarrow.parquet.ParquetWriter(self._partial, self._schema())
            self._files.callback(self._parquet.close)
        elif self._extension == ".jsonl.gz":
            file = self._files.enter_context(open(self._partial, "wb"))
            packed = gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
            self._text = self._files.enter_context(_lines_into(packed))
        else:
            self._text = self._files.enter_context(_lines_into(open(self._partial, "wb")))
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        if self._parquet is None:
            self.write_json(json.dumps(record, ensure_ascii=False, allow_nan=False))
            return
        self._held.append(dict(record))
        if len(self._held) == _ROW_GROUP:
            self._write_row_group()

    def write_json(self, record: str) -> None:
        """Add one record that is JSON already, on one line."""
        if self._text is None:
            self.write(json.loads(record))
            return
        if self._extension == ".json":
            self._text.write("[\n" if self._empty else ",\n")
        self._empty = False
        self._text.write(record)
        if self._extension != ".json":
            self._text.write("\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file and give it its name; after an error there is none."""
        if self._extension == STDIN:
            sys.stdout.flush()
            return
        try:
            with self._files:
                if kind is None:
                    self._finish()
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        with open(self._partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.target)
        sync_folder(Path(self.target).parent)  # what the records came from may be removed from now on

    def _finish(self) -> None:
        if self._held:
            self._write_row_group()
        if self._extension == ".json" and self._text is not None:
            self._text.write("[]\n" if self._empty else "\n]\n")

    def _write_row_group(self) -> None:
        import pyarrow

        schema = self._parquet.schema
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        rows = [
            record | {name: str(record[name]) for name in texts if record.get(name) is not None}
            for record in self._held
        ]
        self._parquet.write_table(pyarrow.Table.from_pylist(rows, schema))
        self._held = []


def _lines_into(file: Any) -> IO[str]:
    """Half a surrogate pair, which only an error record can quote, is written as JSON's escape of it."""
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all; half a surrogate pair is written as its escape."""
    partial = Path(os.fspath(target) + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Put on the disk which names a folder has: a file that was renamed in it has its new name after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(target: str) -> str:
    """The extension of a file that can be written, or ``"-"``.

    Raises:
        DataFileError: unknown extension, a folder, or one that does not exist or cannot be written to.
    """
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
