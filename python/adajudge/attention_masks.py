"""How a transformers backbone is told which tokens see each other: the one place that knows its implementations.

Padding is told by its mask. Packed sequences are told apart by positions that restart at 0, which every attention
implementation of transformers understands where no mask and no cache is given. A tree of prompts and responses cannot
be told by positions: it needs its mask, or the attention of `adajudge.backbone_attention`, which takes the layout.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from adajudge import backbone_attention
from adajudge_kernels import SequenceLayout, TokenRole

_TREE_IMPLEMENTATIONS = ("eager", "sdpa")
_PACKED_IMPLEMENTATIONS = (*_TREE_IMPLEMENTATIONS, "flex_attention", backbone_attention.NAME)
_FULL, _WINDOWED = "full_attention", "sliding_attention"


def reads_no_padding(config: PreTrainedConfig) -> bool:
    """Whether the backbone's attention serves rows without padding only."""
    return config.get_text_config(decoder=True)._attn_implementation == backbone_attention.NAME


def masked_attention(backbone: PreTrainedModel) -> str:
    """The attention implementation that takes any mask, and so serves windows of any length."""
    return "sdpa" if backbone._supports_sdpa else "eager"


def attention_arguments(backbone: PreTrainedModel, layout: SequenceLayout) -> dict[str, Any]:
    """What the backbone's forward is given so that every token sees its own sequence, and nothing else.

    Args:
        backbone: any transformers decoder, to be called with ``layout.position_ids()`` and without a cache.
        layout: of the batch.

    Returns:
        ``attention_mask``, and what the attention implementation takes beside it.

    Raises:
        ValueError: the backbone, or its attention implementation, cannot serve such a layout.
    """
    if layout.padded_shape is not None:
        real = layout.roles != TokenRole.PADDING
        return {"attention_mask": real.view(layout.padded_shape).long()}
    config = backbone.config.get_text_config(decoder=True)
    check_keeps_apart(backbone, config)
    if reads_no_padding(config):
        # Some decoders put their window in the mask only, which this attention never sees.
        window = window_in_force(config)
        if window is not None and window < layout.max_length:
            raise ValueError(
                f"attn_implementation {backbone_attention.NAME!r} cannot serve {config.model_type!r}: a sliding window of "
                f"{window} tokens, shorter than a sequence of {layout.max_length}. Expected another "
                "attn_implementation, e.g. 'sdpa' or 'eager'"
            )
        return {"attention_mask": None, backbone_attention.LAYOUT_ARGUMENT: layout}
    if layout.shares_prompts:
        return {"attention_mask": prepared_masks(layout, config, backbone.dtype)}
    # A mask of ones would let packed sequences leak into each other.
    lengths = layout.prompt_lengths + layout.response_lengths
    return {"attention_mask": None} | flash_arguments(config, lengths)


def window_in_force(config: PreTrainedConfig) -> int | None:
    """The sliding window of some or all layers of a text configuration; None if no layer has one."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds and _WINDOWED not in kinds:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def tree_mask(layout: SequenceLayout, window: int | None = None) -> Tensor:
    """bool ``[T, T]``: True where the query (row) sees the key (column).

    A prompt token sees its prompt up to itself; a response token its prompt and its own response up to itself.

    Args:
        layout: a packed or prompt-shared layout.
        window: a token sees this many tokens of its sequence, itself included; None: all before it.
    """
    position = layout.position_ids()
    seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=layout.device)
    groups = zip(layout.query_ranges.tolist(), layout.key_ranges.tolist(), strict=True)
    for (begin, end), (start0, stop0, start1, stop1) in groups:
        seen[begin:end, start0:stop0] = True
        seen[begin:end, start1:stop1] = True
    distance = position[:, None] - position[None, :]
    seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen


def prepared_masks(
    layout: SequenceLayout, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """`tree_mask` in the form a transformers decoder takes ready-made: ``[1, 1, T, T]``, or one per layer type.

    Decoders whose layers differ (Gemma 2 and 3, Qwen) take a dict; the others take one mask and apply their window,
    if they have one (Mistral, Phi-3), to all layers. Both leave a ready-made mask as it is.

    Args:
        layout: a prompt-shared layout.
        config: the backbone's text configuration; its sliding windows are applied exactly.
        dtype: of the backbone's states, for eager attention's additive mask.

    Raises:
        ValueError: the attention implementation cannot take such a mask.
    """
    implementation = config._attn_implementation
    if implementation not in _TREE_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: {implementation!r} cannot serve a prompt-shared layout; expected one of "
            f"{', '.join((*_TREE_IMPLEMENTATIONS, backbone_attention.NAME))}, or a packed layout"
        )

    def prepared(window: int | None) -> Tensor:
        seen = tree_mask(layout, window)[None, None]
        if implementation == "sdpa":
            return seen
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if _WINDOWED in kinds:
        return {_FULL: prepared(None), _WINDOWED: prepared(window)}
    return prepared(None if kinds else window)


def check_keeps_apart(backbone: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse a backbone in which sequences that lie in one row would leak into each other.

    Args:
        backbone: any transformers model.
        config: its text configuration.

    Raises:
        ValueError: its layers are recurrent, chunked or bidirectional, it takes no positions, or its attention
            is not one whose masks are known.
    """
    others = set(getattr(config, "layer_types", None) or ()) - {_FULL, _WINDOWED}
    bidirectional = getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    )
    implementation = config._attn_implementation or "eager"
    reasons = {
        f"it has layers of type {', '.join(sorted(others))}": bool(others),
        "its attention is bidirectional": bidirectional,
        "its attention does not take a ready-made mask": not backbone._supports_attention_backend,
        "it takes no position_ids": "position_ids" not in inspect.signature(backbone.forward).parameters,
        f"attn_implementation is {implementation!r}": (
            implementation not in _PACKED_IMPLEMENTATIONS and "flash" not in implementation
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"layout: {config.model_type!r} cannot serve sequences without padding: {'; '.join(found)}. "
            "Pass a padded batch with attention_mask and response_mask, and an attn_implementation that reads padding "
            f"(any but {backbone_attention.NAME!r})"
        )


def flash_arguments(config: PreTrainedConfig, lengths: Tensor) -> dict[str, Any]:
    """What flash attention is told of packed sequences, so that it need not work it out in every layer.

    Args:
        config: the backbone's text configuration; of other implementations nothing is returned.
        lengths: integer ``[B]``, tokens of each sequence, in storage order.

    Returns:
        ``cu_seq_lens_q/k`` int32 ``[B + 1]`` and ``max_length_q/k``, the longest of them.
    """
    if "flash" not in (config._attn_implementation or ""):
        return {}
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    bounds[1:] = lengths.cumsum(0)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
