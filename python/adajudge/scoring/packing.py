"""Which sequences a judge reads together: packs of about a budget of tokens, equal prompts once.

Nothing here knows of a model or a device. The same sequences and the same budget give the same packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adajudge.data import EncodedRow

T = TypeVar("T")


@dataclass(frozen=True)
class Pack:
    """Sequences that are read together.

    Args:
        groups: indices of the sequences; those of a group have the same prompt, which lies there once.
        tokens: those that are read: each group's prompt once and all responses, or all slots of a padded batch.
    """

    groups: tuple[tuple[int, ...], ...]
    tokens: int

    @property
    def sequences(self) -> list[int]:
        """All indices, group by group."""
        return [index for group in self.groups for index in group]


def shared_packs(rows: Sequence[EncodedRow], chosen: Sequence[int], budget: int) -> list[Pack]:
    """Packs in which sequences of equal prompt tokens share them; the longest come first.

    A prompt with more responses than the budget has room for is laid down once in each of several packs.

    Args:
        rows: all sequences.
        chosen: indices of those to be packed.
        budget: tokens of a pack; only a pack of one sequence may have more.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in chosen:
        groups.setdefault(tuple(rows[index].prompt_ids), []).append(index)
    pieces = []
    for group in groups.values():
        prompt = rows[group[0]].prompt_length
        responses = _longest_first([(index, rows[index].response_length) for index in group])
        pieces += [(tuple(run), prompt + filled) for run, filled in _runs(responses, budget - prompt)]
    return [Pack(tuple(run), filled) for run, filled in _runs(_longest_first(pieces), budget)]


def packed_packs(rows: Sequence[EncodedRow], chosen: Sequence[int], budget: int) -> list[Pack]:
    """Packs of sequences one after another, the longest first, each with its own prompt."""
    sequences = _longest_first([((index,), len(rows[index])) for index in chosen])
    return [Pack(tuple(run), filled) for run, filled in _runs(sequences, budget)]


def padded_packs(rows: Sequence[EncodedRow], chosen: Sequence[int], budget: int) -> list[Pack]:
    """Packs for padded batches, sorted by length: the longest of a pack times their number is within the budget."""
    order = sorted(chosen, key=lambda i: -len(rows[i]))
    packs = []
    begin = 0
    while begin < len(order):
        longest = len(rows[order[begin]])
        count = min(max(1, budget // longest), len(order) - begin)
        packs.append(Pack(tuple((i,) for i in order[begin : begin + count]), count * longest))
        begin += count
    return packs


def _longest_first(items: list[tuple[T, int]]) -> list[tuple[T, int]]:
    """Sorted by their tokens; equals stay in order of appearance."""
    return sorted(items, key=lambda item: -item[1])


def _runs(items: list[tuple[T, int]], room: int) -> Iterator[tuple[list[T], int]]:
    """Items with their tokens, in runs that fit the room, and what each run fills; an item always fits an empty run."""
    run: list[T] = []
    filled = 0
    for item, tokens in items:
        if run and filled + tokens > room:
            yield run, filled
            run, filled = [], 0
        run.append(item)
        filled += tokens
    if run:
        yield run, filled
