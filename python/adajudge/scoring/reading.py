"""How a judge reads a pack: which sequences may lie together, and in which form they reach the model.

======== ================================================== ==========================================================
way      the pack                                           where
======== ================================================== ==========================================================
shared   one row, each prompt once, no padding, no mask     attention ``"adajudge"``
packed   one row, each response behind its own prompt       flash attention, or a head that is not causal
tree     one prompt with its responses, under a mask        ``"sdpa"``, ``"eager"``, where that saves enough tokens
padded   ``[B, L]``, sorted by length                       everything else
======== ================================================== ==========================================================

All give the same scores; `Reading` chooses by the backbone, its attention implementation and the sequences' lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from adajudge import backbone_attention
from adajudge.attention_masks import check_keeps_apart, masked_attention, window_in_force
from adajudge.backbone_states import long_rope_border
from adajudge.data import EncodedRow, PackedBatch, group_by_prompt, pack_rows, pack_shared_prompts, pad_rows
from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.scoring.packing import Pack, packed_packs, padded_packs, shared_packs
from adajudge_kernels import SequenceLayout, available_backends

logger = logging.getLogger(__name__)

_TREE_TOKENS = 4096  # of a pack: its mask is quadratic in them
_TREE_SAVES = 0.25  # share of a prompt's tokens, at least, for which a mask is worth its cost

Packer = Callable[[Sequence[EncodedRow], Sequence[int], int], list[Pack]]


@dataclass(frozen=True)
class Way:
    """One way to read packs: how they are formed, and what the model is called with, on its device."""

    name: str
    attention: str
    pack: Packer
    inputs: Callable[[list[EncodedRow], Pack, torch.device], dict[str, Any]]


class Reading:
    """Divides sequences among the ways that serve them.

    Args:
        model: the judge on its device.
    """

    def __init__(self, model: AdaJudgeForSequenceClassification) -> None:
        self.model = model
        config = model.backbone.config.get_text_config(decoder=True)
        self.attention: str = config._attn_implementation or "eager"
        self._masked = masked_attention(model.backbone)
        self._window = window_in_force(config)
        self._border = long_rope_border(model.backbone)
        self._keeps_apart = _keeps_apart(model.backbone)

    def divide(self, rows: Sequence[EncodedRow]) -> Iterator[tuple[Way, list[int]]]:
        """The ways that are taken, each with the indices of its sequences."""
        ways: dict[tuple[str, bool], tuple[Way, list[int]]] = {}
        for group in group_by_prompt(rows):
            worth = _worth_a_mask([rows[i] for i in group])
            for index in group:
                way = self._way(len(rows[index]), worth)
                beyond = self._border is not None and len(rows[index]) > self._border
                ways.setdefault((way.name, beyond), (way, []))[1].append(index)
        yield from ways.values()

    def _way(self, length: int, worth_a_mask: bool) -> Way:
        """Of a sequence of this length."""
        attention, causal = self.attention, self.model.config.causal_refinement
        if attention == backbone_attention.NAME:
            if self._window is None or length <= self._window:
                return _shared(attention) if causal else _packed(attention)
            attention = self._masked  # whose mask has the window
        if self._keeps_apart and "flash" in attention:
            return _packed(attention)
        if self._keeps_apart and causal and attention in ("sdpa", "eager") and worth_a_mask:
            return Way("tree", attention, _tree_packs, _shared_inputs)
        return Way("padded", attention, padded_packs, _padded_inputs)


def choose_attention(model: AdaJudgeForSequenceClassification) -> None:
    """Give the judge the attention ``"adajudge"``, or transformers' own if its backbone is not served by it.

    A layer says only when it is called what it wants (soft-capping, sinks): two short sequences are read for that.
    """
    device = next(model.parameters()).device
    reason = None
    if device.type == "cuda" and "triton" not in available_backends():
        reason = "on a GPU it needs Triton"
    else:
        before = model.config.get_text_config(decoder=True)._attn_implementation
        model.set_attn_implementation(backbone_attention.NAME)
        try:
            with torch.inference_mode():
                layout = SequenceLayout.shared_prompts([1], [[1, 2]], device)
                model(torch.zeros(1, 4, dtype=torch.long, device=device), layout=layout)
        except ValueError as error:
            reason = str(error)
            model.set_attn_implementation(before)
    if reason is not None:
        logger.info("prompts are not shared by attention %r: %s", backbone_attention.NAME, reason)


@contextmanager
def attention_of(model: AdaJudgeForSequenceClassification, name: str) -> Iterator[None]:
    """Read with this attention implementation; afterwards the model has its own again."""
    before = model.backbone.config.get_text_config(decoder=True)._attn_implementation or "eager"
    if name == before:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _keeps_apart(backbone: PreTrainedModel) -> bool:
    try:
        check_keeps_apart(backbone, backbone.config.get_text_config(decoder=True))
    except ValueError:
        return False
    return True


def _worth_a_mask(group: list[EncodedRow]) -> bool:
    prompt = group[0].prompt_length
    longest = prompt + max(row.response_length for row in group)
    saved = prompt * (len(group) - 1)
    return longest <= _TREE_TOKENS and saved >= _TREE_SAVES * sum(len(row) for row in group)


def _tree_packs(rows: Sequence[EncodedRow], chosen: Sequence[int], budget: int) -> list[Pack]:
    """One prompt a pack: a mask over several would mostly say that they do not see each other."""
    packs: list[Pack] = []
    for group in group_by_prompt([rows[i] for i in chosen]):
        packs += shared_packs(rows, [chosen[i] for i in group], min(budget, _TREE_TOKENS))
    return packs


def _shared(attention: str) -> Way:
    return Way("shared", attention, shared_packs, _shared_inputs)


def _packed(attention: str) -> Way:
    return Way("packed", attention, packed_packs, _packed_inputs)


def _shared_inputs(rows: list[EncodedRow], pack: Pack, device: torch.device) -> dict[str, Any]:
    remaining = iter(rows)
    return _on(device, pack_shared_prompts([[next(remaining) for _ in group] for group in pack.groups]))


def _packed_inputs(rows: list[EncodedRow], pack: Pack, device: torch.device) -> dict[str, Any]:
    return _on(device, pack_rows(rows))


def _on(device: torch.device, batch: PackedBatch) -> dict[str, Any]:
    batch = batch.to(device)
    return {"input_ids": batch.input_ids, "layout": batch.layout}


def _padded_inputs(rows: list[EncodedRow], pack: Pack, device: torch.device) -> dict[str, Any]:
    batch = pad_rows(rows, pad_token_id=0)  # any id: padding is known by its mask alone
    return {name: tensor.to(device) for name, tensor in batch.items()}
