"""From the files of a benchmark to its figures, with what chance may have done to them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adajudge.data import Row, RowError, read_records
from adajudge.data.files import STDIN
from adajudge.scoring import ScoredRow, Scorer

from .benchmarks import BENCHMARKS, Benchmark, Columns, Observation, recognise
from .intervals import Figure, drawn_means

_SEED = 0
DOMAINS = ("safety-refuse", "safety-response", "chat", "code", "math", "safety")
"""Of RM-Bench's records."""


@dataclass
class Evaluation:
    """What a judge did on a benchmark.

    Args:
        benchmark: its name, see `BENCHMARKS`.
        rows: scored rows of each group.
        figures: group -> title -> figure.
        totals: of all groups: ``overall``, or how many groups it is the mean of -> title -> figure.
        ties: pairs of the data without a preference, which count nowhere.
        truncated: rows that were cut to the judge's length, and count.
        with_control_tokens: rows whose texts hold control tokens, and count.
        errors: file and error of the rows that could not be scored, which count nowhere.
    """

    benchmark: str
    rows: dict[str, int] = field(default_factory=dict)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    totals: dict[str, dict[str, Figure]] = field(default_factory=dict)
    ties: int = 0
    truncated: int = 0
    with_control_tokens: int = 0
    errors: list[tuple[str, RowError]] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """In JSON's types."""
        return {
            "benchmark": self.benchmark,
            "rows": self.rows,
            "figures": _records(self.figures),
            "totals": _records(self.totals),
            "data_ties": self.ties,
            "truncated": self.truncated,
            "with_control_tokens": self.with_control_tokens,
            "not_scored": len(self.errors),
        }


