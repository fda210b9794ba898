"""The refinement block on the compiled kernels (`csrc/cpu/refinement.cpp`, `attention.cpp`); the gradients of attention are
matrix products, and torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.compiled import address, dtype_code, small, stored
from adajudge_kernels.refinement.reference import sequence_attention_backward
from adajudge_kernels.registration import arithmetic_dtype
from adajudge_kernels.tables import AttentionTables

__all__ = [
    "residual_rms_norm_backward",
    "residual_rms_norm_forward",
    "sequence_attention_backward",
    "sequence_attention_forward",
    "swiglu_backward",
    "swiglu_forward",
]


def residual_rms_norm_forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``u`` (x itself if there is no update) and ``RMSNorm(u)``."""
    x, weight = x.contiguous(), small(weight, arithmetic_dtype(x.dtype))
    update = None if update is None else update.contiguous()
    total, normed = x if update is None else torch.empty_like(x), torch.empty_like(x)
    compiled.run(
        "rms_norm",
        x,
        dtype_code(x.dtype),
        *x.shape,
        eps,
        address(x),
        address(update),
        stored(weight),
        address(None if update is None else total),
        address(normed),
    )
    return total, normed


def residual_rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the update: the same) and of the weight."""
    grad_normed, total = grad_normed.contiguous(), total.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    acc = arithmetic_dtype(total.dtype)
    weight = small(weight, acc)
    grad, grad_weight = torch.empty_like(total), weight.new_empty(weight.shape, dtype=acc)
    compiled.run(
        "rms_norm_backward",
        total,
        dtype_code(total.dtype),
        *total.shape,
        eps,
        address(grad_total),
        address(grad_normed),
        address(total),
        stored(weight),
        address(grad),
        address(grad_weight),
    )
    return grad, grad_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[T, f]``."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    compiled.run("swiglu", out, dtype_code(out.dtype), *out.shape, address(gate_up), address(out))
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the merged projection, ``[T, 2f]``."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out = torch.empty_like(gate_up)
    compiled.run(
        "swiglu_backward",
        grad,
        dtype_code(out.dtype),
        *grad.shape,
        address(grad),
        address(gate_up),
        address(out),
    )
    return out


def sequence_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: AttentionTables,
    causal: bool,
    scale: float,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Attention ``[N, H, e]``, zero at padding; the second output is empty, nothing more is kept."""
    out = (query.new_zeros if padded else query.new_empty)(query.shape)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    _, heads, head_size = query.shape
    compiled.run(
        "attention",
        query,
        dtype_code(query.dtype),
        heads,
        key.shape[1],
        head_size,
        causal,
        scale,
        address(tables.groups),
        address(tables.queries),
        address(tables.query_chunks),
        address(tables.rows if tables.rows.numel() else None),
        tables.query_chunks.shape[0],
        *((address(x), x.stride(0), x.stride(1)) for x in (query, key, value)),
        address(out),
    )
    return out, query.new_empty(0, dtype=arithmetic_dtype(query.dtype))
