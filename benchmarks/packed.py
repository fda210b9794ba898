"""The refinement stage on packed states ``[T, d]`` as people write it who pack: norms and SwiGLU are plain PyTorch's or a
library's, matrix products PyTorch's.

Attention is ours but for flash-linear-attention's side, so that the other sides show what norms and SwiGLU alone bring.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import adajudge_kernels as ak
from adajudge_kernels.refinement.ops import sequence_attention


class Operations(NamedTuple):
    """What a block does besides matrix products."""

    # x, weight, eps
    norm: Callable[[Tensor, Tensor, float], Tensor]
    # x, residual, weight, eps -> the norm of their sum, the sum
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    # gate, up
    swiglu: Callable[[Tensor, Tensor], Tensor]
    # qkv [T, 3, H, e] -> [T, H, e], causal
    attention: Callable[[Tensor, ak.SequenceLayout], Tensor]


def packed_refinement(
    refinement, operations: Operations, hidden: Tensor, layout: ak.SequenceLayout
) -> list[Tensor]:
    """K states ``[T, d]`` of a `DepthGatedRefinement` that has its weights."""
    states, residual, update = [], hidden, None
    for block in refinement.blocks:
        if update is None:
            normed = operations.norm(residual, block.attention_norm, block.eps)
        else:
            normed, residual = operations.add_norm(update, residual, block.attention_norm, block.eps)
            states.append(residual)
        qkv = F.linear(normed, block.qkv.weight).view(len(hidden), 3, block.num_heads, -1)
        mixed = F.linear(operations.attention(qkv, layout).flatten(1), block.output.weight)
        normed, residual = operations.add_norm(mixed, residual, block.mlp_norm, block.eps)
        gate, up = F.linear(normed, block.gate_up.weight).chunk(2, dim=-1)
        update = F.linear(operations.swiglu(gate, up), block.down.weight)
    return [*states, residual + update]


def our_attention(qkv, layout):
    return sequence_attention([qkv], layout)


def plain() -> Operations:
    def norm(x, weight, eps):
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(x, residual, weight, eps):
        total = x + residual
        return norm(total, weight, eps), total

    return Operations(norm, add_norm, lambda gate, up: F.silu(gate) * up, our_attention)


def liger() -> Operations:
    from liger_kernel.transformers import functional

    return Operations(
        lambda x, weight, eps: functional.liger_rms_norm(x, weight, eps, in_place=False),
        lambda x, residual, weight, eps: functional.liger_fused_add_rms_norm(
            x, residual, weight, eps, in_place=False
        ),
        functional.liger_swiglu,
        our_attention,
    )


def flash_linear_attention() -> Operations:
    from fla.modules.activations import swiglu
    from fla.modules.norm.layernorm import rms_norm
    from fla.ops.attn import parallel_attn

    def attention(qkv, layout):
        query, key, value = qkv.unsqueeze(0).unbind(2)
        return parallel_attn(query, key, value, cu_seqlens=starts(layout)).squeeze(0)

    return Operations(
        lambda x, weight, eps: rms_norm(x, weight, None, eps=eps),
        lambda x, residual, weight, eps: rms_norm(x, weight, None, residual=residual, eps=eps, prenorm=True),
        swiglu,
        attention,
    )


def starts(layout: ak.SequenceLayout) -> Tensor:
    """Where each sequence of a packed layout starts, and where the last one ends, ``[B + 1]``."""
    return F.pad(layout.ranges[:, 1], (1, 0))


LIBRARIES = {
    "Liger-Kernel": ("liger_kernel", liger),
    "flash-linear-attention": ("fla", flash_linear_attention),
}


def usable_libraries(device: torch.device) -> dict[str, Callable[[], Operations]]:
    """Those that are installed, where there is a GPU to run them."""
    found = {name: make for name, (module, make) in LIBRARIES.items() if importlib.util.find_spec(module)}
    return found if device.type == "cuda" else {}
