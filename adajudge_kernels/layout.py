"""Where the tokens of each sequence lie: the one place that knows padding, packing and prompt sharing.

Every operation takes flat token states ``[T, d]`` and one `SequenceLayout`. A sequence reads up to two ranges
of tokens, first ``[start0, stop0)``, then ``[start1, stop1)``; each token has one role. Nothing else about the
batch reaches a kernel, so one kernel serves padded, packed and prompt-shared batches.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from adajudge_kernels.tables import (
    CHUNK_TOKENS,
    AttentionTables,
    LayoutTables,
    attention_tables,
    int32,
    pooling_tables,
)

__all__ = ["CHUNK_TOKENS", "AttentionTables", "LayoutTables", "SequenceLayout", "TokenRole"]

_INT32_MAX = 2**31 - 1


class TokenRole(enum.IntEnum):
    """What a token is to its sequence. Stored as int8, one per token."""

    PADDING = 0
    PROMPT = 1
    RESPONSE = 2


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Token ranges and roles of a batch of ``B`` sequences over ``T`` token slots.

    Build one with `padded`, `packed` or `shared_prompts`; the constructor itself checks nothing, and a copy with another
    field (``dataclasses.replace``) has the tables of before. Token indices are int32 (``T < 2**31``); offsets of elements
    derived from them must be int64.

    Attributes:
        ranges: int32 ``[B, 4]``, ``(start0, stop0, start1, stop1)`` per sequence, empty ranges as ``(0, 0)``.
            A prompt-shared sequence reads its prompt, then its own response; any other reads one range.
        roles: int8 ``[T]``, a `TokenRole` per token slot.
        last_response: int32 ``[B]``, index ``tau`` of the last response token.
        prompt_lengths: int32 ``[B]``, number of prompt tokens of each sequence.
        response_lengths: int32 ``[B]``, number of response tokens of each sequence (at least one).
        query_ranges: int32 ``[G, 2]``. Attention groups: every non-padding token lies in exactly one.
        key_ranges: int32 ``[G, 4]``, what the queries of a group see: (before its own range, its own range).
        readers: int32 ``[G, 2]``, which sequences read the tokens of a group: (first, count).
        max_length: tokens of the longest sequence (or of a longer prompt that no sequence reads).
        tables: the above as pooling kernels want it; filled in by `padded`, `packed` and `shared_prompts`.
        attention: as attention wants it, a query for every token.
        response_attention: the same with queries for response tokens only.
        kept: int64 ``[T']``, the slots that are not padding; None where there is no padding.
        unpadded: the layout of ``states[kept]``; None where there is no padding.
        shares_prompts: whether the layout was built by `shared_prompts`.
        padded_shape: ``(B, L)`` of a padded batch, else None.
    """

    ranges: Tensor
    roles: Tensor
    last_response: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    query_ranges: Tensor
    key_ranges: Tensor
    readers: Tensor
    max_length: int
    tables: LayoutTables | None = None
    attention: AttentionTables | None = None
    response_attention: AttentionTables | None = None
    kept: Tensor | None = None
    unpadded: SequenceLayout | None = None
    shares_prompts: bool = False
    padded_shape: tuple[int, int] | None = None

    @classmethod
    @torch.inference_mode(False)  # it may be used in training later
    def padded(cls, attention_mask: Tensor, response_mask: Tensor) -> SequenceLayout:
        """Layout of a padded batch: states are the ``[B*L, d]`` view of ``[B, L, d]``.

        Args:
            attention_mask: ``[B, L]`` bool, integer or float, zeros and ones; one marks a token of the
                sequence. The tokens of a row are one unbroken run (padding left, right or on both sides).
            response_mask: ``[B, L]``, zeros and ones; one marks a response token, in any pattern (several turns).
                What it says of padding does not matter.

        Raises:
            ValueError: shapes differ or are not ``[B, L]``; a mask has other values; a row has a gap; a
                sequence has no response token.
        """
        _check_mask("attention_mask", attention_mask)
        _check_mask("response_mask", response_mask)
        if attention_mask.shape != response_mask.shape:
            raise ValueError(
                f"response_mask: shape {tuple(response_mask.shape)} came, expected that of attention_mask, "
                f"{tuple(attention_mask.shape)}"
            )
        device = attention_mask.device
        _check_zeros_and_ones("attention_mask", attention_mask)
        _check_zeros_and_ones("response_mask", response_mask)
        real = attention_mask.detach().cpu() != 0  # synchronises: layouts are described on the host
        response = (response_mask.detach().cpu() != 0) & real
        batch, length = real.shape
        _check_token_count(batch * length)
        start, stop = length - _end_of_ones(real.flip(1)), _end_of_ones(real)
        counts = real.sum(dim=1)
        if bool(((stop - start).clamp(min=0) != counts).any()):
            row = int(((stop - start).clamp(min=0) != counts).nonzero()[0])
            raise ValueError(
                f"attention_mask: row {row} has a gap between its tokens; expected one unbroken run of ones"
            )
        response_lengths = response.sum(dim=1)
        _check_responses(response_lengths)
        last = _end_of_ones(response) - 1
        offset = torch.arange(batch, device="cpu") * length
        begin, end = offset + start, offset + stop
        empty = torch.zeros_like(begin)
        roles = torch.where(
            response, TokenRole.RESPONSE, torch.where(real, TokenRole.PROMPT, TokenRole.PADDING)
        )
        layout = cls(
            ranges=int32(torch.stack([begin, end, empty, empty], dim=1)),
            roles=roles.to(torch.int8).flatten(),
            last_response=int32(offset + last),
            prompt_lengths=int32(counts - response_lengths),
            response_lengths=int32(response_lengths),
            query_ranges=int32(torch.stack([begin, end], dim=1)),
            key_ranges=int32(torch.stack([empty, empty, begin, end], dim=1)),
            readers=_one_reader_each(batch),
            max_length=int(counts.max()) if batch else 0,
            padded_shape=(batch, length),
        )
        return layout._keep_unpadded()._with_tables().to(device)

    @classmethod
    @torch.inference_mode(False)  # it may be used in training later
    def packed(
        cls,
        prompt_lengths: Sequence[int] | Tensor,
        response_lengths: Sequence[int] | Tensor,
        device: torch.device | str | None = None,
    ) -> SequenceLayout:
        """Layout without padding: prompt 0, response 0, prompt 1, response 1, ...

        Args:
            prompt_lengths: ``[B]`` tokens of each prompt, zero allowed.
            response_lengths: ``[B]`` tokens of each response, at least one.
            device: where the layout lives; default the device of `prompt_lengths` if a tensor, else the CPU.

        Raises:
            ValueError: the two differ in length, a length is negative, or a response is empty.
        """
        device = _device_of(prompt_lengths, device)
        prompts = _lengths("prompt_lengths", prompt_lengths)
        responses = _lengths("response_lengths", response_lengths)
        if len(prompts) != len(responses):
            raise ValueError(
                f"response_lengths: {len(responses)} lengths came, expected one per prompt, {len(prompts)}"
            )
        _check_responses(responses)
        stop = torch.cumsum(prompts + responses, dim=0)
        start = stop - prompts - responses
        total = int(stop[-1]) if len(stop) else 0
        _check_token_count(total)
        empty = torch.zeros_like(start)
        return (
            cls(
                ranges=int32(torch.stack([start, stop, empty, empty], dim=1)),
                roles=_alternating_roles(torch.stack([prompts, responses], dim=1).flatten()),
                last_response=int32(stop - 1),
                prompt_lengths=int32(prompts),
                response_lengths=int32(responses),
                query_ranges=int32(torch.stack([start, stop], dim=1)),
                key_ranges=int32(torch.stack([empty, empty, start, stop], dim=1)),
                readers=_one_reader_each(len(start)),
                max_length=int((prompts + responses).max()) if len(prompts) else 0,
            )
            ._with_tables()
            .to(device)
        )

    @classmethod
    @torch.inference_mode(False)  # it may be used in training later
    def shared_prompts(
        cls,
        prompt_lengths: Sequence[int] | Tensor,
        response_lengths: Sequence[Sequence[int] | Tensor],
        device: torch.device | str | None = None,
    ) -> SequenceLayout:
        """Layout in which the candidates of one prompt share its tokens: prompt 0, all its responses, prompt 1, ...

        Sequences are numbered in that order; sequence ``b`` reads its prompt's range, then its own response.

        Args:
            prompt_lengths: ``[P]`` tokens of each prompt, zero allowed.
            response_lengths: for each prompt the lengths of its candidates' responses, at least one token each.
            device: as in `packed`.

        Raises:
            ValueError: not one list per prompt, a length is negative, or a response is empty.
        """
        device = _device_of(prompt_lengths, device)
        prompts = _lengths("prompt_lengths", prompt_lengths)
        if not isinstance(response_lengths, Sequence) or isinstance(response_lengths, str):
            raise ValueError(
                f"response_lengths: {type(response_lengths).__name__} came, expected one list per prompt"
            )
        per_prompt = [
            _lengths(f"response_lengths[{i}]", lengths) for i, lengths in enumerate(response_lengths)
        ]
        if len(per_prompt) != len(prompts):
            raise ValueError(
                f"response_lengths: {len(per_prompt)} lists came, expected one per prompt, {len(prompts)}"
            )
        candidates = torch.tensor([len(lengths) for lengths in per_prompt], dtype=torch.long, device="cpu")
        responses = torch.cat(per_prompt) if per_prompt else torch.zeros(0, dtype=torch.long, device="cpu")
        _check_responses(responses)
        # Pieces in storage order: each prompt followed by its responses.
        prompt_piece = torch.arange(len(prompts), device="cpu") + torch.cumsum(candidates, 0) - candidates
        owner = torch.repeat_interleave(torch.arange(len(prompts), device="cpu"), candidates)
        response_piece = torch.arange(len(responses), device="cpu") + owner + 1
        lengths = torch.zeros(len(prompts) + len(responses), dtype=torch.long, device="cpu")
        lengths[prompt_piece], lengths[response_piece] = prompts, responses
        piece_roles = torch.full_like(lengths, int(TokenRole.PROMPT))
        piece_roles[response_piece] = int(TokenRole.RESPONSE)
        stop = torch.cumsum(lengths, 0)
        start = stop - lengths
        total = int(stop[-1]) if len(stop) else 0
        _check_token_count(total)
        prompt_range = torch.stack([start[prompt_piece], stop[prompt_piece]], dim=1)
        response_range = torch.stack([start[response_piece], stop[response_piece]], dim=1)
        ranges = torch.cat([prompt_range[owner], response_range], dim=1)
        nothing = torch.zeros_like(prompt_range)
        return (
            cls(
                ranges=int32(ranges),
                roles=torch.repeat_interleave(piece_roles, lengths).to(torch.int8),
                last_response=int32(response_range[:, 1] - 1),
                prompt_lengths=int32(prompts[owner]),
                response_lengths=int32(responses),
                query_ranges=int32(torch.cat([prompt_range, response_range])),
                key_ranges=int32(torch.cat([torch.cat([nothing, prompt_range], dim=1), ranges])),
                readers=int32(
                    torch.cat(
                        [
                            torch.stack([torch.cumsum(candidates, 0) - candidates, candidates], dim=1),
                            _one_reader_each(len(responses)),
                        ]
                    )
                ),
                max_length=int(torch.cat([prompts, prompts[owner] + responses]).max()) if len(prompts) else 0,
                shares_prompts=True,
            )
            ._with_tables()
            .to(device)
        )

    def _keep_unpadded(self) -> SequenceLayout:
        """This padded layout with `kept` and `unpadded` filled in, if it has padding."""
        real = self.roles != TokenRole.PADDING
        if bool(real.all()):
            return self
        # Tokens kept before each slot.
        before = torch.zeros(self.num_tokens + 1, dtype=torch.int32, device="cpu")
        before[1:] = torch.cumsum(real, 0)
        names = ("ranges", "last_response", "query_ranges", "key_ranges")
        moved: dict[str, Any] = {name: before[getattr(self, name).long()] for name in names}
        unpadded = replace(self, **moved, roles=self.roles[real], padded_shape=None)._with_tables()
        return replace(self, kept=real.nonzero().squeeze(1), unpadded=unpadded)

    def _with_tables(self) -> SequenceLayout:
        """This layout with its `tables`."""
        counts = (self.last_response, self.prompt_lengths, self.response_lengths)
        groups = self.key_ranges, self.readers, self.num_sequences
        return replace(
            self,
            tables=pooling_tables(
                self.roles,
                torch.cat([self.ranges, torch.stack(counts, dim=1)], dim=1),
                self.query_ranges,
                self.readers,
                self.prompt_lengths + self.response_lengths,
            ),
            attention=attention_tables(*groups),
            response_attention=attention_tables(*groups, self.roles == TokenRole.RESPONSE),
        )

    @property
    def has_padding(self) -> bool:
        """Whether any token slot has the role padding."""
        return self.kept is not None

    @property
    def num_sequences(self) -> int:
        """``B``."""
        return self.ranges.shape[0]

    @property
    def num_tokens(self) -> int:
        """``T``, padding slots included."""
        return self.roles.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.roles.device

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in values.items() if isinstance(v, (Tensor, SequenceLayout))
        }
        for name, table in values.items():
            if isinstance(table, (LayoutTables, AttentionTables)):
                moved[name] = type(table)(*(x.to(device) for x in table))
        return replace(self, **moved)

    def position_ids(self) -> Tensor:
        """int64 ``[T]``: the place of each token in its own sequence, from 0; padding gets 0.

        A shared prompt counts from 0 and every response goes on where its prompt ends, so all candidates of a
        prompt of ``n`` tokens start at position ``n``.
        """
        positions = torch.zeros(self.num_tokens, dtype=torch.long, device=self.device)
        if self.query_ranges.shape[0] == 0:
            return positions
        start, stop = self.query_ranges.long().unbind(1)
        before = (self.key_ranges[:, 1] - self.key_ranges[:, 0]).long()
        group = torch.repeat_interleave(torch.arange(len(start), device=self.device), stop - start)
        within = torch.arange(len(group), device=self.device) - torch.repeat_interleave(
            torch.cumsum(stop - start, 0) - (stop - start), stop - start
        )
        positions[start[group] + within] = before[group] + within
        return positions

    def without_padding(self) -> tuple[Tensor | None, SequenceLayout]:
        """The same sequences with the padding slots taken out.

        Returns:
            ``(kept, layout)``: int64 ``[T']`` indices of the kept tokens, so that ``hidden[kept]`` are the
            states that `layout` describes; ``(None, self)`` where there is no padding.
        """
        return self.kept, self if self.unpadded is None else self.unpadded


