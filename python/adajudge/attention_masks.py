"""The attention mask of a prompt-shared batch: a tree of prompts and responses in one sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from adajudge_kernels import SequenceLayout

_SERVED = ("eager", "sdpa")
_WINDOWED = "sliding_attention"


def tree_mask(layout: SequenceLayout, window: int | None = None) -> Tensor:
    """bool ``[T, T]``: True where the query (row) sees the key (column).

    A prompt token sees its prompt up to itself; a response token its prompt and its own response up to itself.

    Args:
        layout: a packed or prompt-shared layout.
        window: a token sees at most this many tokens back, itself included.
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

    Args:
        layout: a prompt-shared layout.
        config: the backbone's configuration; its sliding windows are applied exactly.
        dtype: of the backbone's states, for eager attention's additive mask.

    Raises:
        ValueError: an attention implementation or a kind of layer that cannot take such a mask.
    """
    implementation = config._attn_implementation
    if implementation not in _SERVED:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot serve a prompt-shared batch; "
            f"expected one of {', '.join(_SERVED)}, or a packed layout"
        )

    def prepared(window: int | None) -> Tensor:
        seen = tree_mask(layout, window)[None, None]
        if implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(dtype).min
        )

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if unknown := kinds - {"full_attention", _WINDOWED}:
        raise ValueError(f"layers of type {sorted(unknown)} cannot serve a prompt-shared batch; pack it")
    if _WINDOWED in kinds:
        return {"full_attention": prepared(None), _WINDOWED: prepared(window)}
    return prepared(None if kinds else window)
