"""Where a conversation's last assistant turn lies, read off the token ids alone.

Callers that tokenise by themselves (TRL's GRPO) hand a model ``input_ids`` and ``attention_mask`` only. The
token ids around an assistant turn are fixed by the chat template, so they are stored as plain integers in the
model's configuration, and the response mask follows from them. A response that contains header text itself
cannot be told apart this way, which is why an explicit response mask always wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TurnBoundary:
    """Token ids around an assistant turn: header, scaffold, response, turn end.

    Args:
        assistant_header_ids: what a generating model is given to begin its turn, e.g.
            ``<|im_start|>assistant\\n``.
        scaffold_ids: what the template puts between header and answer (Qwen3: the empty think block); part of
            the prompt where it is there.
        turn_end_ids: the turn's terminator, part of the response; empty if the template has none.
        header_white_space: how many of the last header tokens are white space. A tokeniser may merge them
            with the first characters of a response; such a merged token counts as response.
        scaffold_white_space: the same for the scaffold.
    """

    assistant_header_ids: list[int]
    scaffold_ids: list[int] = field(default_factory=list)
    turn_end_ids: list[int] = field(default_factory=list)
    header_white_space: int = 0
    scaffold_white_space: int = 0

    def __post_init__(self) -> None:
        """Refuse what could never be found."""
        if not 0 <= self.header_white_space < max(1, len(self.assistant_header_ids)):
            raise ValueError(
                f"header_white_space: got {self.header_white_space}, expected less than the "
                f"{len(self.assistant_header_ids)} assistant_header_ids"
            )
        if not self.assistant_header_ids:
            raise ValueError("assistant_header_ids: got an empty list, expected at least one token id")

    def to_dict(self) -> dict[str, Any]:
        """Plain integers and lists of them, for a JSON configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TurnBoundary:
        """The inverse of `to_dict`."""
        return cls(**values)

    def response_span(self, ids: Sequence[int]) -> tuple[int, int]:
        """First token of the last assistant turn's response, and one past its terminator.

        The response begins behind the last header (and scaffold). It ends with the terminator behind that;
        without one (a generation cut short), with the last token.

        Raises:
            ValueError: there is no header, nothing behind it, or more than one terminator: a turn of somebody
                else may follow.
        """
        ids = list(ids)
        header = self.assistant_header_ids
        core = header[: len(header) - self.header_white_space]
        start = _find_last(ids, core, 0)
        if start < 0:
            raise ValueError(
                "no assistant header among its tokens; "
                "expected text with the judge's chat template applied, special tokens in it"
            )
        start = _skip(ids, start, header, self.header_white_space)
        if self.scaffold_ids:
            start = _skip(ids, start, self.scaffold_ids, self.scaffold_white_space)
        end = len(ids)
        if self.turn_end_ids:
            last = _find_last(ids, self.turn_end_ids, start)
            if (
                last >= 0
                and _find_last(ids[: last + len(self.turn_end_ids) - 1], self.turn_end_ids, start) >= 0
            ):
                raise ValueError("more than one end of turn behind the last assistant header")
            end = last + len(self.turn_end_ids) if last >= 0 else end
        if end <= start:
            raise ValueError("no response token behind the last assistant header")
        return start, end


def response_mask_from_header(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, boundary: TurnBoundary
) -> torch.Tensor:
    """Response mask of each row's last assistant turn, derived from the template's token ids.

    Args:
        input_ids: ``[B, L]`` token ids, padded on either side.
        attention_mask: ``[B, L]``, nonzero on real tokens. Padding is known from here only, never from token
            ids.
        boundary: the template's token ids.

    Returns:
        ``[B, L]`` bool on the device of ``input_ids``: True from the first response token up to and including
        the terminator. It equals the mask of `ConversationEncoder` unless a response contains the
        header itself.

    Raises:
        ValueError: shapes do not match, or a row (named) has no assistant header or an empty response.
    """
    import torch

    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and attention_mask: expected the same shape [B, L], got {tuple(input_ids.shape)} "
            f"and {tuple(attention_mask.shape)}"
        )
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (ids, attended) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
        positions = [i for i, real in enumerate(attended) if real]
        try:
            start, end = boundary.response_span([ids[i] for i in positions])
        except ValueError as error:
            raise ValueError(
                f"row {row}: cannot tell the response from the prompt: {error}; pass response_mask"
            ) from None
        mask[row, positions[start:end]] = True
    return mask.to(input_ids.device)


def _find_last(ids: list[int], pattern: list[int], first: int) -> int:
    """Last position from ``first`` on where ``pattern`` begins, or -1."""
    for start in range(len(ids) - len(pattern), first - 1, -1):
        if ids[start] == pattern[0] and ids[start : start + len(pattern)] == pattern:
            return start
    return -1


def _skip(ids: list[int], start: int, pattern: list[int], white_space: int) -> int:
    """Position behind ``pattern`` at ``start``; with or without its white space; else ``start``."""
    for length in (len(pattern), len(pattern) - white_space):
        if length and ids[start : start + length] == pattern[:length]:
            return start + length
    return start
