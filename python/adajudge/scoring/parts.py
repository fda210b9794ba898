"""Part files: what scoring one window of rows gave, each written whole or not at all.

A part is a text file. Its first line is a JSON object (digest of the rows, figures); then comes one line per record and one per
error record, as they go into the output. Parts lie in folders of 1,000.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from adajudge.data import DataFileError, Row, RowError
from adajudge.data.writing import sync_folder
from adajudge.scoring.figures import WindowFigures
from adajudge.scoring.results import ScoredRow

_PER_FOLDER = 1000


@dataclass(frozen=True)
class Part:
    """The results of one window, as lines of JSON.

    Args:
        digest: of the window's rows, see `window_digest`.
        figures: counts, rewards and margins.
        records: output records, in the order of the rows.
        errors: error records, in the order of the rows.
    """

    digest: str
    figures: WindowFigures
    records: list[str]
    errors: list[str]

    @classmethod
    def of(cls, results: Sequence[ScoredRow | RowError], digest: str = "") -> Part:
        """From a window's results."""
        records = [_line(r.to_record()) for r in results if isinstance(r, ScoredRow)]
        errors = [_line(asdict(r)) for r in results if isinstance(r, RowError)]
        return cls(digest, WindowFigures.of(results), records, errors)


class PartFolder:
    """A folder of part files.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def indices(self) -> set[int]:
        """The windows that have a part."""
        folders = [entry.name for entry in os.scandir(self.path) if is_part_folder(entry.name)]
        names = (name for folder in folders for name in os.listdir(self.path / folder))
        return {int(name.removesuffix(".part")) for name in names if name.endswith(".part")}

    def write(self, index: int, part: Part) -> None:
        """Store the part of a window; it is on the disk when this returns."""
        header = _line({"digest": part.digest, "figures": asdict(part.figures)})
        text = "".join(line + "\n" for line in (header, *part.records, *part.errors))
        path = self._file(index)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text.encode("utf-8", "backslashreplace"))

    def read(self, index: int) -> Part:
        """The part of a window."""
        with self._open(index) as text:
            lines = text.read().decode("utf-8").split("\n")  # splitlines would split at U+2028 too
        digest, figures = self._header(index, lines[0])
        if len(lines) != figures.rows + figures.errors + 2 or lines[-1]:
            raise self._broken(index, f"{len(lines) - 2} whole lines behind the first")
        return Part(digest, figures, lines[1 : figures.rows + 1], lines[figures.rows + 1 : -1])

    def read_header(self, index: int) -> tuple[str, WindowFigures]:
        """Digest and figures of a part."""
        with self._open(index) as text:
            return self._header(index, text.readline().decode("utf-8"))

    def _file(self, index: int) -> Path:
        return self.path / f"{index // _PER_FOLDER:06d}" / f"{index:09d}.part"

    def _open(self, index: int) -> BinaryIO:
        try:
            return open(self._file(index), "rb")
        except FileNotFoundError:
            raise DataFileError(
                f"{self._file(index)}: the part is gone; the same command scores its rows again"
            ) from None

    def _header(self, index: int, line: str) -> tuple[str, WindowFigures]:
        try:
            header = json.loads(line)
            return header["digest"], WindowFigures(**header["figures"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(index, f"{type(error).__name__}: {error}") from error

    def _broken(self, index: int, reason: str) -> DataFileError:
        return DataFileError(
            f"{self._file(index)}: not a whole part ({reason}); remove this file, and the same command scores its rows again"
        )


def is_part_folder(name: str) -> bool:
    """Whether an entry of the folder is one of those that hold the parts."""
    return len(name) == 6 and name.isascii() and name.isdigit()


def window_digest(window: Iterable[Row | RowError]) -> str:
    """A digest of everything of a window's rows that its part depends on."""
    digest = blake2b(digest_size=16)
    for row in window:
        small: tuple[object, ...] = (row.line, row.id)
        texts: list[str] = []
        if isinstance(row, RowError):
            small += (row.field, row.reason)
        else:
            small += (row.kind, row.tie, row.implicit_prompt, str(row.extra.get("domain", "all")))
            small += tuple(message.role for message in row.prompt)
            texts = [*(message.content for message in row.prompt), *row.responses]
            small += tuple(len(text) for text in texts)
        digest.update((repr(small) + "".join(texts)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile to the process or the machine."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _line(record: object) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)
