"""Means over rows, and between what they would lie for other rows of the same kind.

Rows of one prompt are no independent samples, so it is prompts that are weighed: a Bayesian bootstrap (Rubin, 1981). To the
prompts come half a one in which all values are the least possible and half a one in which all are the greatest: Jeffreys' prior
of a share. Without them ten right answers of ten would have an interval of no width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 2000
_HELD = 1 << 22  # weights at once


@dataclass(frozen=True)
class Figure:
    """A figure in per cent with its 95 % interval; NaN where there is nothing that it could be of."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Floats) -> Figure:
        """Of a figure (0 to 1) as `drawn_means` makes it: ``[1 + DRAWS]``, itself first."""
        value, others = 100 * draws[0], 100 * draws[1:]
        if np.isnan(value):
            return cls(math.nan, math.nan, math.nan)
        low, high = np.percentile(others, (2.5, 97.5))
        return cls(float(value), float(min(low, value)), float(max(high, value)))

    def to_record(self) -> dict[str, float | None]:
        """In JSON's types, which know no NaN."""
        return {name: None if math.isnan(x) else x for name, x in asdict(self).items()}

    def __str__(self) -> str:
        """Value and interval, one decimal."""
        return "none" if math.isnan(self.value) else f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def drawn_means(
    values: Floats, prompts: Sequence[Hashable], least: Floats, most: Floats, rng: np.random.Generator
) -> Floats:
    """Means ``[1 + DRAWS, V]`` of ``values [N, V]``: as they are, then with each draw's weights of the prompts.

    Args:
        values: NaN is left out of its mean.
        prompts: whose each row is, ``[N]``.
        least: that a value can be, ``[V]``.
        most: likewise.
        rng: what the weights are drawn from.
    """
    place: dict[Hashable, int] = {}
    owner = np.array([place.setdefault(prompt, len(place)) for prompt in prompts])
    sums, counts = np.zeros((2, len(place), values.shape[1]))
    np.add.at(sums, owner, np.nan_to_num(values))
    np.add.at(counts, owner, ~np.isnan(values))
    # Prompts with equal numbers are one with their weights' sum: a gamma variable too. So memory does not grow with the rows.
    both, many = np.unique(np.concatenate([sums, counts], axis=1), axis=0, return_counts=True)
    mean_count = counts.mean(axis=0)
    extremes = [np.concatenate([extreme * mean_count, mean_count]) for extreme in (least, most)]
    kinds, shares = np.vstack([both, *extremes]), np.concatenate([many, [0.5, 0.5]])
    block = max(1, _HELD // len(kinds))
    totals = [np.concatenate([sums.sum(axis=0), counts.sum(axis=0)])[None]]
    for start in range(0, DRAWS, block):
        weights = rng.gamma(shares, size=(min(block, DRAWS - start), len(shares)))
        totals.append(weights @ kinds)
    of_values, of_counts = np.split(np.concatenate(totals), 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return of_values / of_counts
