"""LoRA on a judge's backbone, with the whole head trained beside it. `adajudge.adapters` puts both together again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.weights import describe_backbone

ALL_LINEAR = "all-linear"


def add_lora(
    model: AdaJudgeForSequenceClassification,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = (ALL_LINEAR,),
) -> Any:
    """Freeze the backbone under LoRA matrices; the head stays fully trained and is saved with the adapter.

    A digest of the backbone's weights goes into the judge's configuration: the adapter is loaded on no others.

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
    model.config.adapter_base = describe_backbone(model.backbone)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"backbone\.(.*\.)?({names})",  # the head has layers of the same names
        modules_to_save=["head"],
    )
    return get_peft_model(model, config)
