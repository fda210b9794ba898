"""The benchmarks: how a record of each is read, and what its figures are made of.

Each row (a prompt with its responses) gives a few numbers, called its values. Figures are made of the means of these over the
rows of a group, so that an interval needs no more than other weights in the means.

==================  ==========================================================================  =======================
benchmark           keys of a record                                                            groups
==================  ==========================================================================  =======================
``rm-bench``        ``prompt``, ``chosen`` [3], ``rejected`` [3] (concise, detailed, Markdown),  chat, math, code, safety
                    ``domain``
``judge-bench``     ``question``, ``response_A``, ``response_B``, ``label``, ``source``          by ``source``
``reward-bench-2``  ``prompt``, ``chosen``, ``rejected``, ``num_correct``, ``subset``, ``id``    by ``subset``
``pairs``           a pair in any format of `adajudge.data`                                     by ``domain``
==================  ==========================================================================  =======================
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adajudge.data import Row, RowError, parse_row

from .intervals import Floats

Columns = dict[str, Floats]  # title -> [draws]


class Observation(NamedTuple):
    """What a scored row counts for."""

    group: str
    prompt: Hashable  # rows of one prompt are no independent samples
    values: tuple[float, ...]


class Benchmark(ABC):
    """One benchmark.

    Attributes:
        name: as the command line names it.
        keys: what a record has.
        row_id: the key of a record's id.
        counts_by_file: whether each file has ids of its own.
        groups: what the whole benchmark consists of; empty: whatever comes.
    """

    name: str
    keys: tuple[str, ...] = ()
    row_id = "id"
    counts_by_file = False
    groups: tuple[str, ...] = ()

    @abstractmethod
    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this benchmark, and of none before it in `BENCHMARKS`; it need not be sound."""

    @abstractmethod
    def parse(self, record: Mapping[str, Any], line: int, domain: str | None) -> Row | RowError:
        """The row of a record that has the keys; what `observe` needs is in its `extra`."""

    def identity(self, record: Mapping[str, Any], domain: str | None) -> Hashable | None:
        """What no two records share; None: the record has no id."""
        return None if record.get(self.row_id) is None else str(record[self.row_id])

    @abstractmethod
    def observe(self, row: Row, rewards: Sequence[float]) -> Observation:
        """What a row counts for with the reward of each of its responses."""

    def limits(self, group: str, count: int) -> tuple[Floats, Floats]:
        """The least and the greatest that each of the `count` values of a group can be, ``[count]``."""
        return np.zeros(count), np.ones(count)

    def units(self, group: str, observations: Sequence[Observation]) -> tuple[Floats, list[Hashable]]:
        """The values ``[units, V]`` of a group's rows, and whose prompt's each unit is."""
        values = np.array([x.values for x in observations], dtype=np.float64)
        return values, [x.prompt for x in observations]

    def columns(self, group: str, means: Floats) -> Columns:
        """The figures (0 to 1) of a group, of the means ``[draws, V]`` of its values."""
        return {"accuracy": means[:, 0]}

    def missing(self, record: Mapping[str, Any], line: int) -> RowError | None:
        """The error of a record without one of the keys."""
        for key in self.keys:
            if record.get(key) is None:
                return self._error(
                    record, line, key, f"missing; expected in every record of {self.name} (--benchmark)"
                )
        return None

    def _error(self, record: Mapping[str, Any], line: int, field: str, reason: str) -> RowError:
        row_id = record.get(self.row_id)
        return RowError(line, str(line if row_id is None else row_id), field, reason)

    def _candidates(
        self,
        record: Mapping[str, Any],
        line: int,
        responses: Mapping[str, Any],
        extra: dict[str, Any],
        prompt: str = "prompt",
    ) -> Row | RowError:
        """A row of named responses; errors have the record's names."""
        found = {
            "id": record.get(self.row_id),
            "prompt": record[prompt],
            "responses": list(responses.values()),
        }
        row = parse_row(found | extra, line)
        if isinstance(row, Row):
            return row
        places = {f"responses[{i}]": name for i, name in enumerate(responses)}
        names = {"prompt": prompt, "id": self.row_id, **places}
        field = re.match(r"\w+(\[\d+\])?", row.field)
        known = field[0] if field and field[0] in names else row.field.partition("[")[0]
        return RowError(line, row.id, names.get(known, known) + row.field.removeprefix(known), row.reason)

    def totals(self, table: Mapping[str, Columns], rows: Mapping[str, int]) -> dict[str, Columns]:
        """The figures of all groups together: their plain mean, ``overall`` where it is of the whole benchmark. A group without
        a figure is none of them."""
        there = {group: columns for group, columns in table.items() if not np.isnan(_first(columns)[0])}
        if not there:
            return {}
        name = "overall" if set(self.groups) == set(there) else f"mean of {len(there)}"
        titles = next(iter(there.values()))
        return {name: {title: np.mean([c[title] for c in there.values()], axis=0) for title in titles}}


