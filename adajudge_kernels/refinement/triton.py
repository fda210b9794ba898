"""The refinement block's pieces on Triton kernels: what is launched, in which order, with which scratch memory."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from adajudge_kernels.launches import (
    FUSED,
    ON_AMD,
    TRITON_DTYPES,
    aligned,
    device_of,
    parts,
    power_of_2,
    sum_rows,
)
from adajudge_kernels.refinement import attention_kernels as attention
from adajudge_kernels.refinement import triton_kernels as kernels
from adajudge_kernels.refinement.configurations import (
    WIDE_NORM_STEP,
    WIDEST_NORM,
    AttentionStep,
    attention_step,
    norm_step,
    swiglu_block,
)
from adajudge_kernels.registration import arithmetic_dtype
from adajudge_kernels.tables import CHUNK_TOKENS, AttentionTables

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def residual_rms_norm_forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``u`` (x itself if there is no update) and ``RMSNorm(u)``."""
    x, weight = aligned(x), aligned(weight)
    tokens, d = x.shape
    total = x if update is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    step = norm_step(d)
    if tokens:
        with device_of(x):
            kernels.residual_rms_norm[(parts(tokens, step.tokens),)](
                x,
                x if update is None else aligned(update),
                weight,
                total,
                normed,
                eps,
                tokens,
                D=d,
                UPDATE=update is not None,
                TOKENS=step.tokens,
                BLOCK=step.block,
                ACC=TRITON_DTYPES[arithmetic_dtype(x.dtype)],
                num_warps=step.warps,
                **FUSED,
            )
    return total, normed