def _records(figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
    return {
        group: {title: x.to_record() for title, x in columns.items()} for group, columns in figures.items()
    }


def evaluate(
    scorer: Scorer,
    files: Sequence[str | os.PathLike[str]],
    *,
    benchmark: str | None = None,
    domain: str | None = None,
    on_row: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every row of a benchmark's files and make its figures of the rewards.

    Args:
        scorer: the judge.
        files: jsonl, jsonl.gz, json or parquet; all of one benchmark.
        benchmark: a name of `BENCHMARKS`; default: what the first record of each file looks like.
        domain: one of `DOMAINS`, of RM-Bench's rows that have none; default: what the file's name says.
        on_row: called with the rows done so far.

    Raises:
        ValueError: a file cannot be read or is of another benchmark than the first, no such benchmark or domain, or no row
            could be scored.
    """
    chosen = check_files(files, benchmark, domain)
    result = Evaluation("")
    observed: dict[str, list[Observation]] = defaultdict(list)
    seen: dict[Hashable, tuple[str, int]] = {}
    done = 0
    for file in files:
        reader = _Reader(os.fspath(file), chosen, domain, seen)
        for outcome in scorer.score(reader):
            done += 1
            if on_row is not None:
                on_row(done)
            if not isinstance(outcome, ScoredRow):
                result.errors.append((reader.file, outcome))
                continue
            assert reader.benchmark is not None
            found = reader.benchmark.observe(outcome.row, [score.reward for score in outcome.scores])
            observed[found.group].append(found)
            result.truncated += any(score.truncated for score in outcome.scores)
            result.with_control_tokens += any(score.holds_control_tokens for score in outcome.scores)
        chosen, result.ties = reader.benchmark or chosen, result.ties + reader.ties
    if chosen is None or not observed:
        raise ValueError(f"{', '.join(map(str, files))}: no row could be scored" + _first(result.errors))
    result.benchmark = chosen.name
    order = [*(g for g in chosen.groups if g in observed), *sorted(observed.keys() - set(chosen.groups))]
    result.rows = {group: len(observed[group]) for group in order}
    result.figures, result.totals = figures_of(chosen, {group: observed[group] for group in order})
    return result


def check_files(
    files: Sequence[str | os.PathLike[str]], benchmark: str | None = None, domain: str | None = None
) -> Benchmark | None:
    """The benchmark that all files are of, as far as their first records say; None: of standard input nobody knows.

    Raises:
        ValueError: as of `evaluate`, before anything is scored.
    """
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark: {benchmark!r} came, expected one of {', '.join(BENCHMARKS)}")
    if domain is not None and domain not in DOMAINS:
        raise ValueError(f"domain: {domain!r} came, expected one of {', '.join(DOMAINS)}")
    found: dict[str, str] = {}
    for file in [os.fspath(file) for file in files]:
        if file == STDIN:
            continue
        record = next((x for _, x in read_records(file) if isinstance(x, Mapping)), None)
        if record is not None:
            found.setdefault(recognise(record).name, file)
    if benchmark is None and len(found) > 1:
        said = ", ".join(f"{file} looks like {name}" for name, file in found.items())
        raise ValueError(f"{said}; expected files of one benchmark, or --benchmark, which says what they are")
    name = benchmark or next(iter(found), None)
    if domain is not None and name not in (None, "rm-bench"):
        raise ValueError(f"domain: {domain!r} came with {name}, expected with rm-bench only")
    return None if name is None else BENCHMARKS[name]


class _Reader:
    """Rows of one file; a second row of the same id, or of another file with the same texts, is an error."""

    def __init__(
        self,
        file: str,
        benchmark: Benchmark | None,
        domain: str | None,
        seen: dict[Hashable, tuple[str, int]],
    ) -> None:
        self.file, self.benchmark, self.ties, self._seen = file, benchmark, 0, seen
        said = set(re.findall(rf"(?<![a-z])({'|'.join(DOMAINS)})(?![a-z])", Path(file).name.lower()))
        self._domain = domain or (said.pop() if len(said) == 1 else None)

    def __iter__(self) -> Iterator[Row | RowError]:
        for line, record in read_records(self.file):
            if isinstance(record, RowError):
                yield record
                continue
            if not isinstance(record, Mapping):
                yield RowError(line, str(line), "row", f"expected an object, got {type(record).__name__}")
                continue
            row = self._parse(record, line)
            if isinstance(row, Row) and row.tie:
                self.ties += 1
                continue
            yield row

    def _parse(self, record: Mapping[str, Any], line: int) -> Row | RowError:
        if self.benchmark is None:
            self.benchmark = recognise(record)
        row = self.benchmark.missing(record, line) or self.benchmark.parse(record, line, self._domain)
        identity = self.benchmark.identity(record, self._domain)
        if identity is not None:
            scope = self.file if self.benchmark.counts_by_file else ""
            first = self._seen.setdefault((scope, identity), (self.file, line))
            if first != (self.file, line) and isinstance(row, Row):
                return row.error("id", f"duplicate id {row.id!r}: first at {_place(first)}")
        if isinstance(row, Row):
            first = self._seen.setdefault(hash((row.prompt, row.responses)), (self.file, line))
            if first[0] != self.file:
                return row.error("row", f"the same prompt and responses as {_place(first)}")
        return row


def _place(first: tuple[str, int]) -> str:
    return f"{first[0]} line {first[1]}"


def figures_of(
    benchmark: Benchmark, observed: Mapping[str, Sequence[Observation]]
) -> tuple[dict[str, dict[str, Figure]], dict[str, dict[str, Figure]]]:
    """Figures of each group and of all, with their intervals: always the same draws, each group's own."""
    rng = np.random.default_rng(_SEED)
    table: dict[str, Columns] = {}
    for group, observations in observed.items():
        values, prompts = benchmark.units(group, observations)
        means = drawn_means(values, prompts, *benchmark.limits(group, values.shape[1]), rng)
        table[group] = benchmark.columns(group, means)
    totals = benchmark.totals(table, {group: len(x) for group, x in observed.items()})
    return _figures(table), _figures(totals)


def _figures(table: Mapping[str, Columns]) -> dict[str, dict[str, Figure]]:
    return {group: {title: Figure.of(x) for title, x in columns.items()} for group, columns in table.items()}


def _first(errors: Sequence[tuple[str, RowError]]) -> str:
    return f"; first error: {errors[0][0]}: {errors[0][1]}" if errors else ""
