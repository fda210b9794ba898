"""The judge: a transformers backbone without its LM head, under an AdaJudge head.

Importing this module registers the judge with `transformers.AutoModelForSequenceClassification`, and the attention
implementation ``"adajudge"`` with every backbone.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import TransformersKwargs, cached_file

from adajudge.adapters import head_of_adapter, is_adapter
from adajudge.attention_masks import reads_no_padding
from adajudge.backbone_states import (
    long_rope_border,
    token_states,
    with_shared_prompts,
    without_padding,
)
from adajudge.configuration import AdaJudgeConfig
from adajudge.data import TurnBoundary, response_mask_from_header
from adajudge_kernels import (
    AdaJudgeHead,
    DepthGate,
    ExpertCombination,
    JudgeOutput,
    MultiViewPooling,
    RefinementBlock,
    SequenceLayout,
)
from adajudge_kernels.layers import Projection

# What says where a checkpoint is, of all that from_pretrained takes.
_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


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

    The backbone is kept in the dtype asked for; the head's parameters are loaded in fp32 whatever that is, and its
    outputs are fp32. LoRA: adapt the backbone and train the head whole, so that saving and merging keep it::

        LoraConfig(target_modules=r"backbone\\..*\\.(q_proj|v_proj)", modules_to_save=["head"])

    and load the adapter with `adajudge.training.load_judge`, or, to train it further, with
    ``PeftModel.from_pretrained(judge, adapter)`` on a judge whose head has the adapter's own configuration.

    Args:
        config: `AdaJudgeConfig`. Its `backbone_config` becomes the backbone's own.
        backbone: the backbone, if it is there already; else a random one is built from the configuration.

    Raises:
        ValueError: the configuration has no backbone, or its head cannot be built.
    """

    config_class = AdaJudgeConfig
    config: AdaJudgeConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer would infer the contrary from forward's **options
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"head"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: AdaJudgeConfig, backbone: PreTrainedModel | None = None) -> None:
        width = config.hidden_size
        super().__init__(config)
        given = backbone is not None
        if backbone is None:  # from_config writes into what it is given
            backbone = AutoModel.from_config(copy.deepcopy(config.backbone_config))
        assert backbone is not None
        self.backbone = backbone
        config.backbone_config = backbone.config
        self.head = AdaJudgeHead(
            width,
            num_blocks=config.num_blocks,
            num_heads=config.block_num_heads,
            intermediate_size=config.block_intermediate_size,
            expert_hidden_size=config.expert_hidden_size,
            router_hidden_size=config.router_hidden_size,
            causal=config.causal_refinement,
            attention_tokens=config.attention_tokens,
        )
        if given:  # both are as they shall be: post_init must draw nothing anew
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The head starts as its own layers say; the backbone as its own class says."""
        if isinstance(module, (DepthGate, RefinementBlock, Projection, MultiViewPooling, ExpertCombination)):
            module.reset_parameters()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        *,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> AdaJudgeForSequenceClassification:
        """A judge with a new fp32 head on a trained backbone, whose weights are loaded once, directly.

        Args:
            backbone: a folder (or hub name) with safetensors weights, with or without an LM head; or a loaded
                backbone without LM head, which is taken as it is and not copied.
            dtype: of the backbone's weights; default as saved.
            options: fields of `AdaJudgeConfig`, e.g. ``num_blocks=2``; the others go to
                ``AutoModel.from_pretrained``, e.g. ``attn_implementation="adajudge"`` (`adajudge.backbone_attention`: prompts
                that candidates share are computed once, padding never) or ``device_map``.

        Raises:
            ValueError: the weights are incomplete, what is there is already a judge, or an option makes no sense.
        """
        own = AdaJudgeConfig.__annotations__.keys() - {"backbone_config"}
        head = {name: options.pop(name) for name in sorted(own & options.keys())}
        if isinstance(backbone, PreTrainedModel):
            if options or dtype is not None:
                names = ", ".join(sorted(options | ({} if dtype is None else {"dtype": dtype})))
                raise ValueError(
                    f"{names}: for loading a backbone, but a loaded one came; expected fields of AdaJudgeConfig"
                )
        else:
            _check_options(options)
            kind = _model_type(backbone, options)
            if kind == AdaJudgeConfig.model_type:
                raise ValueError(
                    f"{backbone}: a judge is there, expected a bare backbone; use from_pretrained"
                )
            options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # for a report of our own
            with _reading(backbone):
                backbone, info = AutoModel.from_pretrained(
                    backbone, dtype=dtype or "auto", output_loading_info=True, **options
                )
            # Weights of an LM head are not expected, and may be there.
            _check_complete(str(backbone.config._name_or_path), info, ("missing_keys", "mismatched_keys"))
        if backbone.get_output_embeddings() is not None:
            raise ValueError(
                f"backbone: a {type(backbone).__name__} with an LM head came, expected the model below it"
            )
        # A copy: a new configuration resets the attention implementation of its parts.
        config = AdaJudgeConfig(backbone_config=copy.deepcopy(backbone.config), **head)
        config._attn_implementation = backbone.config._attn_implementation
        judge = cls(config, backbone)
        judge.head.to(backbone.device)
        return judge

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **options: Any) -> Any:
        """Load a saved judge; refuse a checkpoint that does not hold every weight, instead of guessing some.

        Takes what transformers' ``from_pretrained`` takes; safetensors only, no remote code.

        Raises:
            ValueError: weights are missing, of another shape or unknown, or no judge is there; use
                `from_backbone` for a bare backbone, `adajudge.training.load_judge` for an adapter.
        """
        _check_options(options)
        if name is not None and not isinstance(options.get("config"), AdaJudgeConfig):
            if is_adapter(name):
                raise ValueError(
                    f"{name}: an adapter is there; adajudge.training.load_judge loads it with the judge it was trained on"
                )
            kind = _model_type(name, options)
            if kind != AdaJudgeConfig.model_type:
                raise ValueError(
                    f"{name}: a {kind!r} model is there, expected a saved judge ('adajudge'). For a backbone "
                    "without a trained head use AdaJudgeForSequenceClassification.from_backbone"
                )
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # for a report of our own
        want_info = options.pop("output_loading_info", False)
        # The Auto classes name an adapter this way. It is loaded afterwards: transformers would report its keys only.
        adapter_options = dict(options.pop("adapter_kwargs", None) or {})
        adapter = adapter_options.pop("_adapter_model_path", None)
        with _reading(name):
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **options)
        _check_complete(str(name), info, ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"))
        if adapter is not None:
            model.load_adapter(adapter, adapter_kwargs=adapter_options)
            _load_adapter_head(model, adapter, options)
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
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        layout: SequenceLayout | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> AdaJudgeOutput | tuple[Any, ...]:
        """Rewards of a padded batch, or of a packed or prompt-shared one described by `layout`.

        A sequence's reward does not depend on how it comes, nor on its neighbours. What lies in padding, token
        ids and embeddings alike, is never read. With ``attn_implementation="adajudge"`` nothing is computed for it
        either, and rows of equal prompt tokens, such as both sides of a pair, have their prompt computed once.

        Args:
            input_ids: ``[B, L]``; with `layout` ``[1, T]`` or ``[T]``.
            attention_mask: ``[B, L]``, padding on either side; default: no padding. Rows that begin or end with
                the pad token are then refused, where the configuration knows it. Not with `layout`.
            response_mask: ``[B, L]``, nonzero for response tokens; default: from the last assistant header
                (`config.turn_boundary`), and what the chat template put behind the turn's terminator is not
                read. A given mask always wins. Not with `layout`.
            position_ids: ``[B, L]``; default: counted from each sequence's first token. Not with `layout`.
            inputs_embeds: in place of `input_ids`, with one dimension d more; then a response mask or a layout
                is needed.
            layout: `SequenceLayout.packed` or `.shared_prompts`; positions and attention follow from it.
            labels: refused; the training objective is `adajudge_kernels.focal_bradley_terry_loss`.
            use_cache: accepted for callers that pass it; no cache is ever kept.
            return_dict: False for a plain tuple; default `config.return_dict`.
            options: passed to the backbone: parameters of its forward, or those that transformers' attention
                takes.

        Raises:
            TypeError: an option that nobody takes.
            ValueError: the response cannot be told from the prompt, there is padding but no mask of it, shapes do
                not fit, a sequence is longer than the backbone's positions, or the backbone cannot serve the layout.
        """
        if labels is not None:
            raise ValueError(
                "labels came; a judge is trained on pairs, see adajudge_kernels.focal_bradley_terry_loss"
            )
        unknown = sorted(options.keys() - self._backbone_options()) if options else None
        if unknown:
            raise TypeError(f"forward() got unexpected keyword arguments: {', '.join(unknown)}")
        if options.get("past_key_values") is not None:
            raise ValueError("past_key_values came; a judge reads whole sequences and keeps no cache")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is expected")
        order: Tensor | None = None
        if layout is None:
            batch, layout = self._padded(
                input_ids, inputs_embeds, attention_mask, response_mask, position_ids
            )
            if reads_no_padding(self.config):
                if options.get("token_type_ids") is not None:
                    raise ValueError(
                        "token_type_ids came, and attn_implementation 'adajudge' reads token ids and positions only; "
                        "expected another attn_implementation, e.g. 'sdpa'"
                    )
                # Positions of a caller's own may differ between rows, and a prompt with them.
                alike = position_ids is None and self.config.causal_refinement
                alike = alike and long_rope_border(self.backbone) is None
                batch, layout, order = (with_shared_prompts if alike else without_padding)(batch, layout)
        elif attention_mask is not None or response_mask is not None or position_ids is not None:
            raise ValueError("layout came with a mask or position_ids; they follow from the layout")
        else:
            batch, layout = self._flat(input_ids, inputs_embeds, layout)
        limit = self.config.longest_sequence()
        reach = layout.max_length
        if position_ids is not None and layout.num_tokens:
            reach = max(reach, int(batch["position_ids"].max()) + 1)
        if limit is not None and reach > limit:
            raise ValueError(
                f"a sequence of {reach} tokens came, but the backbone's positions end at {limit}"
            )
        states = token_states(self.backbone, batch, layout, options)
        if layout.device != states.device:  # a backbone over several devices
            layout = layout.to(states.device)
        out = self.head(states, layout)
        if order is not None:
            out = JudgeOutput(*(x.index_select(0, order) for x in out))
        result = AdaJudgeOutput(out.reward.unsqueeze(1), out.view_scores, out.view_weights, out.depth_weights)
        plain = not (self.config.return_dict if return_dict is None else return_dict)
        return result.to_tuple() if plain else result

    def _padded(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        response_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[dict[str, Any], SequenceLayout]:
        """The backbone's arguments and the layout of a padded batch."""
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        shape, device = given.shape[:2], given.device
        if attention_mask is None:
            if input_ids is not None:
                self._check_unpadded(input_ids)
            attention_mask = torch.ones(shape, dtype=torch.long, device=device)
        if response_mask is None:
            if self.config.turn_boundary is None or input_ids is None:
                raise ValueError(
                    "response_mask: none came, and it cannot be derived without input_ids and config.turn_boundary; "
                    "pass a [B, L] mask of the response tokens"
                )
            assert isinstance(self.config.turn_boundary, Mapping)
            boundary = TurnBoundary.from_dict(self.config.turn_boundary)
            response_mask = response_mask_from_header(input_ids, attention_mask, boundary)
            behind = response_mask.flip(1).cumsum(1).flip(1) == 0
            attention_mask = attention_mask.masked_fill(behind, 0)
        layout = SequenceLayout.padded(attention_mask, response_mask).to(device)
        if layout.padded_shape != tuple(shape):
            raise ValueError(
                f"attention_mask: shape {layout.padded_shape} came, expected {tuple(shape)} of the tokens"
            )
        if position_ids is None:
            position_ids = layout.position_ids().view(shape)
        elif position_ids.shape != shape:
            raise ValueError(
                f"position_ids: shape {tuple(position_ids.shape)} came, expected {tuple(shape)} of the tokens"
            )
        # Whatever lies in padding, the backbone sees something finite there: NaN times a zero weight is NaN.
        real = attention_mask.to(device) != 0
        if input_ids is not None:
            first = input_ids.flatten()[layout.ranges[:, 0].long()]
            input_ids = torch.where(real, input_ids, first[:, None])
        else:
            assert inputs_embeds is not None
            inputs_embeds = torch.where(real[:, :, None], inputs_embeds, 0)
        batch = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": torch.where(real, position_ids, 0),
        }
        return batch, layout

    def _backbone_options(self) -> set[str]:
        """What the backbone's forward knows by name; anything else it would swallow."""
        named = inspect.signature(self.backbone.forward).parameters
        return {*named, *TransformersKwargs.__annotations__, "past_key_values", "token_type_ids"}

    def _check_unpadded(self, input_ids: Tensor) -> None:
        """Without a mask every token counts. A pad token at the edge of a row says that this is not meant."""
        text = self.config.get_text_config(decoder=True)
        pad = text.pad_token_id if self.config.pad_token_id is None else self.config.pad_token_id
        if pad is None:
            return
        boundary = self.config.turn_boundary if isinstance(self.config.turn_boundary, Mapping) else {}
        # One pad token may be a sequence's own beginning (bos) or end (eos, end of turn); two of them are not.
        before = 2 if pad == text.bos_token_id else 1
        behind = 2 if pad in (text.eos_token_id, *boundary.get("turn_end_ids", ())) else 1
        is_pad = input_ids == pad
        padded = is_pad[:, :before].all(dim=1) | is_pad[:, -behind:].all(dim=1)
        if bool(padded.any()):
            raise ValueError(
                f"attention_mask: none came, but row {int(padded.nonzero()[0])} begins or ends with the pad token "
                f"{pad}; pass the mask, or every token counts"
            )

    def _flat(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, layout: SequenceLayout
    ) -> tuple[dict[str, Any], SequenceLayout]:
        """The backbone's arguments and the layout of a packed or prompt-shared batch."""
        if layout.padded_shape is not None:
            raise ValueError("layout: a padded one came; pass attention_mask and response_mask instead")
        name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        assert given is not None
        tokens = given.shape if inputs_embeds is None else given.shape[:-1]
        if tuple(tokens) not in ((layout.num_tokens,), (1, layout.num_tokens)):
            raise ValueError(
                f"{name}: tokens of shape {tuple(tokens)} came, expected [1, {layout.num_tokens}] or "
                f"[{layout.num_tokens}] for this layout"
            )
        layout = layout if layout.device == given.device else layout.to(given.device)
        batch = {
            name: given if len(tokens) == 2 else given.unsqueeze(0),
            "position_ids": layout.position_ids().unsqueeze(0),
        }
        return batch, layout


