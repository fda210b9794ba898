"""A ragged batch as each side wants it: flat rows for a layout of ours, padded ``[B, L, d]`` with masks for plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

import adajudge_kernels as ak


@dataclasses.dataclass
class Batch:
    """Sequences of a prompt and a response; their tokens' flat rows are packed, or each prompt's come once for all its
    responses (`shared`)."""

    layout: ak.SequenceLayout  # of the flat rows
    index: Tensor  # [B, L], the flat row of each token of a right-padded batch, -1 at padding
    response: Tensor  # [B, L], bool

    @classmethod
    def packed(cls, prompts: Sequence[int], responses: Sequence[int], device: torch.device) -> Batch:
        return cls._of(ak.SequenceLayout.packed(prompts, responses, device))

    @classmethod
    def shared(
        cls, prompts: Sequence[int], responses: Sequence[Sequence[int]], device: torch.device
    ) -> Batch:
        return cls._of(ak.SequenceLayout.shared_prompts(prompts, responses, device))

    @classmethod
    def _of(cls, layout: ak.SequenceLayout) -> Batch:
        ranges = layout.ranges.tolist()
        index = torch.full((len(ranges), layout.max_length), -1)
        for row, (start, stop, then, end) in enumerate(ranges):
            tokens = torch.cat([torch.arange(start, stop), torch.arange(then, end)])
            index[row, : len(tokens)] = tokens
        index = index.to(layout.device)
        response = (layout.roles[index.clamp(min=0)] == ak.TokenRole.RESPONSE) & (index >= 0)
        return cls(layout, index, response)

    @property
    def attention(self) -> Tensor:
        """``[B, L]``, True at tokens."""
        return self.index >= 0

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        return self.attention, self.response

    @property
    def rows(self) -> int:
        """Flat ones."""
        return self.layout.num_tokens

    @property
    def useful_tokens(self) -> int:
        """Of all sequences: a prompt counts for each of its responses."""
        return int(self.attention.sum())

    @property
    def padded_layout(self) -> ak.SequenceLayout:
        """Of the padded batch's rows ``[B * L]``."""
        return ak.SequenceLayout.padded(*self.masks)

    def pad(self, flat: Tensor, some: slice = slice(None)) -> Tensor:
        """``[rows, d]`` -> ``[B, L, d]``, or `some` of the B sequences; zeros at padding; differentiable."""
        index = self.index[some]
        rows = flat.index_select(
            0, index.clamp(min=0).flatten()
        )  # backward is faster than that of flat[index]
        return rows.unflatten(0, index.shape) * (index >= 0)[..., None]

    def flat(self, padded: Tensor, some: slice = slice(None)) -> Tensor:
        """A gradient ``[B, L, d]`` or ``[B * L, d]``, or that of `some` of the B sequences, as one of the flat rows: summed
        over the sequences that share a row."""
        rows = padded.reshape(-1, padded.shape[-1])[self.attention[some].flatten()]
        index = self.index[some][self.attention[some]]
        return torch.zeros(self.rows, rows.shape[-1], dtype=torch.float64, device=rows.device).index_add(
            0, index, rows.double()
        )

    @property
    def sequence_of(self) -> Tensor:
        """Of each row of a packed batch."""
        return torch.arange(len(self.index), device=self.index.device).repeat_interleave(
            self.attention.sum(dim=1)
        )

    @property
    def last_rows(self) -> Tensor:
        """The flat row of each sequence's last token."""
        return self.index.gather(1, self.attention.sum(dim=1, keepdim=True) - 1).squeeze(1)
