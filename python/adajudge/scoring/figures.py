"""Figures of what was scored: counts of a window of rows, and the distribution of any number of rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adajudge.data import RowError
from adajudge.scoring.results import ScoredRow

_KEY_BITS = 22  # of a float's 32: sign, exponent and 13 bits of the mantissa
_CUT_BITS = 32 - _KEY_BITS
_SIGN = np.uint32(1 << 31)


@dataclass
class WindowFigures:
    """Counts of one window of rows.

    Args:
        rows: those that were scored.
        errors: those that could not be.
        responses: of the scored rows.
        tokens: of their sequences, a shared prompt counted for each of its responses.
        truncated: rows of which a prompt or response was cut to fit.
        control_tokens: rows whose text holds control tokens of the tokenizer.
        implicit_prompts: pairs whose prompt is what both texts begin with.
        kinds: the kinds of rows that were met.
        pairs: domain -> pairs whose chosen side has the higher reward, and all pairs; ties of the data left out.
        longer: of these, pairs whose longer response is the chosen one, the rejected one, or neither.
        rewards: of every response.
        margins: of every pair that is no tie of the data.
    """

    rows: int = 0
    errors: int = 0
    responses: int = 0
    tokens: int = 0
    truncated: int = 0
    control_tokens: int = 0
    implicit_prompts: int = 0
    kinds: list[str] = field(default_factory=list)
    pairs: dict[str, list[int]] = field(default_factory=dict)
    longer: list[int] = field(default_factory=lambda: [0, 0, 0])
    rewards: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, results: Iterable[ScoredRow | RowError]) -> WindowFigures:
        """Count the results of a window."""
        figures = cls()
        for result in results:
            if isinstance(result, RowError):
                figures.errors += 1
            else:
                figures._add(result)
        return figures

    def _add(self, result: ScoredRow) -> None:
        self.rows += 1
        self.responses += len(result.scores)
        self.tokens += sum(score.prompt_tokens + score.response_tokens for score in result.scores)
        self.truncated += any(score.truncated for score in result.scores)
        self.control_tokens += any(score.holds_control_tokens for score in result.scores)
        self.implicit_prompts += result.row.implicit_prompt
        self.rewards += [score.reward for score in result.scores]
        if result.row.kind not in self.kinds:
            self.kinds.append(result.row.kind)
        if result.row.kind == "pair" and not result.row.tie:
            counts = self.pairs.setdefault(str(result.row.extra.get("domain", "all")), [0, 0])
            counts[0] += result.margin > 0
            counts[1] += 1
            chosen, rejected = (score.response_tokens for score in result.scores)
            self.longer[0 if chosen > rejected else 1 if chosen < rejected else 2] += 1
            self.margins.append(result.margin)


class Distribution:
    """How many numbers of each size there are, in fixed memory (32 MB at most) for any number of them.

    Numbers are counted by the first 22 bits of their float32 form, so a quantile is right to 0.006 % of itself. Count, least
    and greatest are exact.
    """

    def __init__(self) -> None:
        self.count = 0
        self.least = np.inf
        self.greatest = -np.inf
        self._counts = np.zeros(1 << _KEY_BITS, dtype=np.int64)

    def add(self, numbers: Sequence[float]) -> None:
        """Count some finite numbers."""
        if not len(numbers):
            return
        values = np.asarray(numbers, dtype=np.float64)
        self.count += len(values)
        self.least = min(self.least, float(values.min()))
        self.greatest = max(self.greatest, float(values.max()))
        bits = values.astype(np.float32).view(np.uint32)
        ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)  # unsigned integers in the order of the floats
        np.add.at(self._counts, ordered >> np.uint32(_CUT_BITS), 1)

    def values(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The numbers that were met, each in the middle of those counted with it, ascending; and how many of each."""
        keys = np.flatnonzero(self._counts)
        middle = (keys.astype(np.uint32) << np.uint32(_CUT_BITS)) | np.uint32(1 << (_CUT_BITS - 1))
        bits = np.where(middle & _SIGN, middle ^ _SIGN, ~middle)
        numbers = bits.view(np.float32).astype(np.float64)
        numbers[np.abs(numbers) < np.finfo(np.float32).tiny] = 0  # zero, and what is counted with it
        return np.clip(numbers, self.least, self.greatest), self._counts[keys]

    def quantile(self, share: float) -> float:
        """The least number that at least this share of all does not exceed (0: the least, 1: the greatest)."""
        if not self.count:
            raise ValueError("quantile: of no numbers")
        if share <= 0 or share >= 1:
            return self.least if share <= 0 else self.greatest
        numbers, counts = self.values()
        return float(numbers[np.searchsorted(np.cumsum(counts), share * self.count)])

    def histogram(self, bins: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts ``[bins]`` and edges ``[bins + 1]`` of equal bins; what lies far out is in the first and the last.

        The bins span the middle 99 % of the numbers, so that a few far ones leave the others visible.
        """
        low, high = self.quantile(0.005), self.quantile(0.995)
        size = max(abs(low), abs(high))
        if high - low <= 2e-4 * size:  # less than is told apart here: as good as one number
            low, high = low - max(0.5, size / 100), high + max(0.5, size / 100)
        edges = np.linspace(low, high, bins + 1)
        numbers, weights = self.values()
        counts, _ = np.histogram(np.clip(numbers, low, high), edges, weights=weights)
        return counts.astype(np.int64), edges
