"""LoRA on a judge's backbone, with the whole head trained beside it; saving, loading and merging lose neither."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from adajudge.configuration import AdaJudgeConfig
from adajudge.modeling import AdaJudgeForSequenceClassification

ALL_LINEAR = "all-linear"

HEAD_FIELDS = (
    "num_blocks",
    "block_num_heads",
    "block_intermediate_size",
    "expert_hidden_size",
    "router_hidden_size",
    "causal_refinement",
    "attention_tokens",
    "turn_boundary",
    "pad_token_id",
)


def add_lora(
    model: AdaJudgeForSequenceClassification,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = (ALL_LINEAR,),
) -> Any:
    """Freeze the backbone under LoRA matrices; the head stays fully trained and is saved with the adapter.

    Args:
        model: a judge, as loaded from a folder or hub name; the adapter remembers which, and needs it again.
        r: rank of the matrices.
        alpha: their scale times r.
        dropout: on their input.
        target_modules: names of linear layers of the backbone (``q_proj``), or ``"all-linear"``.

    Returns:
        A `peft.PeftModel` around `model`.

    Raises:
        ValueError: a name that is no linear layer of the backbone.
    """
    import re

    from peft import LoraConfig, get_peft_model

    linear = {
        name.rpartition(".")[2]
        for name, module in model.backbone.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    wanted = sorted(linear) if list(target_modules) == [ALL_LINEAR] else list(target_modules)
    unknown = [name for name in wanted if name not in linear]
    if unknown or not wanted:
        raise ValueError(
            f"lora_target_modules: {', '.join(unknown) or 'none'} came; the linear layers of this backbone are "
            f"{', '.join(sorted(linear))}, or {ALL_LINEAR}"
        )
    names = "|".join(map(re.escape, wanted))
    base = model.name_or_path or model.backbone.name_or_path
    model.name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"backbone\.(.*\.)?({names})",  # the head has layers of the same names
        modules_to_save=["head"],
    )
    return get_peft_model(model, config)


def load_judge(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    **head: Any,
) -> AdaJudgeForSequenceClassification:
    """Load whatever a judge can be made of: a saved judge, a LoRA adapter of one, or a bare backbone.

    An adapter is merged into the weights it was trained on, which are looked for where they were then.

    Args:
        path: folder or hub name.
        dtype: of the weights; default as saved.
        attn_implementation: eager, sdpa, adajudge, flash_attention_2, ...
        head: fields of `AdaJudgeConfig` for the new head of a bare backbone. A judge has its head already: fields
            that differ from it are refused.

    Raises:
        ValueError: a head field differs from the saved judge's, or the adapter's file lacks part of the head.
        OSError: nothing loadable there, or not any more where an adapter was trained.
    """
    name = os.fspath(path)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if (Path(name) / "adapter_config.json").is_file():
        _check_head(name, AdaJudgeConfig.from_pretrained(name), head)
        return _load_adapter(name, options)
    config = AutoConfig.from_pretrained(name)
    if isinstance(config, AdaJudgeConfig):
        _check_head(name, config, head)
        judge: AdaJudgeForSequenceClassification = AdaJudgeForSequenceClassification.from_pretrained(
            name, **options
        )
        return judge
    return AdaJudgeForSequenceClassification.from_backbone(name, **options, **head)


def _check_head(name: str, config: AdaJudgeConfig, head: dict[str, Any]) -> None:
    for key, value in head.items():
        if getattr(config, key) != value:
            raise ValueError(f"{key}: {value!r} came, but the judge {name} has {getattr(config, key)!r}")


def _load_adapter(name: str, options: dict[str, Any]) -> AdaJudgeForSequenceClassification:
    """The judge that an adapter's folder describes, merged."""
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    config = AdaJudgeConfig.from_pretrained(name)
    fields = {key: getattr(config, key) for key in HEAD_FIELDS}
    if not base:
        raise ValueError(f"{name}: the adapter does not say which weights it was trained on")
    try:
        is_judge = isinstance(AutoConfig.from_pretrained(base), AdaJudgeConfig)
        model = load_judge(base, **options, **({} if is_judge else fields))
    except OSError as error:
        raise OSError(
            f"{name}: the adapter was trained on {base}, which cannot be loaded: {error}"
        ) from error
    with safe_open(Path(name) / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    missing = [key for key in model.head.state_dict() if f"base_model.model.head.{key}" not in saved]
    if missing:
        raise ValueError(
            f"{name}: the adapter has no head weights {', '.join(missing[:5])}; expected all of the head"
        )
    merged: AdaJudgeForSequenceClassification = PeftModel.from_pretrained(model, name).merge_and_unload()
    merged.config.turn_boundary = config.turn_boundary
    merged.name_or_path = name  # an adapter of this one needs both
    return merged