def _first(columns: Columns) -> Floats:
    return next(iter(columns.values()))


def _over_rows(table: Mapping[str, Columns], rows: Mapping[str, int]) -> Columns:
    """Accuracy over all rows, whatever their group."""
    right = sum(rows[group] * columns["accuracy"] for group, columns in table.items())
    return {"accuracy": np.asarray(right / sum(rows.values()))}


class RMBench(Benchmark):
    """RM-Bench (Liu et al., ICLR 2025): three styles of a right and of a wrong answer, each right one against each wrong.

    With ``M[i, j]`` the share of rows whose right answer in style i has a reward strictly above the wrong one in style j:
    ``normal`` is the mean of the diagonal, ``hard`` that of the upper triangle (the right answer is the plainer one), ``easy``
    that of the lower; ``average`` the mean of the three.
    """

    name = "rm-bench"
    keys = ("prompt", "chosen", "rejected")
    groups = ("chat", "math", "code", "safety")

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Lists of texts; lists of messages are pairs."""
        sides = [record.get(side) for side in ("chosen", "rejected")]
        return any(isinstance(x, (list, tuple)) and x and all(isinstance(y, str) for y in x) for x in sides)

    def parse(self, record: Mapping[str, Any], line: int, domain: str | None) -> Row | RowError:
        """Both lists have three texts; safety-refuse and safety-response are one group."""
        named = record.get("domain") or domain
        group = "safety" if named in ("safety-refuse", "safety-response") else named
        if group not in self.groups:
            expected = ", ".join((*self.groups, "safety-refuse", "safety-response"))
            return self._error(record, line, "domain", f"{named!r}; expected one of {expected} (--domain)")
        for side in ("chosen", "rejected"):
            if not isinstance(record[side], (list, tuple)) or len(record[side]) != 3:
                expected = "expected three responses: concise, detailed, with Markdown"
                return self._error(record, line, side, f"{_count(record[side])} came, {expected}")
        return self._candidates(record, line, _lists(record), {"group": group})

    def identity(self, record: Mapping[str, Any], domain: str | None) -> Hashable | None:
        """Each file of a domain counts from one."""
        row_id = super().identity(record, domain)
        return None if row_id is None else (str(record.get("domain") or domain), row_id)

    def observe(self, row: Row, rewards: Sequence[float]) -> Observation:
        """``M`` of one row, by rows."""
        wins = (float(chosen > rejected) for chosen in rewards[:3] for rejected in rewards[3:])
        return Observation(str(row.extra["group"]), hash(row.prompt), tuple(wins))

    def columns(self, group: str, means: Floats) -> Columns:
        """Hard, normal, easy and their mean."""
        matrix = means.reshape(-1, 3, 3)
        above, below = np.triu_indices(3, 1), np.tril_indices(3, -1)
        columns = {
            "hard": matrix[:, above[0], above[1]].mean(axis=1),
            "normal": np.diagonal(matrix, axis1=1, axis2=2).mean(axis=1),
            "easy": matrix[:, below[0], below[1]].mean(axis=1),
        }
        return {**columns, "average": np.mean(list(columns.values()), axis=0)}


class JudgeBench(Benchmark):
    """JudgeBench (Tan et al., ICLR 2025): which of two answers is right. A has to be strictly above to win; ``overall`` (``all
    rows``, where groups are missing) is over all rows, ``mean of`` over the groups."""

    name = "judge-bench"
    keys = ("question", "response_A", "response_B", "label", "source")
    row_id = "pair_id"
    groups = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """By its two responses."""
        return {"response_A", "response_B"} <= record.keys()

    def parse(self, record: Mapping[str, Any], line: int, domain: str | None) -> Row | RowError:
        """The label is ``A>B`` or ``B>A``."""
        label, source = record["label"], str(record["source"])
        if label not in ("A>B", "B>A"):
            return self._error(record, line, "label", f"{label!r}; expected 'A>B' or 'B>A'")
        responses = {name: record[name] for name in ("response_A", "response_B")}
        group = next((name for name in self.groups if source.startswith(name)), source)
        extra = {"group": group, "first": label == "A>B"}
        return self._candidates(record, line, responses, extra, "question")

    def observe(self, row: Row, rewards: Sequence[float]) -> Observation:
        """Whether the side that the rewards name is the label's."""
        right = (rewards[0] > rewards[1]) == row.extra["first"]
        return Observation(str(row.extra["group"]), hash(row.prompt), (float(right),))

    def totals(self, table: Mapping[str, Columns], rows: Mapping[str, int]) -> dict[str, Columns]:
        """Over all rows, and over the groups."""
        name = "overall" if set(self.groups) == set(table) else "all rows"
        mean = np.mean([columns["accuracy"] for columns in table.values()], axis=0)
        return {name: _over_rows(table, rows), f"mean of {len(table)} groups": {"accuracy": mean}}


