"""LoRA adapters of judges: merged into the weights and under the configuration they were trained with, or refused.

On others an adapter gives wrong rewards without a sign of it, so everything that its folder tells is compared first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adajudge.configuration import HEAD_FIELDS, AdaJudgeConfig
from adajudge.weights import describe_backbone, mark_merged

if TYPE_CHECKING:
    from adajudge.modeling import AdaJudgeForSequenceClassification

_HEAD = "base_model.model.head."  # what the names of the head's weights begin with in an adapter
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


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, which needs the weights it was trained on."""
    return (Path(folder) / "adapter_config.json").is_file()


def head_of_adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's weights among an adapter's, under their names in the head."""
    return {name.removeprefix(_HEAD): tensor for name, tensor in weights.items() if name.startswith(_HEAD)}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies in its folder.

    Attributes:
        name: the folder.
        base: folder or hub name of what it was trained on: a judge, an adapter of one, or a bare backbone.
        config: of the judge that it makes of it.
        weights: LoRA matrices and head, under PEFT's names.
    """

    name: str
    base: str
    config: AdaJudgeConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, name: str) -> Adapter:
        """Read the three files of the folder.

        Raises:
            ValueError: one is broken, or does not say what the adapter was trained on.
            OSError: one is missing.
        """
        from peft import PeftConfig

        try:
            base = PeftConfig.from_pretrained(name).base_model_name_or_path
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{name}: adapter_config.json cannot be read: {error}") from error
        if not base:
            raise ValueError(f"{name}: the adapter does not say which weights it was trained on")
        path = Path(name) / "adapter_model.safetensors"
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: its weights cannot be read, the file is broken: {error}") from error
        return cls(name, base, AdaJudgeConfig.from_pretrained(name), weights)

    @property
    def trained_dtype(self) -> torch.dtype | None:
        """Dtype that the weights under it had in training; None: PEFT alone has saved it, nothing says."""
        told = self.config.adapter_base
        if told is None:
            return None
        dtype = getattr(torch, told["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"{self.name}: adapter_base in its config.json: dtype {told['dtype']!r} came, expected torch's"
            )
        return dtype

    def merged_into(
        self, judge: AdaJudgeForSequenceClassification, dtype: torch.dtype
    ) -> AdaJudgeForSequenceClassification:
        """The judge that the adapter makes of `judge`, which is used up.

        Args:
            judge: what `base` names, in the dtype of the training.
            dtype: of the result. Merging is done in it where that rounds less.

        Raises:
            ValueError: `judge` is not what the adapter was trained on, or the adapter lacks a part.
        """
        from peft import PeftModel, get_peft_model_state_dict

        before = describe_backbone(judge.backbone)
        self._check_weights(before)
        self._check_configuration(judge.config)
        self._check_head(judge)
        if torch.promote_types(dtype, judge.dtype) == dtype:
            judge = _in_dtype(judge, dtype)
        try:
            adapted = PeftModel.from_pretrained(judge, self.name)
        except RuntimeError as error:
            raise ValueError(
                f"{self.name}: its weights do not fit its adapter_config.json: {error}"
            ) from error
        self._check_matrices(get_peft_model_state_dict(adapted))
        merged = _in_dtype(adapted.merge_and_unload(), dtype)
        mark_merged(merged.backbone, before, self.weights)
        merged.config.turn_boundary = self.config.turn_boundary
        merged.name_or_path = self.name  # an adapter of this one needs both
        return merged

    def _check_weights(self, found: Mapping[str, str]) -> None:
        expected = self.config.adapter_base
        if expected not in (None, found):
            raise ValueError(
                f"{self.name}: the adapter was trained on other weights than {self.base} has now: {found} came, "
                f"expected {expected}, which its config.json has as adapter_base"
            )

    def _check_configuration(self, found: AdaJudgeConfig) -> None:
        """That the judge computes as the one that was trained, as far as its weights do not say."""
        pairs = {
            key: (getattr(found, key), getattr(self.config, key))
            for key in HEAD_FIELDS
            if key not in _SET_BY_TRAINING
        }
        now, then = (_computing(config.to_dict()["backbone_config"]) for config in (found, self.config))
        pairs |= {key: (now.get(key), then.get(key)) for key in sorted(now.keys() | then.keys())}
        for key, (came, expected) in pairs.items():
            if came != expected:
                raise ValueError(
                    f"{self.name}: the adapter was trained with {key} {expected!r}, but the config.json of "
                    f"{self.base} has {came!r} now"
                )

    def _check_head(self, judge: AdaJudgeForSequenceClassification) -> None:
        saved = head_of_adapter(self.weights)
        missing = [key for key in judge.head.state_dict() if key not in saved]
        if missing:
            raise ValueError(
                f"{self.name}: the adapter has no head weights {', '.join(missing[:5])}; expected all of the head"
            )

    def _check_matrices(self, loaded: Mapping[str, Tensor]) -> None:
        """PEFT takes a missing matrix for zeros, and leaves out one that it does not know."""
        came, expected = ({key for key in names if "lora_" in key} for names in (self.weights, loaded))
        if came != expected:
            raise ValueError(
                f"{self.name}: {len(came)} LoRA matrices came, expected the {len(expected)} that its "
                f"adapter_config.json says; missing or unknown: {', '.join(sorted(came ^ expected)[:5])}"
            )


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a backbone's configuration its states depend on."""
    return {
        key: _computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_OF_STATES and not key.startswith("_")
    }


def _in_dtype(
    judge: AdaJudgeForSequenceClassification, dtype: torch.dtype
) -> AdaJudgeForSequenceClassification:
    """The same judge, loaded in a dtype: what transformers keeps in fp32 stays so."""
    if judge.dtype == dtype:
        return judge
    loaded: AdaJudgeForSequenceClassification = type(judge).from_pretrained(
        None,
        config=judge.config,
        state_dict=judge.state_dict(),
        dtype=dtype,
        attn_implementation=judge.config._attn_implementation,
    )
    return loaded