@contextmanager
def _reading(name: Any) -> Iterator[None]:
    """A broken weight file is a ValueError that names its folder."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name}: its weights cannot be read, the file is broken: {error}") from error


def _load_adapter_head(model: Any, adapter: Any, options: Mapping[str, Any]) -> None:
    """Fill the head that was trained beside an adapter; transformers 5.17 leaves it as it was initialised."""
    if not hasattr(model.head, "modules_to_save"):
        return  # the adapter has none: the judge's own head is what it was trained with
    where = {key: options[key] for key in _WHERE if key in options}
    saved = head_of_adapter(load_file(cached_file(adapter, "adapter_model.safetensors", **where)))
    (head,) = model.head.modules_to_save.values()
    _check_complete(
        str(adapter), {"missing_keys": head.state_dict().keys() - saved.keys()}, ("missing_keys",)
    )
    head.load_state_dict(saved)


def _check_options(options: Mapping[str, Any]) -> None:
    if options.get("trust_remote_code"):
        raise ValueError("trust_remote_code: True came; a judge never runs code of a checkpoint")
    if options.get("use_safetensors") is False:
        raise ValueError("use_safetensors: False came; weights are read from safetensors only")


def _model_type(name: Any, options: Mapping[str, Any]) -> str | None:
    where = {key: options[key] for key in _WHERE if key in options}
    return AdaJudgeConfig.get_config_dict(name, **where)[0].get("model_type")


def _check_complete(name: str, info: Mapping[str, Any], problems: tuple[str, ...]) -> None:
    for problem in problems:
        keys = sorted(map(str, info.get(problem) or ()))
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ValueError(
                f"{name}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}{more}; expected every weight of the "
                "model and no other"
            )


AutoModelForSequenceClassification.register(AdaJudgeConfig, AdaJudgeForSequenceClassification)
