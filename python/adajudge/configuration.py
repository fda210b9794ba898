"""Configuration of a judge: a backbone's configuration and the shape of the head."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class AdaJudgeConfig(PreTrainedConfig):
    """What `AdaJudgeForSequenceClassification` is made of.

    Args:
        backbone_config: configuration of any transformers decoder (a dict or a configuration object).
        num_blocks: K refinement blocks, 1 to 8.
        block_num_heads: attention heads of a block; default heads of 128 (or 64, 32) features.
        block_intermediate_size: SwiGLU width of a block; default the backbone's width.
        expert_hidden_size: hidden width of the view MLPs.
        router_hidden_size: hidden width of the router.
        causal_refinement: causal attention in the blocks; False excludes prompt-shared batches.
        attention_tokens: what the attention view sees, ``"all"`` tokens or the ``"response"``.
        turn_boundary: `adajudge.data.TurnBoundary` as a dict: where the last assistant turn begins and ends,
            for callers that pass no response mask. None: such calls are refused.
        problem_type: always ``"regression"``: the logit is the reward, nothing is put on it.
    """

    model_type = "adajudge"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    num_blocks: int = 3
    block_num_heads: int | None = None
    block_intermediate_size: int | None = None
    expert_hidden_size: int = 256
    router_hidden_size: int = 256
    causal_refinement: bool = True
    attention_tokens: str = "all"
    turn_boundary: dict[str, Any] | None = None
    problem_type: str | None = "regression"

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a backbone configuration given as a dict into its class; one logit unless said otherwise."""
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            if "model_type" not in fields:
                raise ValueError(
                    "backbone_config: no model_type in it; expected that of a transformers model"
                )
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)
        if self.num_labels != 1:
            raise ValueError(f"num_labels: {self.num_labels} came, expected 1: a judge gives one reward")

    @property
    def hidden_size(self) -> int:
        """Width d of the backbone's token states."""
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError("backbone_config: None came, expected the configuration of a transformers model")
        return int(self.backbone_config.hidden_size)


AutoConfig.register("adajudge", AdaJudgeConfig)