def _end_of_ones(mask: Tensor) -> Tensor:
    """int64 ``[B]``: the column behind the last one of each row, 0 where there is none."""
    batch, length = mask.shape
    if length == 0:
        return torch.zeros(batch, dtype=torch.long, device="cpu")
    return torch.where(mask, torch.arange(1, length + 1, device="cpu"), 0).amax(dim=1)


def _check_mask(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name}: {came} came, expected a tensor of shape [B, L]")
    _check_numbers(name, mask)


def _check_numbers(name: str, x: Tensor) -> None:
    if x.is_meta:
        raise ValueError(
            f"{name}: on meta, which has no numbers; build the layout elsewhere, then layout.to('meta')"
        )


def _check_zeros_and_ones(name: str, mask: Tensor) -> None:
    """An additive mask or a row of labels would otherwise be read as its opposite."""
    values = mask.detach().cpu()
    wrong = (values != 0) & (values != 1)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: {values[row, column].item()} came in row {row}, expected zeros and ones only"
        )


def _check_token_count(total: int) -> None:
    if total > _INT32_MAX:
        raise ValueError(f"{total} token slots came, expected fewer than 2**31 (token indices are int32)")


def _check_responses(response_lengths: Tensor) -> None:
    if bool((response_lengths < 1).any()):
        sequence = int((response_lengths < 1).nonzero()[0])
        raise ValueError(f"sequence {sequence} has no response token; expected at least one")


def _device_of(lengths: object, device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    return lengths.device if isinstance(lengths, Tensor) else "cpu"


def _lengths(name: str, values: Sequence[int] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        _check_numbers(name, values)
    try:
        tensor = (values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: {values!r} came, expected integers of shape [N]") from None
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} came, expected integers of shape [N]"
        )
    if bool((tensor < 0).any()):
        raise ValueError(f"{name}[{int((tensor < 0).nonzero()[0])}] is negative; expected token counts")
    return tensor.long()


def _alternating_roles(lengths: Tensor) -> Tensor:
    roles = torch.tensor([TokenRole.PROMPT, TokenRole.RESPONSE], dtype=torch.int8, device="cpu").repeat(
        len(lengths) // 2
    )
    return torch.repeat_interleave(roles, lengths)


def _one_reader_each(count: int) -> Tensor:
    """Group ``g`` is read by sequence ``g`` alone."""
    first = torch.arange(count, device="cpu")
    return torch.stack([first, torch.ones_like(first)], dim=1).to(torch.int32)
