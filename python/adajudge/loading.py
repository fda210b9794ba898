"""Loading a judge from whatever it was saved as: a judge, a LoRA adapter of one, or a bare backbone under a new head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig

from adajudge.configuration import AdaJudgeConfig
from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.weights import describe_backbone, head_of_adapter, is_adapter, mark_merged

# Of a judge's configuration: what its head is, and what it was trained to read.
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

_SET_BY_TRAINING = ("turn_boundary", "pad_token_id")
# Of a backbone's configuration: where it is from, in which dtype it lies, what only generation or a new model asks.
_NOT_OF_STATES = (
    "transformers_version",
    "architectures",
    "dtype",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


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
    """The judge that an adapter's folder describes, merged."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    config = AdaJudgeConfig.from_pretrained(name)
    fields = {key: getattr(config, key) for key in HEAD_FIELDS}
    asked = options["dtype"]
    trained = asked if config.adapter_base is None else getattr(torch, config.adapter_base["dtype"])
    if not base:
        raise ValueError(f"{name}: the adapter does not say which weights it was trained on")
    try:
        is_judge = isinstance(AutoConfig.from_pretrained(base), AdaJudgeConfig)
        model = load_judge(base, **options | {"dtype": trained}, **({} if is_judge else fields))
    except OSError as error:
        raise OSError(
            f"{name}: the adapter was trained on {base}, which cannot be loaded: {error}"
        ) from error
    found = describe_backbone(model.backbone)
    if config.adapter_base not in (None, found):
        raise ValueError(
            f"{name}: the adapter was trained on other weights than {base} has now: {found} came, expected "
            f"{config.adapter_base}, which its config.json has as adapter_base"
        )
    _check_configuration(name, base, config, model.config)
    saved = _weights_of(name)
    head = head_of_adapter(saved)
    missing = [key for key in model.head.state_dict() if key not in head]
    if missing:
        raise ValueError(
            f"{name}: the adapter has no head weights {', '.join(missing[:5])}; expected all of the head"
        )
    dtype = model.dtype if asked == "auto" else getattr(torch, asked) if isinstance(asked, str) else asked
    if torch.promote_types(dtype, model.dtype) == dtype:  # rounds less of what the adapter does
        model = _in_dtype(model, dtype)
    try:
        adapted = PeftModel.from_pretrained(model, name)
    except RuntimeError as error:
        raise ValueError(f"{name}: its weights do not fit its adapter_config.json: {error}") from error
    matrices, expected = (
        {key for key in names if "lora_" in key} for names in (saved, get_peft_model_state_dict(adapted))
    )
    if matrices != expected:
        differing = sorted(matrices ^ expected)[:5]
        raise ValueError(
            f"{name}: {len(matrices)} LoRA matrices came, expected the {len(expected)} that its adapter_config.json "
            f"says; missing or unknown: {', '.join(differing)}"
        )
    merged = _in_dtype(adapted.merge_and_unload(), dtype)
    mark_merged(merged.backbone, found, saved)
    merged.config.turn_boundary = config.turn_boundary
    merged.name_or_path = name  # an adapter of this one needs both
    return merged


def _check_configuration(name: str, base: str, trained: AdaJudgeConfig, found: AdaJudgeConfig) -> None:
    """That the judge under an adapter computes as the one it was trained on, as far as its weights do not say."""
    pairs = {
        key: (getattr(found, key), getattr(trained, key))
        for key in HEAD_FIELDS
        if key not in _SET_BY_TRAINING
    }
    there, then = (_computing(x.to_dict()["backbone_config"]) for x in (found, trained))
    pairs |= {key: (there.get(key), then.get(key)) for key in sorted(there.keys() | then.keys())}
    for key, (came, expected) in pairs.items():
        if came != expected:
            raise ValueError(
                f"{name}: the adapter was trained with {key} {expected!r}, but the config.json of {base} has {came!r} now"
            )


def _computing(config: dict[str, Any]) -> dict[str, Any]:
    """What of a backbone's configuration its states depend on."""
    return {
        key: _computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_OF_STATES and not key.startswith("_")
    }


def _weights_of(name: str) -> dict[str, torch.Tensor]:
    path = Path(name) / "adapter_model.safetensors"
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights cannot be read, the file is broken: {error}") from error


def _in_dtype(
    model: AdaJudgeForSequenceClassification, dtype: torch.dtype
) -> AdaJudgeForSequenceClassification:
    """The same judge, loaded in a dtype: what transformers keeps in fp32 stays so."""
    if model.dtype == dtype:
        return model
    loaded: AdaJudgeForSequenceClassification = AdaJudgeForSequenceClassification.from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=dtype,
        attn_implementation=model.config._attn_implementation,
    )
    return loaded
