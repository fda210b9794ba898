"""Batches of encoded rows: padded, packed, and packed with shared prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from adajudge_kernels import SequenceLayout

    from .encoding import EncodedRow

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class EncodedPair:
    """Both sides of a preference pair, and its weight in the loss."""

    chosen: EncodedRow
    rejected: EncodedRow
    weight: float = 1.0


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after another, without padding; T tokens in all.

    Args:
        input_ids: ``[1, T]`` int64.
        layout: where their prompts and responses lie.
    """

    input_ids: torch.Tensor
    layout: SequenceLayout

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on a device."""
        return PackedBatch(self.input_ids.to(device), self.layout.to(device))


def pad_rows(
    rows: Sequence[EncodedRow], *, pad_token_id: int, padding_side: PaddingSide = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them.

    Returns:
        ``input_ids`` int64, ``attention_mask`` int64 and ``response_mask`` bool, each ``[B, L]``. Which token
        pads is of no consequence: the masks alone say what is real.
    """
    import torch

    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    longest = max((len(row) for row in rows), default=0)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    response_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = longest - len(row) if padding_side == "left" else 0
        end = start + len(row)
        input_ids[i, start:end] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask[i, start:end] = 1
        response_mask[i, start + row.prompt_length : end] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


def pad_pairs(
    pairs: Sequence[EncodedPair], *, pad_token_id: int, padding_side: PaddingSide = "right"
) -> dict[str, torch.Tensor]:
    """Pad N pairs to one batch of 2N rows: all chosen sides, then all rejected ones in the same order.

    Returns:
        as `pad_rows`, and ``pair_weight [N]`` fp32.
    """
    import torch

    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = pad_rows(rows, pad_token_id=pad_token_id, padding_side=padding_side)
    batch["pair_weight"] = torch.tensor([pair.weight for pair in pairs], dtype=torch.float32)
    return batch


@dataclass(frozen=True)
class PairCollator:
    """`pad_pairs` as the ``data_collator`` of a Trainer."""

    pad_token_id: int
    padding_side: PaddingSide = "right"

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, torch.Tensor]:
        """Collate a list of pairs."""
        return pad_pairs(pairs, pad_token_id=self.pad_token_id, padding_side=self.padding_side)


def pack_rows(rows: Sequence[EncodedRow]) -> PackedBatch:
    """Lay rows one after another, each with its own prompt (``SequenceLayout.packed``)."""
    import torch

    from adajudge_kernels import SequenceLayout

    ids = [token_id for row in rows for token_id in row.input_ids]
    layout = SequenceLayout.packed([row.prompt_length for row in rows], [row.response_length for row in rows])
    return PackedBatch(torch.tensor([ids], dtype=torch.int64), layout)


def pack_shared_prompts(groups: Sequence[Sequence[EncodedRow]]) -> PackedBatch:
    """Lay each group's prompt once, then the responses of all its rows (``SequenceLayout.shared_prompts``).

    Raises:
        ValueError: an empty group, or rows of one group with different prompt tokens; use `group_by_prompt`.
    """
    import torch

    from adajudge_kernels import SequenceLayout

    ids: list[int] = []
    for i, group in enumerate(groups):
        if not group:
            raise ValueError(f"group {i} is empty; expected at least one row")
        prompt = group[0].prompt_ids
        ids += prompt
        for j, row in enumerate(group):
            if row.prompt_ids != prompt:
                raise ValueError(f"group {i}: the prompt tokens of row {j} differ from those of row 0")
            ids += row.response_ids
    layout = SequenceLayout.shared_prompts(
        [group[0].prompt_length for group in groups],
        [[row.response_length for row in group] for group in groups],
    )
    return PackedBatch(torch.tensor([ids], dtype=torch.int64), layout)


def group_by_prompt(rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Indices of the rows that share all prompt tokens, groups and members in order of appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row.prompt_ids), []).append(i)
    return list(groups.values())