class RewardBench2(Benchmark):
    """RewardBench 2 (Malik et al., 2025): the first of several answers is right; in ``Ties`` several are.

    A row counts 1 if its first answer has the highest reward, 1/n if n answers share it. ``Ties``, over prompts with one right
    answer (``ref:N``) and with several (``tied:N``), with gap = least right less greatest wrong reward, spread = of the right
    ones: ``.30 tied accuracy + .30 ref accuracy + .20 P(gap_tied > spread) + .20 P(min(gap_ref, gap_tied) > spread) + .01 mean
    tanh(min(gap_ref, gap_tied) / spread - 1)``; a row is accurate if its gap is above zero.
    """

    name = "reward-bench-2"
    keys = ("prompt", "chosen", "rejected", "num_correct", "subset", "id")
    groups = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """By its subset, of which so many are right."""
        return {"num_correct", "subset"} <= record.keys()

    def parse(self, record: Mapping[str, Any], line: int, domain: str | None) -> Row | RowError:
        """Of Ties the id says which row is whose reference."""
        subset, correct = str(record["subset"]), record["num_correct"]
        group = next((name for name in self.groups if name.lower() == subset.lower()), None)
        if group is None:
            expected = f"expected one of {', '.join(self.groups)}"
            return self._error(record, line, "subset", f"{subset!r}; {expected}")
        tied = re.fullmatch(r"(ref|tied):(\d+)", str(record["id"]))
        if group == "Ties" and tied is None:
            return self._error(record, line, "id", f"{record['id']!r}; expected 'ref:N' or 'tied:N' in Ties")
        for side in ("chosen", "rejected"):
            if not isinstance(record[side], (list, tuple)) or not record[side]:
                reason = f"{_count(record[side])} came, expected a list of at least one response"
                return self._error(record, line, side, reason)
        if correct != len(record["chosen"]):
            reason = f"{correct!r}, but chosen has {len(record['chosen'])}"
            return self._error(record, line, "num_correct", reason)
        if correct != 1 and group != "Ties":
            return self._error(record, line, "num_correct", f"{correct!r}; expected 1 outside of Ties")
        extra = {"group": group, "correct": correct, "tied": tied and (tied[1], int(tied[2]))}
        return self._candidates(record, line, _lists(record), extra)

    def identity(self, record: Mapping[str, Any], domain: str | None) -> Hashable | None:
        """Each subset counts for itself."""
        row_id = super().identity(record, domain)
        return None if row_id is None else (str(record.get("subset")).lower(), row_id)

    def observe(self, row: Row, rewards: Sequence[float]) -> Observation:
        """Of Ties whether it is the reference, gap and spread."""
        group = str(row.extra["group"])
        if group != "Ties":
            best = max(rewards)
            point = (rewards[0] == best) / sum(reward == best for reward in rewards)
            return Observation(group, hash(row.prompt), (float(point),))
        kind, number = row.extra["tied"]
        right, wrong = rewards[: row.extra["correct"]], rewards[row.extra["correct"] :]
        facts = (float(kind == "ref"), min(right) - max(wrong), max(right) - min(right))
        return Observation(group, number, facts)

    def units(self, group: str, observations: Sequence[Observation]) -> tuple[Floats, list[Hashable]]:
        """In Ties a unit is a number with its two rows."""
        return _ties(observations) if group == "Ties" else super().units(group, observations)

    def limits(self, group: str, count: int) -> tuple[Floats, Floats]:
        """Shares, and in Ties a tanh."""
        least, most = super().limits(group, count)
        return (np.array([0.0, 0.0, 0.0, 0.0, -1.0]), most) if group == "Ties" else (least, most)

    def columns(self, group: str, means: Floats) -> Columns:
        """The score of a subset."""
        return {"score": means @ _TIES_WEIGHTS if group == "Ties" else means[:, 0]}


