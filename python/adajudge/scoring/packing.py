"""Which sequences a judge reads together: packs of about a budget of tokens, equal prompts once.

Nothing here knows of a model or a device. The same sequences and the same budget give the same packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from adajudge.data import EncodedRow


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
    pieces = [piece for group in groups.values() for piece in _pieces(rows, group, budget)]
    pieces.sort(key=lambda piece: -piece[1])  # stable: ties in order of appearance
    packs: list[Pack] = []
    group_list: list[tuple[int, ...]] = []
    filled = 0
    for piece, tokens in pieces:
        if group_list and filled + tokens > budget:
            packs.append(Pack(tuple(group_list), filled))
            group_list, filled = [], 0
        group_list.append(piece)
        filled += tokens
    if group_list:
        packs.append(Pack(tuple(group_list), filled))
    return packs


def _pieces(
    rows: Sequence[EncodedRow], group: list[int], budget: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    """A group in runs that fit the budget with their prompt, each with its tokens."""
    prompt = rows[group[0]].prompt_length
    run: list[int] = []
    filled = prompt
    for index in sorted(group, key=lambda i: -rows[i].response_length):
        response = rows[index].response_length
        if run and filled + response > budget:
            yield tuple(run), filled
            run, filled = [], prompt
        run.append(index)
        filled += response
    yield tuple(run), filled


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


def halved(
    pack: Pack,
    rows: Sequence[EncodedRow],
    packer: Callable[[Sequence[EncodedRow], Sequence[int], int], list[Pack]],
) -> list[Pack]:
    """The sequences of a pack that was too large, in packs of at most half its tokens; none for a single sequence."""
    sequences = pack.sequences
    return packer(rows, sequences, pack.tokens // 2) if len(sequences) > 1 else []
