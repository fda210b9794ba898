"""What a judge without understanding would score on the world: length, counted words, bigrams, prompt overlap.

The sides of a pair are built so that all of these stay at chance; the tests and the card show it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from adajudge.builtin.world import Row

_BUCKETS = 512


def length_accuracy(rows: Sequence[Row]) -> float:
    """Share of pairs whose longer side is chosen; equal lengths count half."""
    longer = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    return sum(1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in longer) / len(longer)


def overlap_accuracy(rows: Sequence[Row]) -> float:
    """Share of pairs whose chosen side has more words of the prompt; equal counts count half."""
    score = 0.0
    for row in rows:
        prompt = set(row["prompt"].split())
        chosen, rejected = (sum(w in prompt for w in row[side].split()) for side in ("chosen", "rejected"))
        score += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    return score / len(rows)


def bag_of_words_accuracy(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Logistic regression on the difference of word counts."""
    return _linear_accuracy(train, test, lambda words: Counter(hash_bucket(w) for w in words))


def bigram_accuracy(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Logistic regression on the difference of hashed bigram counts."""
    return _linear_accuracy(
        train,
        test,
        lambda words: Counter(hash_bucket(f"{a} {b}") for a, b in itertools.pairwise(words)),
    )


def hash_bucket(text: str) -> int:
    """A bucket that does not depend on the process (Python's own hash of strings does)."""
    value = 0
    for byte in text.encode():
        value = (value * 131 + byte) % 1_000_003
    return value % _BUCKETS


def _linear_accuracy(
    train: Sequence[Row], test: Sequence[Row], count: Callable[[list[str]], Counter[int]]
) -> float:
    def differences(rows: Sequence[Row]) -> torch.Tensor:
        table = torch.zeros(len(rows), _BUCKETS)
        for i, row in enumerate(rows):
            for sign, side in ((1, "chosen"), (-1, "rejected")):
                for bucket, number in count(row[side].split()).items():
                    table[i, bucket] += sign * number
        return table

    features = differences(train)
    weight = torch.zeros(_BUCKETS, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.softplus(-(features @ weight)).mean() + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    margin = (differences(test) @ weight).detach()
    return float(((margin > 0).float() + 0.5 * (margin == 0).float()).mean())
