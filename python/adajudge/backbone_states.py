"""From a batch of tokens to a backbone's token states ``[T, d]``, whatever its layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adajudge.attention_masks import attention_arguments
from adajudge_kernels import SequenceLayout, TokenRole


def without_padding(batch: dict[str, Any], layout: SequenceLayout) -> tuple[dict[str, Any], SequenceLayout]:
    """A padded batch, ``[B, L]`` and ``[B, L, d]``, as one row of its sequences, ``[1, T]`` and ``[1, T, d]``."""
    kept, packed = layout.without_padding()

    def row(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return (tokens if kept is None else tokens.index_select(0, kept)).unsqueeze(0)

    rows = {name: None if x is None else row(x) for name, x in batch.items()}
    return rows, replace(packed, padded_shape=None)


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
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return _read(backbone, batch, layout, options)
    lengths = layout.prompt_lengths + layout.response_lengths
    long = lengths > rope["original_max_position_embeddings"]
    if not bool(long.any()) or bool(long.all()):
        return _read(backbone, batch, layout, options)
    if layout.shares_prompts:
        raise ValueError(
            f"layout: sequences on both sides of {rope['original_max_position_embeddings']} tokens share "
            "prompts, which this backbone reads differently; pass them as two batches"
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
