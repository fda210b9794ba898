"""Configuration of a judge: a backbone's configuration and the shape of the head.

Importing this module registers ``"adajudge"`` with `transformers.AutoConfig`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from adajudge.data import TurnBoundary

# What a head is, and what it was trained to read.
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
        turn_boundary: `adajudge.data.TurnBoundary`, or the same as a dict: the token ids between which the last
            assistant turn lies, for callers that pass no response mask. None: such calls are refused.
        unknown_word_limit: share of words unknown to the tokenizer above which `adajudge.Scorer` refuses a row; for
            judges of a small vocabulary. None: every row is scored.
        pad_token_id: padding is known by its mask alone; this says which token rows without a mask must not begin
            or end with. `adajudge train` takes it from the tokenizer.
        adapter_base: of a LoRA adapter: dtype and digest of the backbone's weights it was trained on, which are
            compared with those it is loaded on (`adajudge.weights`).
        problem_type: always ``"regression"``: the logit is the reward, nothing is put on it.

    Raises:
        ValueError: a backbone that is no causal decoder, a boundary that could never be found, more than one
            label, or another problem type.
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
    turn_boundary: dict[str, Any] | TurnBoundary | None = None
    unknown_word_limit: float | None = None
    pad_token_id: int | None = None
    adapter_base: dict[str, str] | None = None
    problem_type: str | None = "regression"

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn a backbone configuration given as a dict into its class; one logit unless said otherwise."""
        if isinstance(self.backbone_config, dict):
            values = dict(self.backbone_config)
            if "model_type" not in values:
                raise ValueError(
                    "backbone_config: no model_type in it; expected that of a transformers model"
                )
            self.backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        if isinstance(self.backbone_config, AdaJudgeConfig):
            raise ValueError("backbone_config: that of a judge came, expected that of a bare backbone")
        if isinstance(self.backbone_config, PreTrainedConfig) and self.backbone_config.is_encoder_decoder:
            raise ValueError(
                f"backbone_config: {self.backbone_config.model_type!r} is an encoder and a decoder, expected a decoder"
            )
        if isinstance(self.turn_boundary, dict):
            try:
                self.turn_boundary = TurnBoundary.from_dict(self.turn_boundary)
            except TypeError as error:
                raise ValueError(f"turn_boundary: {error}") from error
        if isinstance(self.turn_boundary, TurnBoundary):
            self.turn_boundary = self.turn_boundary.to_dict()
        kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)
        if self.num_labels != 1:
            raise ValueError(f"num_labels: {self.num_labels} came, expected 1: a judge gives one reward")
        if self.problem_type != "regression":
            raise ValueError(f"problem_type: {self.problem_type!r} came, expected 'regression'")
        base = self.adapter_base
        if base is not None and (not isinstance(base, dict) or base.keys() != {"dtype", "digest"}):
            raise ValueError(
                f"adapter_base: {base!r} came, expected dtype and digest, as training writes them"
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The part of `backbone_config` that describes the decoder of text (vocabulary, width, positions)."""
        if not isinstance(self.backbone_config, PreTrainedConfig):
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def hidden_size(self) -> int:
        """Width d of the backbone's token states.

        Raises:
            ValueError: there is no backbone configuration.
        """
        if self.backbone_config is None:
            raise ValueError("backbone_config: None came, expected the configuration of a transformers model")
        return int(self.get_text_config(decoder=True).hidden_size)

    def longest_sequence(self, asked: int | None = None) -> int | None:
        """Tokens of the longest sequence: as many as asked for, else the backbone's own limit; None: it has none.

        Raises:
            ValueError: more came than the backbone has positions for.
        """
        limit: int | None = getattr(self.get_text_config(decoder=True), "max_position_embeddings", None)
        if asked is not None and limit is not None and asked > limit:
            raise ValueError(f"max_length: {asked} came, but the backbone ends at {limit} tokens")
        return limit if asked is None else asked


AutoConfig.register("adajudge", AdaJudgeConfig)
