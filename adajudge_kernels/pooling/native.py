"""The pooling operations on the compiled kernels: outputs made here, everything else in `csrc/`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.registration import arithmetic_dtype, fresh
from adajudge_kernels.tables import LayoutTables


def depth_gate_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha [B, K]``, ``z_P [B, d]`` and the context ``c [B, d]``."""
    acc, batch, (depths, d) = arithmetic_dtype(hidden.dtype), tables.sequences.shape[0], weight.shape
    alpha = hidden.new_empty(batch, depths, dtype=acc)
    prompt_mean, context = (hidden.new_empty(batch, d, dtype=acc) for _ in range(2))
    _means(hidden, tables, prompt=prompt_mean, everything=context)
    compiled.run("depth_weights", hidden, context, weight, bias, alpha)
    return alpha, prompt_mean, context


def masked_mean_pool_forward(hidden: Tensor, tables: LayoutTables, max_length: int, which: str) -> Tensor:
    """Mean over the tokens that `which` names, ``[B, d]``; zero where there are none."""
    acc = arithmetic_dtype(hidden.dtype)
    pooled = hidden.new_empty(tables.sequences.shape[0], hidden.shape[1], dtype=acc)
    _means(hidden, tables, **{"everything" if which == "all" else which: pooled})
    return pooled


def multi_view_pool_forward(
    states: list[Tensor],
    depth_weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z_L, z_M, z_A``, each ``[B, d]``, and the log-sum-exp ``[B]`` of the attention view."""
    acc, batch, d = arithmetic_dtype(states[0].dtype), tables.sequences.shape[0], states[0].shape[1]
    last, mean = states[0].new_empty(batch, d, dtype=acc), states[0].new_empty(batch, d, dtype=acc)
    attention, log_sum_exp = _views(states, depth_weights, weight, bias, tables, response_only, last, mean)
    return last, mean, attention, log_sum_exp


def attention_pool_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int, response_only: bool
) -> tuple[Tensor, Tensor]:
    """``z_A [B, d]`` of one state, and the log-sum-exp ``[B]``."""
    return _views([hidden], None, weight, bias, tables, response_only)


def multi_view_pool_backward(
    grad_last: Tensor,
    grad_mean: Tensor,
    grad_attention: Tensor,
    states: list[Tensor],
    depth_weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    attention: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of the states, the depth weights, the attention weight and bias (whose gradient is zero)."""
    dalpha = attention.new_empty(depth_weights.shape)
    call = weight, bias, attention, log_sum_exp, tables, response_only
    dstates, dweight = _views_backward(
        grad_attention, states, *call, (depth_weights, dalpha, grad_last, grad_mean)
    )
    return dstates, dalpha, dweight, dweight.new_zeros(1)


def attention_pool_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    pooled: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias."""
    call = weight, bias, pooled, log_sum_exp, tables, response_only
    (dhidden,), dweight = _views_backward(grad, [hidden], *call)
    return dhidden, dweight, dweight.new_zeros(1)


def _views(
    states: Sequence[Tensor],
    depth_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    response_only: bool,
    last: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention view and its log-sum-exp; the other two where they have a place to go to."""
    first = states[0]
    acc, batch, d = arithmetic_dtype(first.dtype), tables.sequences.shape[0], first.shape[1]
    attention, log_sum_exp = first.new_empty(batch, d, dtype=acc), first.new_empty(batch, dtype=acc)
    compiled.run(
        "views",
        first,
        tables.native,
        response_only,
        states,
        depth_weights,
        weight,
        bias,
        last,
        mean,
        attention,
        log_sum_exp,
    )
    return attention, log_sum_exp


def _means(
    hidden: Tensor,
    tables: LayoutTables,
    prompt: Tensor | None = None,
    response: Tensor | None = None,
    everything: Tensor | None = None,
) -> None:
    """Write the means that have a place to go to."""
    compiled.run("means", hidden, tables.native, hidden, prompt, response, everything)


def _views_backward(
    grad_attention: Tensor,
    states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    attention: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    response_only: bool,
    others: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of states and attention weight.

    `others`, where there are three views: the depth weights, where their gradient goes, and the gradients of last and mean.
    """
    depth_weights, dalpha, grad_last, grad_mean = others or (None,) * 4
    dstates, dweight = [fresh(x) for x in states], attention.new_empty(weight.shape)
    compiled.run(
        "views_backward",
        states[0],
        tables.native,
        response_only,
        grad_last,
        grad_mean,
        grad_attention,
        states,
        depth_weights,
        weight,
        bias,
        attention,
        log_sum_exp,
        dstates,
        dalpha,
        dweight,
    )
    return dstates, dweight


def spread_means(
    tables: LayoutTables,
    max_length: int,
    dtype: torch.dtype,
    prompt: Tensor | None = None,
    response: Tensor | None = None,
    everything: Tensor | None = None,
) -> Tensor:
    """``[T, d]`` from the gradients ``[B, d]`` of the means that were taken."""
    grads = prompt, response, everything
    given = next(x for x in grads if x is not None)
    out = given.new_empty(tables.roles.shape[0], given.shape[1], dtype=dtype)
    compiled.run("spread_means", out, tables.native, *grads, out)
    return out
