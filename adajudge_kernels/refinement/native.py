"""The refinement block on the compiled kernels (`csrc/cpu/refinement.cpp`, `attention.cpp`); the gradients of attention are
matrix products, and torch's."""

from __future__ import annotations

from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.refinement.reference import sequence_attention_backward
from adajudge_kernels.registration import arithmetic_dtype, fresh
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
    x = x.contiguous()  # it may be an output
    normed, total = fresh(x), None if update is None else fresh(x)
    compiled.run("rms_norm", x, eps, x, update, weight, total, normed)
    return x if total is None else total, normed


def residual_rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the update: the same) and of the weight."""
    grad = fresh(total)
    grad_weight = weight.new_empty(weight.shape, dtype=arithmetic_dtype(total.dtype))
    compiled.run("rms_norm_backward", total, eps, grad_total, grad_normed, total, weight, grad, grad_weight)
    return grad, grad_weight


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[T, f]``."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    compiled.run("swiglu", out, gate_up, out)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the merged projection, ``[T, 2f]``."""
    out = fresh(gate_up)
    compiled.run("swiglu_backward", grad, grad, gate_up, out)
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
    compiled.run(
        "attention",
        query,
        causal,
        scale,
        tables.groups,
        tables.queries,
        tables.query_chunks,
        tables.rows,
        query,
        key,
        value,
        out,
    )
    return out, query.new_empty(0, dtype=arithmetic_dtype(query.dtype))
