"""From a batch of tokens to a backbone's token states ``[T, d]``, whatever its layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adajudge.attention_masks import attention_arguments
from adajudge_kernels import SequenceLayout, TokenRole


class Unpadded(NamedTuple):
    """A padded batch as one row of tokens.

    Attributes:
        batch: as of `token_states`, ``[1, T]`` and ``[1, T, d]``.
        layout: packed or prompt-shared.
        order: int64 ``[B]``, the layout's sequence of each row of the batch; None if they are in the same order.
    """

    batch: dict[str, Any]
    layout: SequenceLayout
    order: Tensor | None = None


def without_padding(batch: dict[str, Any], layout: SequenceLayout) -> Unpadded:
    """The sequences of a padded batch, ``[B, L]`` and ``[B, L, d]``, one after another."""
    kept, packed = layout.without_padding()
    rows = {name: None if x is None else _row(x, kept) for name, x in batch.items()}
    return Unpadded(rows, replace(packed, padded_shape=None))


def with_shared_prompts(batch: dict[str, Any], layout: SequenceLayout) -> Unpadded:
    """The same, prompts of equal tokens taken once: those of a pair, or of N candidates, whatever lies between them.

    Rows whose response is not one run at their end (several turns) have no such form; then nothing is shared. Looks at
    the tokens, and waits for the device to have them.
    """
    if batch["input_ids"] is None or layout.num_sequences == 0:
        return without_padding(batch, layout)
    start, stop = layout.query_ranges.cpu().long().unbind(1)
    prompts, responses = (x.cpu().long() for x in (layout.prompt_lengths, layout.response_lengths))
    is_response = layout.roles.cpu() == TokenRole.RESPONSE
    before = torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), is_response.cumsum(0)])
    at_their_end = bool((before[stop] - before[start + prompts] == responses).all())
    ids = batch["input_ids"].flatten().cpu()
    groups: dict[bytes, list[int]] = {}
    for row, (begin, length) in enumerate(zip(start.tolist(), prompts.tolist(), strict=True)):
        groups.setdefault(ids[begin : begin + length].numpy().tobytes(), []).append(row)
    if not at_their_end or len(groups) == layout.num_sequences:
        return without_padding(batch, layout)
    members = list(groups.values())
    runs = [
        run
        for rows in members
        for run in (
            torch.arange(int(start[rows[0]]), int(start[rows[0]] + prompts[rows[0]]), device="cpu"),
            *(torch.arange(int(start[row] + prompts[row]), int(stop[row]), device="cpu") for row in rows),
        )
    ]
    shared = SequenceLayout.shared_prompts(
        prompts[[rows[0] for rows in members]], [responses[rows] for rows in members], layout.device
    )
    kept = torch.cat(runs).to(layout.device)
    order = torch.tensor([row for rows in members for row in rows], device="cpu").argsort().to(layout.device)
    tokens = {name: None if x is None else _row(x, kept) for name, x in batch.items()}
    return Unpadded(tokens, shared, order)


def _row(x: Tensor, kept: Tensor | None) -> Tensor:
    tokens = x.flatten(0, 1)
    return (tokens if kept is None else tokens.index_select(0, kept)).unsqueeze(0)


def token_states(
    backbone: PreTrainedModel, batch: dict[str, Any], layout: SequenceLayout, options: dict[str, Any]
) -> Tensor:
    """Last hidden states ``[T, d]`` of the backbone.

    Backbones of the LongRoPE kind (Phi-3.5) turn their positions differently once the longest sequence of the batch
    exceeds the length they were first trained on. Short and long sequences are therefore read apart, or a short one's
    reward would depend on its neighbours.

    Args:
        backbone: a transformers decoder without LM head.
        batch: ``input_ids`` or ``inputs_embeds``, and ``position_ids``: ``[B, L]`` if padded, else ``[1, T]``.
        layout: of the batch.
        options: further arguments of the backbone's forward.

    Raises:
        ValueError: the backbone cannot serve the layout.
    """
    config = backbone.config.get_text_config(decoder=True)
    if layout.num_tokens == 0:  # no backbone takes an empty batch
        return torch.zeros(0, config.hidden_size, dtype=backbone.dtype, device=layout.device)
    border = long_rope_border(backbone)
    if border is None:
        return _read(backbone, batch, layout, options)
    lengths = layout.prompt_lengths + layout.response_lengths
    long = lengths > border
    if not bool(long.any()) or bool(long.all()):
        return _read(backbone, batch, layout, options)
    if layout.shares_prompts:
        raise ValueError(
            f"layout: sequences on both sides of {border} tokens share prompts, which this backbone reads "
            "differently; pass them as two batches"
        )
    axis = 1 if layout.padded_shape is None else 0
    chosen = torch.repeat_interleave(long, lengths) if layout.padded_shape is None else long
    parts, places = [], []
    for side, of_side in ((~chosen, ~long), (chosen, long)):
        place = side.nonzero().squeeze(1)
        part = {name: None if x is None else x.index_select(axis, place) for name, x in batch.items()}
        states = _read(backbone, part, _part(layout, of_side), options)
        parts.append(states if layout.padded_shape is None else states.unflatten(0, (len(place), -1)))
        places.append(place)
    return torch.cat(parts)[torch.cat(places).argsort()].flatten(0, -2)


def long_rope_border(backbone: PreTrainedModel) -> int | None:
    """Tokens of a sequence beyond which its positions turn differently (LongRoPE); None: they never do."""
    config = backbone.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


def _part(layout: SequenceLayout, chosen: Tensor) -> SequenceLayout:
    """The layout of the chosen sequences alone; `chosen` is bool ``[B]``."""
    if layout.padded_shape is None:
        prompts, responses = layout.prompt_lengths[chosen], layout.response_lengths[chosen]
        return SequenceLayout.packed(prompts, responses)
    roles = layout.roles.view(layout.padded_shape)[chosen]
    return SequenceLayout.padded(roles != TokenRole.PADDING, roles == TokenRole.RESPONSE)


def _read(
    backbone: PreTrainedModel, batch: dict[str, Any], layout: SequenceLayout, options: dict[str, Any]
) -> Tensor:
    """One call of the backbone, ``[T, d]``. With a cache, packed sequences would see each other: none."""
    arguments = options | batch | attention_arguments(backbone, layout)
    return backbone(**arguments, use_cache=False).last_hidden_state.flatten(0, 1)
