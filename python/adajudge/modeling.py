"""The judge: a transformers backbone without its LM head, under an AdaJudge head."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from adajudge.attention_masks import prepared_masks
from adajudge.configuration import AdaJudgeConfig
from adajudge.data import TurnBoundary, response_mask_from_header
from adajudge_kernels import (
    AdaJudgeHead,
    DepthGate,
    ExpertCombination,
    MultiViewPooling,
    RefinementBlock,
    SequenceLayout,
)


@dataclass
class AdaJudgeOutput(ModelOutput):
    """What the judge says of each of the B sequences, all fp32.

    Attributes:
        logits: ``[B, 1]``, the reward; nothing is put on it.
        view_scores: ``[B, 3]``, s_v of the last, mean and attention view.
        view_weights: ``[B, 3]``, the router's pi.
        depth_weights: ``[B, K]``, alpha.
    """

    logits: Tensor | None = None
    view_scores: Tensor | None = None
    view_weights: Tensor | None = None
    depth_weights: Tensor | None = None


class AdaJudgeForSequenceClassification(PreTrainedModel):
    """A reward model that scores responses to prompts (AdaJudge, arXiv 2601.08097).

    Args:
        config: `AdaJudgeConfig`.
        backbone: the backbone, if it is there already; else it is built from the configuration.
    """

    config_class = AdaJudgeConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AdaJudgeConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:  # from_config writes into what it is given
            backbone = AutoModel.from_config(copy.deepcopy(config.backbone_config))
        self.backbone = backbone
        self.head = AdaJudgeHead(
            config.hidden_size,
            num_blocks=config.num_blocks,
            num_heads=config.block_num_heads,
            intermediate_size=config.block_intermediate_size,
            expert_hidden_size=config.expert_hidden_size,
            router_hidden_size=config.router_hidden_size,
            causal=config.causal_refinement,
            attention_tokens=config.attention_tokens,
        )
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The head starts as its own layers say; the backbone as its own class says."""
        if isinstance(module, (RefinementBlock, ExpertCombination)):
            module.reset_parameters()
        elif isinstance(module, (DepthGate, MultiViewPooling)):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        *,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        **head: Any,
    ) -> AdaJudgeForSequenceClassification:
        """A judge with a new head on a trained backbone, whose weights are loaded once, directly.

        Args:
            backbone: a folder (or hub name) with safetensors weights, or a loaded backbone without LM head.
            dtype: of the backbone's weights; default as saved. The head is fp32.
            attn_implementation: eager, sdpa, flash_attention_2, ...
            head: fields of `AdaJudgeConfig`, e.g. ``num_blocks=2``.
        """
        if not isinstance(backbone, PreTrainedModel):
            options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            backbone = AutoModel.from_pretrained(
                backbone, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, **options
            )
        assert isinstance(backbone, PreTrainedModel)
        config = AdaJudgeConfig(backbone_config=copy.deepcopy(backbone.config), **head)
        config._attn_implementation = backbone.config._attn_implementation
        return cls(config, backbone)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **options: Any) -> Any:
        """Load a saved judge; refuse a checkpoint that does not hold every weight, instead of guessing some.

        Takes what transformers' ``from_pretrained`` takes; safetensors only, no remote code.

        Raises:
            ValueError: weights are missing, of another shape or unknown; use `from_backbone` for a bare backbone.
        """
        kind = AdaJudgeConfig.get_config_dict(name)[0].get("model_type")
        if kind != AdaJudgeConfig.model_type:
            raise ValueError(
                f"{name}: a {kind!r} model is there, expected a saved judge ('adajudge'). "
                "For a backbone without a trained head use AdaJudgeForSequenceClassification.from_backbone"
            )
        options.setdefault("use_safetensors", True)
        want_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **options)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = sorted(map(str, info.get(problem) or ()))
            if keys:
                raise ValueError(
                    f"{name}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}"
                    f"{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}; expected a complete judge"
                )
        return (model, info) if want_info else model

    def get_input_embeddings(self) -> torch.nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        layout: SequenceLayout | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> AdaJudgeOutput | tuple[Any, ...]:
        """Rewards of a padded batch, or of a packed or prompt-shared one described by `layout`.

        Args:
            input_ids: ``[B, L]``; with `layout` ``[1, T]`` or ``[T]``.
            attention_mask: ``[B, L]``, padding on either side; default: no padding. Not with `layout`.
            response_mask: ``[B, L]``, nonzero for response tokens; default: from the last assistant header
                (`config.turn_boundary`). A given mask always wins. Not with `layout`.
            layout: `SequenceLayout.packed` or `.shared_prompts`; positions and attention follow from it.
            inputs_embeds: ``[B, L, d]`` in place of `input_ids` (then `response_mask` or `layout` is needed).
            position_ids: ``[B, L]``; default: counted from each sequence's first token.
            labels: refused; the training objective is `adajudge_kernels.focal_bradley_terry_loss`.
            use_cache: accepted for callers that pass it; no cache is ever kept.
            return_dict: False for a plain tuple.
            options: passed to the backbone.

        Raises:
            ValueError: the response cannot be told from the prompt, shapes do not fit, or a sequence is longer
                than the backbone's positions.
        """
        if labels is not None:
            raise ValueError(
                "labels came; a judge is trained on pairs, see adajudge_kernels.focal_bradley_terry_loss"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is expected")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if layout is None:
            mask, layout, position_ids = self._padded(
                input_ids, given, attention_mask, response_mask, position_ids
            )
        elif attention_mask is not None or response_mask is not None or position_ids is not None:
            raise ValueError("layout came with a mask or position_ids; they follow from the layout")
        elif layout.padded_shape is not None:
            raise ValueError("layout: a padded one came; pass attention_mask and response_mask instead")
        else:
            mask, position_ids = self._flat(given, layout)
            wide = 3 if inputs_embeds is not None else 2
            input_ids = input_ids.reshape(1, -1) if input_ids is not None else None
            inputs_embeds = (
                inputs_embeds.reshape(1, -1, given.shape[-1])
                if wide == 3 and inputs_embeds is not None
                else None
            )
        self._check_length(layout.max_length)
        states = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=False,  # with a cache, packed sequences would see each other
            **options,
        ).last_hidden_state
        out = self.head(states.flatten(0, 1), layout)
        result = AdaJudgeOutput(out.reward.unsqueeze(1), out.view_scores, out.view_weights, out.depth_weights)
        return result.to_tuple() if return_dict is False else result

    def _padded(
        self,
        input_ids: Tensor | None,
        given: Tensor,
        attention_mask: Tensor | None,
        response_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, SequenceLayout, Tensor]:
        """Mask, layout and positions of a padded batch; positions count from each sequence's first token."""
        if attention_mask is None:
            attention_mask = given.new_ones(given.shape[:2], dtype=torch.long)
        if response_mask is None:
            if self.config.turn_boundary is None or input_ids is None:
                raise ValueError(
                    "response_mask: none came, and it cannot be derived without input_ids and config.turn_boundary; "
                    "pass a [B, L] mask of the response tokens"
                )
            boundary = TurnBoundary.from_dict(self.config.turn_boundary)
            response_mask = response_mask_from_header(input_ids, attention_mask, boundary)
        layout = SequenceLayout.padded(attention_mask, response_mask)
        if layout.padded_shape != tuple(given.shape[:2]):
            raise ValueError(
                f"attention_mask: shape {layout.padded_shape} came, expected {tuple(given.shape[:2])}"
            )
        if position_ids is None:
            position_ids = layout.position_ids().unflatten(0, layout.padded_shape)
        return attention_mask, layout, position_ids

    def _flat(self, given: Tensor, layout: SequenceLayout) -> tuple[Any, Tensor]:
        """Mask and positions of a packed or prompt-shared batch."""
        tokens = given.shape[:-1] if given.is_floating_point() else given.shape
        if tokens.numel() != layout.num_tokens or (len(tokens) == 2 and tokens[0] != 1):
            raise ValueError(
                f"{tuple(tokens)} tokens came, expected [1, {layout.num_tokens}] for this layout"
            )
        # Packed: positions that start again at 0 and no mask at all make every attention implementation keep the
        # sequences apart. A tree of shared prompts cannot be told by positions and needs its mask.
        mask = (
            prepared_masks(layout, self.backbone.config, self.backbone.dtype)
            if layout.shares_prompts
            else None
        )
        return mask, layout.position_ids().unsqueeze(0)

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"a sequence of {longest} tokens came, but the backbone's positions end at {limit}"
            )


AutoModelForSequenceClassification.register(AdaJudgeConfig, AdaJudgeForSequenceClassification)