def residual_rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the update: the same) and of the weight."""
    grad_normed, total, weight = aligned(grad_normed), aligned(total), aligned(weight)
    (tokens, d), acc = total.shape, arithmetic_dtype(total.dtype)
    grad = torch.empty_like(total)
    if not tokens:
        return grad, weight.new_zeros(d, dtype=acc)
    chunks, step = parts(tokens, CHUNK_TOKENS), norm_step(d)
    kernel = kernels.residual_rms_norm_backward
    if d > WIDEST_NORM:
        kernel, step = kernels.wide_rms_norm_backward, WIDE_NORM_STEP
    weight_parts = total.new_empty(chunks, d, dtype=acc)
    with device_of(total):
        kernel[(chunks,)](
            total if grad_total is None else aligned(grad_total),
            grad_normed,
            total,
            weight,
            grad,
            weight_parts,
            eps,
            tokens,
            D=d,
            UPDATE=grad_total is not None,
            CHUNK=CHUNK_TOKENS,
            TOKENS=step.tokens,
            BLOCK=step.block,
            ACC=TRITON_DTYPES[acc],
            num_warps=step.warps,
            enable_fp_fusion=False,  # bits with and without grad_total are the same before it is added
        )
        return grad, sum_rows(weight_parts)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[T, f]``."""
    gate_up = aligned(gate_up)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    if out.numel():
        block, warps = swiglu_block(width)
        with device_of(out):
            kernels.swiglu[(tokens, parts(width, block))](
                gate_up,
                out,
                F=width,
                BLOCK=block,
                ACC=TRITON_DTYPES[arithmetic_dtype(out.dtype)],
                num_warps=warps,
                **FUSED,
            )
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the merged projection, ``[T, 2f]``."""
    grad, gate_up = aligned(grad), aligned(gate_up)
    tokens, width = grad.shape
    out = torch.empty_like(gate_up)
    if out.numel():
        block, warps = swiglu_block(width)
        with device_of(out):
            kernels.swiglu_backward[(tokens, parts(width, block))](
                grad,
                gate_up,
                out,
                F=width,
                BLOCK=block,
                ACC=TRITON_DTYPES[arithmetic_dtype(out.dtype)],
                num_warps=warps,
                **FUSED,
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
    """Attention ``[N, H, e]``, zero where there is no query, and the log-sum-exp to the base 2, ``[H, N]``."""
    query, key, value = (_rowwise(x) for x in (query, key, value))
    rows, heads, _ = query.shape
    filled = query.new_zeros if padded else query.new_empty  # no program writes at padding
    out = filled(query.shape)
    log_sum_exp = filled((heads, rows), dtype=arithmetic_dtype(query.dtype))
    chunks = tables.query_chunks.shape[0]
    if chunks:
        step, constants = _constants("forward", query, key, tables, causal, scale)
        with device_of(query):
            attention.attention_forward[(chunks * _tiles(step.queries), heads)](
                query,
                key,
                value,
                out,
                log_sum_exp,
                tables.groups,
                tables.queries,
                tables.query_chunks,
                tables.rows,
                rows,
                *_strides(query, key, value),
                **constants,
            )
    return out, log_sum_exp


def sequence_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    tables: AttentionTables,
    causal: bool,
    scale: float,
) -> None:
    """Write the gradients of query, key and value where there are tokens."""
    grad, out = aligned(grad), aligned(out)
    query, key, value = (_rowwise(x) for x in (query, key, value))
    rows, heads, _ = query.shape
    deltas = torch.empty_like(log_sum_exp)
    with device_of(query):
        if tables.query_chunks.shape[0]:
            step, constants = _constants("backward_queries", query, key, tables, causal, scale)
            attention.attention_backward_queries[
                (tables.query_chunks.shape[0] * _tiles(step.queries), heads)
            ](
                query,
                key,
                value,
                grad,
                out,
                log_sum_exp,
                deltas,
                grad_query,
                tables.groups,
                tables.queries,
                tables.query_chunks,
                tables.rows,
                rows,
                *_strides(query, key, value, grad_query),
                **constants,
            )
        if tables.key_chunks.shape[0]:
            step, constants = _constants("backward_keys", query, key, tables, causal, scale)
            attention.attention_backward_keys[(tables.key_chunks.shape[0] * _tiles(step.keys), key.shape[1])](
                query,
                key,
                value,
                grad,
                log_sum_exp,
                deltas,
                grad_key,
                grad_value,
                tables.groups,
                tables.key_chunks,
                tables.queries,
                tables.rows,
                rows,
                *_strides(query, key, value, grad_key, grad_value),
                **constants,
            )


def _tiles(size: int) -> int:
    """Programs a chunk; a tile of several chunks has idle ones."""
    return max(1, CHUNK_TOKENS // size)


def _constants(
    kernel: str, query: Tensor, key: Tensor, tables: AttentionTables, causal: bool, scale: float
) -> tuple[AttentionStep, dict[str, object]]:
    size, acc = query.shape[2], TRITON_DTYPES[arithmetic_dtype(query.dtype)]
    step = attention_step(kernel, size, query.dtype)
    constants = {
        "H": query.shape[1],
        "RATIO": query.shape[1] // key.shape[1],
        "E": size,
        "WIDTH": max(16, power_of_2(size)),
        "SCALE": scale,
        "CAUSAL": causal,
        "GATHERED": tables.rows.shape[0] > 0,
        "CHUNK": CHUNK_TOKENS,
        "M": step.queries,
        "N": step.keys,
        # The interpreter cuts bits off where the compiler rounds: there, products are of fp32 numbers.
        "DOT": acc if _INTERPRETED else TRITON_DTYPES[query.dtype],
        "ACC": acc,
        "num_warps": step.warps,
        "num_stages": step.stages,
        **FUSED,
    }
    if step.registers is not None and not ON_AMD:
        constants["maxnreg"] = step.registers
    return step, constants


def _rowwise(x: Tensor) -> Tensor:
    """`x` itself where its heads lie whole and on 16-byte boundaries, as in a merged projection; else a copy."""
    apart = x.stride(2) != 1 or any(stride * x.itemsize % 16 for stride in x.stride()[:2])
    return aligned(x) if apart or x.data_ptr() % 16 else x


def _strides(*tensors: Tensor) -> list[int]:
    """From row to row and from head to head of each."""
    return [stride for x in tensors for stride in x.stride()[:2]]
