"""Attention for any transformers backbone that reads packed and prompt-shared rows as they lie: no mask, no padding.

Importing this module registers it with transformers, so that ``attn_implementation="adajudge"`` chooses it. A decoder
passes what its forward does not know by name down to its attention; the layout of the row travels this way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from adajudge_kernels import SequenceLayout
from adajudge_kernels.refinement.ops import MAX_HEAD_SIZE, sequence_attention

NAME = "adajudge"
LAYOUT_ARGUMENT = "adajudge_layout"

# What a layer may ask for beyond plain attention, and whoever left it out would score wrongly.
_UNSERVED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def layout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    adajudge_layout: SequenceLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one row of sequences, each seeing its prompt and itself (`sequence_attention`).

    Args:
        module: the attention layer, for its name and whether it is causal.
        query: ``[1, H, T, e]``, positions already turned into it; e at most 256.
        key: ``[1, J, T, e]``, H a multiple of J.
        value: as key.
        attention_mask: None; the layout says what it could say.
        scaling: of the scores; default ``1 / sqrt(e)``.
        dropout: 0.
        sliding_window: of the layer; served, because without effect, if no sequence is longer.
        is_causal: of the call; default the layer's own.
        adajudge_layout: of the row.
        options: whatever else transformers hands to attention functions.

    Returns:
        ``[1, T, H, e]`` in the dtype of value, and no weights.

    Raises:
        ValueError: no layout came, or the layer wants what this attention has not.
    """
    if adajudge_layout is None:
        raise ValueError(
            f"attn_implementation {NAME!r}: no layout came. Call the judge (AdaJudgeForSequenceClassification), or the "
            f"backbone with {LAYOUT_ARGUMENT}=layout, position_ids=layout.position_ids()[None] and use_cache=False; or "
            "load it with another attn_implementation, e.g. 'sdpa'"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    longest = adajudge_layout.max_length
    wanted = {  # constant texts: they are formatted only where one is needed
        "bidirectional attention": not is_causal,
        "an attention mask": attention_mask is not None,
        "a batch of several rows": query.shape[0] != 1,
        "dropout {dropout}": dropout != 0,
        "a sliding window of {window} tokens, shorter than a sequence of {longest}": (
            sliding_window is not None and sliding_window < longest
        ),
        "heads of {size} features, more than {limit}": query.shape[-1] > MAX_HEAD_SIZE,
        "values of another head size than its queries": value.shape[-1] != query.shape[-1],
    } | {what: options.get(name) is not None for name, what in _UNSERVED.items()}
    if any(wanted.values()):
        figures = {"dropout": dropout, "window": sliding_window, "longest": longest}
        _refuse(module, wanted, figures | {"size": query.shape[-1], "limit": MAX_HEAD_SIZE})
    # Autocast leaves query and key in fp32, out of the rotation, and value in its own dtype.
    rows = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    return sequence_attention(rows, adajudge_layout, scale=scaling).unsqueeze(0), None


def _refuse(module: nn.Module, wanted: dict[str, bool], figures: dict[str, Any]) -> None:
    unserved = [what.format(**figures) for what, is_wanted in wanted.items() if is_wanted]
    raise ValueError(
        f"attn_implementation {NAME!r} cannot serve what {type(module).__name__} wants: {'; '.join(unserved)}. "
        "Expected another attn_implementation, e.g. 'sdpa' or 'eager'"
    )


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Builds nothing; a mask that a caller gave is handed on, for `layout_attention` to refuse."""
    return attention_mask


AttentionInterface.register(NAME, layout_attention)
AttentionMaskInterface.register(NAME, no_mask)
