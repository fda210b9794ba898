"""The pooling operations on the compiled kernels: outputs made here, everything else in `csrc/`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.compiled import address, contiguous, dtype_code, layout_of, small, stored
from adajudge_kernels.registration import arithmetic_dtype
from adajudge_kernels.tables import LayoutTables


def depth_gate_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha [B, K]``, ``z_P [B, d]`` and the context ``c [B, d]``."""
    acc, batch, (depths, d) = arithmetic_dtype(hidden.dtype), tables.sequences.shape[0], weight.shape
    alpha = hidden.new_empty(batch, depths, dtype=acc)
    prompt_mean, context = (hidden.new_empty(batch, d, dtype=acc) for _ in range(2))
    weight, bias = small(weight, acc), small(bias, acc)
    _means(hidden, tables, prompt=prompt_mean, everything=context)
    compiled.run(
        "depth_weights",
        hidden,
        dtype_code(acc),
        batch,
        d,
        depths,
        address(context),
        stored(weight),
        stored(bias),
        address(alpha),
    )
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
    grads = contiguous(grad_last), contiguous(grad_mean)
    call = weight, bias, attention, log_sum_exp, tables, response_only
    dstates, dweight = _views_backward(grad_attention, states, *call, (depth_weights, dalpha, *grads))
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
    states = [contiguous(x) for x in states]
    first = states[0]
    acc, batch, d = arithmetic_dtype(first.dtype), tables.sequences.shape[0], first.shape[1]
    alpha = None if depth_weights is None else small(depth_weights, acc)
    weight, bias = small(weight, acc), small(bias, acc)
    attention, log_sum_exp = first.new_empty(batch, d, dtype=acc), first.new_empty(batch, dtype=acc)
    compiled.run(
        "views",
        first,
        dtype_code(first.dtype),
        layout_of(tables),
        d,
        response_only,
        [x.data_ptr() for x in states],
        stored(alpha),
        stored(weight),
        stored(bias),
        address(last),
        address(mean),
        address(attention),
        address(log_sum_exp),
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
    hidden = contiguous(hidden)
    compiled.run(
        "means",
        hidden,
        dtype_code(hidden.dtype),
        layout_of(tables),
        hidden.shape[1],
        address(hidden),
        address(prompt),
        address(response),
        address(everything),
    )


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
    states, acc = [contiguous(x) for x in states], attention.dtype
    depth_weights, dalpha, grad_last, grad_mean = others or (None,) * 4
    alpha = None if depth_weights is None else small(depth_weights, acc)
    weight, bias, grad_attention = small(weight, acc), small(bias, acc), contiguous(grad_attention)
    # They were saved, and a hook may have moved them.
    attention, log_sum_exp = contiguous(attention), contiguous(log_sum_exp)
    dstates, dweight = [torch.empty_like(x) for x in states], attention.new_empty(weight.shape)
    compiled.run(
        "views_backward",
        states[0],
        dtype_code(states[0].dtype),
        layout_of(tables),
        states[0].shape[1],
        response_only,
        address(grad_last),
        address(grad_mean),
        address(grad_attention),
        [x.data_ptr() for x in states],
        stored(alpha),
        stored(weight),
        stored(bias),
        address(attention),
        address(log_sum_exp),
        [x.data_ptr() for x in dstates],
        address(dalpha),
        address(dweight),
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
    grads = [None if x is None else contiguous(x) for x in (prompt, response, everything)]
    given = next(x for x in grads if x is not None)
    out = given.new_empty(tables.roles.shape[0], given.shape[1], dtype=dtype)
    compiled.run(
        "spread_means",
        out,
        dtype_code(dtype),
        layout_of(tables),
        out.shape[1],
        *(address(x) for x in grads),
        address(out),
    )
    return out
