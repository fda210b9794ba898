"""Loading a judge from whatever it was saved as: a judge, a LoRA adapter of one, or a bare backbone under a new head."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig

from adajudge.adapters import Adapter, is_adapter
from adajudge.configuration import HEAD_FIELDS, AdaJudgeConfig
from adajudge.modeling import AdaJudgeForSequenceClassification


def load_judge(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **head: Any,
) -> AdaJudgeForSequenceClassification:
    """Load whatever a judge can be made of: a saved judge, a LoRA adapter of one, or a bare backbone.

    An adapter is merged into the weights it was trained on, in the dtype they had then or a wider one that is asked
    for. They are looked for where they were, and refused if they have changed since.

    Args:
        path: folder or hub name.
        dtype: of the weights; default as saved, of an adapter as trained.
        attn_implementation: eager, sdpa, adajudge, flash_attention_2, ...
        head: fields of `AdaJudgeConfig` for the new head of a bare backbone. A judge has its head already: fields
            that differ from it are refused.

    Raises:
        ValueError: a head field differs from the saved judge's, the adapter's file lacks part of the head, or the weights
            under it are not those it was trained on.
        OSError: nothing loadable there, or not any more where an adapter was trained.
    """
    name = os.fspath(path)
    config = AdaJudgeConfig.from_pretrained(name) if is_adapter(name) else AutoConfig.from_pretrained(name)
    if isinstance(config, AdaJudgeConfig):
        _check_head(name, config, head)
        return load_trained_judge(name, dtype=dtype, attn_implementation=attn_implementation)
    options = _options(dtype, attn_implementation)
    return AdaJudgeForSequenceClassification.from_backbone(name, **options, **head)


def load_trained_judge(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
) -> AdaJudgeForSequenceClassification:
    """As `load_judge`, of what can score: a bare backbone, whose head would be a new one, is refused.

    Raises:
        ValueError: no judge is there, it is incomplete, or the weights under an adapter are not those it was trained on.
        OSError: nothing loadable there, or not any more where an adapter was trained.
    """
    name, options = os.fspath(path), _options(dtype, attn_implementation)
    if is_adapter(name):
        return _load_adapter(name, options)
    judge: AdaJudgeForSequenceClassification = AdaJudgeForSequenceClassification.from_pretrained(
        name, **options
    )
    return judge


def _options(dtype: torch.dtype | str | None, attn_implementation: str | None) -> dict[str, Any]:
    """Of from_pretrained."""
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    return options if attn_implementation is None else options | {"attn_implementation": attn_implementation}


def _check_head(name: str, config: AdaJudgeConfig, head: dict[str, Any]) -> None:
    for key, value in head.items():
        if getattr(config, key) != value:
            raise ValueError(f"{key}: {value!r} came, but the judge {name} has {getattr(config, key)!r}")


def _load_adapter(name: str, options: dict[str, Any]) -> AdaJudgeForSequenceClassification:
    adapter, asked = Adapter.read(name), options["dtype"]
    options = options | {"dtype": adapter.trained_dtype or asked}
    try:
        if not isinstance(AutoConfig.from_pretrained(adapter.base), AdaJudgeConfig):
            options |= {key: getattr(adapter.config, key) for key in HEAD_FIELDS}
        base = load_judge(adapter.base, **options)
    except OSError as error:
        raise OSError(
            f"{name}: the adapter was trained on {adapter.base}, which cannot be loaded: {error}"
        ) from error
    if isinstance(asked, str):
        asked = base.dtype if asked == "auto" else getattr(torch, asked)
    return adapter.merged_into(base, asked)
