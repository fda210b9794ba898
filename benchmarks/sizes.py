"""What is measured on a device: enough to see how time grows, within the minutes of `make bench` and `make bench-gpu`."""

from __future__ import annotations

import dataclasses

import torch

FP32, BF16 = torch.float32, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one kind of device."""

    dtypes: tuple[torch.dtype, ...]
    tokens: tuple[int, ...]  # T, for scaling
    width: int  # d, of the cases that vary something else
    depths: int  # K
    pooled: tuple[tuple[int, int], ...]  # d and K
    usual_tokens: int
    rows: tuple[int, ...]  # B of the experts
    pairs: tuple[int, ...]  # of the loss
    head_width: int
    head_tokens: tuple[int, ...]
    backbones: tuple[str, ...]  # of `backbones.CONFIGURATIONS`, that score
    # Those that train, and pairs: twice with gradients, once more in a wider dtype.
    trained: tuple[tuple[str, int], ...]
    prompts: int  # scored, six responses each
    padded_rows: int  # of a padded batch: 8 as TRL's default, 64 as RewardBench 2's
    length_scale: float  # of the lengths that the head and training have


CPU = Sizes(
    dtypes=(FP32, BF16),
    tokens=(1024, 4096, 16384),
    width=1024,
    depths=3,
    pooled=((1024, 1), (4096, 4)),
    usual_tokens=4096,
    rows=(1, 16, 256),
    pairs=(4096,),
    head_width=256,
    head_tokens=(256, 512, 1024),
    backbones=("tiny",),
    trained=(("tiny", 4),),
    prompts=4,
    padded_rows=8,
    length_scale=0.25,
)
GPU = Sizes(
    dtypes=(BF16,),
    tokens=(1024, 8192, 32768, 131072),
    width=4096,
    depths=3,
    pooled=((1024, 1), (2048, 2), (4096, 4), (8192, 3)),
    usual_tokens=32768,
    rows=(1, 16, 128, 512),
    pairs=(256, 65536),
    head_width=4096,
    head_tokens=(4096, 16384, 32768),
    backbones=("Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B", "Phi-3.5-mini"),
    trained=(("Qwen3-0.6B", 16), ("Qwen3-4B", 4)),
    prompts=16,
    padded_rows=64,
    length_scale=1.0,
)


def of(device: torch.device) -> Sizes:
    return GPU if device.type == "cuda" else CPU
