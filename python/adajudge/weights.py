"""Weights as they are loaded, told apart by a digest: wherever they came from, whatever their files are called.

An adapter is nothing without the weights it was trained on, and on others its scores are wrong without a sign of it: its
configuration says in which dtype they were, and their digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor
from transformers import PreTrainedModel

_MERGED = "_adajudge_merged"  # attribute of a backbone: what stands for a digest of its weights
_SAMPLES = 64  # words of a tensor whose place counts too


def digest(content: object) -> str:
    """Of anything that JSON can say; what it cannot is taken as text."""
    text = json.dumps(content, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


@torch.inference_mode()
def digest_of_weights(state: Mapping[str, Tensor]) -> str:
    """Of names, shapes and every bit."""
    sums = torch.stack([_checksum(tensor) for tensor in state.values()]).tolist()
    return digest([[name, list(state[name].shape), *s] for name, s in zip(state, sums, strict=True)])


def describe_backbone(backbone: PreTrainedModel) -> dict[str, str]:
    """Dtype and digest of the weights that an adapter is about to be put on."""
    known_by: str | None = getattr(backbone, _MERGED, None)
    return {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "digest": known_by or digest_of_weights(backbone.state_dict()),
    }


def mark_merged(backbone: PreTrainedModel, before: Mapping[str, str], adapter: Mapping[str, Tensor]) -> None:
    """Let a backbone be known by what it was before and the adapter that has been merged into it.

    The last digits of the merged weights are not the same on every machine.
    """
    setattr(backbone, _MERGED, digest([before["digest"], digest_of_weights(adapter)]))


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of all bits, eight bytes at a time as integers (exact in any order), and of some times their place."""
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    words = octets[: octets.numel() // 8 * 8].view(torch.int64)
    some, rest = words[:: max(1, words.numel() // _SAMPLES)], octets[words.numel() * 8 :].long()
    return torch.stack([words.sum(), _by_place(some), _by_place(rest)])


def _by_place(values: Tensor) -> Tensor:
    return (values * torch.arange(1, values.numel() + 1, device=values.device)).sum()