_TIES_WEIGHTS = np.array([0.30, 0.30, 0.20, 0.20, 0.01])


def _ties(observations: Iterable[Observation]) -> tuple[Floats, list[Hashable]]:
    """``[numbers, 5]``: what the weights are for; NaN where a number has not the row that it takes."""
    # Of a number, then of its reference or of its tied row: gap and spread.
    facts: dict[Hashable, dict[bool, tuple[float, float]]] = defaultdict(dict)
    for _, number, (is_ref, gap, spread) in observations:
        facts[number][bool(is_ref)] = gap, spread
    units = []
    for kinds in facts.values():
        tied, ref = kinds.get(False), kinds.get(True)
        unit = [np.nan] * 5
        if tied is not None:
            unit[0] = float(tied[0] > 0)
        if ref is not None:
            unit[1] = float(ref[0] > 0)
        if tied is not None and ref is not None:
            least, spread = min(tied[0], ref[0]), tied[1]
            with np.errstate(divide="ignore", invalid="ignore"):
                distance = np.tanh(np.float64(least) / np.float64(spread) - 1)
            unit[2:] = [
                float(tied[0] > spread),
                float(least > spread),
                float(np.nan_to_num(distance, nan=0.0)),
            ]
        units.append(unit)
    return np.array(units), list(facts)


class Pairs(Benchmark):
    """Pairs of any preference data: the share with the chosen reward strictly above; ties of the data are left out."""

    name = "pairs"
    counts_by_file = True

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """What is of no other benchmark."""
        return True

    def parse(self, record: Mapping[str, Any], line: int, domain: str | None) -> Row | RowError:
        """As `adajudge.data` reads it."""
        row = parse_row(record, line)
        if isinstance(row, RowError):
            return row
        if row.kind != "pair":
            return row.error("row", f"{row.kind} responses; expected a pair")
        group = str(row.extra.get("domain", "all"))
        if group != group.encode("utf-8", "replace").decode():
            return row.error("domain", f"{group!r}; not valid text")
        return row

    def observe(self, row: Row, rewards: Sequence[float]) -> Observation:
        """Whether the chosen side is above; by domain, if there is one."""
        group = str(row.extra.get("domain", "all"))
        return Observation(group, hash(row.prompt), (float(rewards[0] > rewards[1]),))

    def totals(self, table: Mapping[str, Columns], rows: Mapping[str, int]) -> dict[str, Columns]:
        """Over all pairs."""
        return {"overall": _over_rows(table, rows)}


BENCHMARKS: dict[str, Benchmark] = {x.name: x for x in (JudgeBench(), RewardBench2(), RMBench(), Pairs())}


def recognise(record: Mapping[str, Any]) -> Benchmark:
    """The benchmark that a record is of."""
    return next(benchmark for benchmark in BENCHMARKS.values() if benchmark.recognises(record))


def _lists(record: Mapping[str, Any]) -> dict[str, Any]:
    """Right answers and then wrong ones, by the names that errors give them."""
    return {f"{side}[{i}]": text for side in ("chosen", "rejected") for i, text in enumerate(record[side])}


def _count(value: object) -> str:
    return str(len(value)) if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
