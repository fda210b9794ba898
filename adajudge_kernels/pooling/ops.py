"""The public pooling operations: checks, operators and autograd. One scan over the states, several views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.arguments import (
    MAX_DEPTHS,
    check_choice,
    check_depths,
    check_layout,
    check_like,
    check_states,
    fit,
)
from adajudge_kernels.layout import LayoutTables, SequenceLayout
from adajudge_kernels.registration import arithmetic_dtype, fresh, operator, or_zeros

__all__ = ["PooledViews", "attention_pool", "depth_gate", "masked_mean_pool", "multi_view_pool"]


class PooledViews(NamedTuple):
    """The three views of a response, each ``[B, d]`` fp32."""

    last: Tensor
    mean: Tensor
    attention: Tensor


def _kernels(backend: str) -> Any:
    return backends.load("pooling", backend)


def _tables(layout: SequenceLayout) -> Any:
    """The layout's tables; a tuple, which is how an `Operation` knows that they take no part in autograd."""
    return layout.tables


def _without_gradient(ctx: Any, kept: Tensor) -> None:
    """An output that only the backward reads; no zeros are made up for it, nor for outputs that nobody used."""
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)


# For the tables: autograd wants one entry per tensor of a list.
_NO_GRADIENT: list[None] = [None] * len(LayoutTables._fields)


def depth_gate(hidden: Tensor, weight: Tensor, bias: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Depth weights and prompt context, from one pass over the backbone's states (paper, Stage I).

    ``c = mean over all tokens of H0_t``, ``alpha = softmax(W_d c + b_d)``, ``z_P = mean over prompt tokens of
    H0_t`` (zero vector where the prompt is empty).

    Args:
        hidden: H0, ``[T, d]`` fp32, bf16 or fp16.
        weight: W_d, ``[K, d]``, K from 1 to 8.
        bias: b_d, ``[K]``.
        layout: where the tokens of each of the B sequences lie.

    Returns:
        ``(depth_weights [B, K], prompt_mean [B, d])``, fp32.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    if not fit(layout, "Td Kd K", hidden, weight, bias):
        check_layout(layout)
        check_states("hidden", hidden, layout)
        check_depths("weight", weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 1)
        depths = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else MAX_DEPTHS
        check_like("weight", weight, (depths, hidden.shape[1]), hidden, "hidden")
        check_like("bias", bias, (depths,), hidden, "hidden")
    backend = backends.choose_backend(hidden.device, "pooling").backend
    alpha, prompt_mean, _ = _depth_gate(hidden, weight, bias, _tables(layout), layout.max_length, backend)
    return alpha, prompt_mean


def _depth_gate_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (batch, d) = arithmetic_dtype(hidden.dtype), (tables[1].shape[0], hidden.shape[1])
    alpha = hidden.new_empty(batch, weight.shape[0], dtype=dtype)
    return alpha, hidden.new_empty(batch, d, dtype=dtype), hidden.new_empty(batch, d, dtype=dtype)


@operator("depth_gate", _depth_gate_fake)
def _depth_gate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: list[Tensor],
    max_length: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(backend).depth_gate_forward(hidden, weight, bias, LayoutTables.of(tables), max_length)


def _depth_gate_backward_fake(
    grad_alpha: Tensor,
    grad_prompt: Tensor,
    alpha: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_dtype: torch.dtype,
    tables: list[Tensor],
    max_length: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = weight.new_empty(tables[0].shape[0], weight.shape[1], dtype=hidden_dtype)
    return hidden, fresh(weight), fresh(bias)


@operator("depth_gate_backward", _depth_gate_backward_fake)
def _depth_gate_backward(
    grad_alpha: Tensor,
    grad_prompt: Tensor,
    alpha: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_dtype: torch.dtype,
    tables: list[Tensor],
    max_length: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # What has no tokens in it, [B, K] and [K, d], is plain PyTorch.
    dlogits = alpha * (grad_alpha - (grad_alpha * alpha).sum(dim=1, keepdim=True))
    dcontext = dlogits @ weight.to(dlogits.dtype)
    dhidden = _kernels(backend).spread_means(
        LayoutTables.of(tables), max_length, hidden_dtype, prompt=grad_prompt, everything=dcontext
    )
    return dhidden, (dlogits.mT @ context).to(weight.dtype), dlogits.sum(dim=0).to(bias.dtype)


def _depth_gate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *ctx.call = inputs
    alpha, _, context = output
    _without_gradient(ctx, context)
    ctx.hidden_dtype = hidden.dtype
    ctx.save_for_backward(alpha, context, weight, bias)


def _depth_gate_gradients(
    ctx: Any, grad_alpha: Tensor | None, grad_prompt: Tensor | None, _: None
) -> tuple[Any, ...]:
    alpha, context, weight, bias = ctx.saved_tensors
    grads = or_zeros(grad_alpha, alpha), or_zeros(grad_prompt, context)
    dhidden, dweight, dbias = _depth_gate_backward(
        *grads, alpha, context, weight, bias, ctx.hidden_dtype, *ctx.call
    )
    return dhidden, dweight, dbias, _NO_GRADIENT, None, None


_depth_gate.register_autograd(_depth_gate_gradients, setup_context=_depth_gate_context)


def multi_view_pool(
    states: Sequence[Tensor],
    depth_weights: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    layout: SequenceLayout,
    attention_tokens: str = "all",
) -> PooledViews:
    """Last, mean and attention view of the depth-weighted states, in one pass over them (paper, Stage II).

    ``H~_t = sum_k alpha_k H_k,t``; ``z_L = H~_tau``, tau the last response token; ``z_M`` its mean over response
    tokens; ``z_A = sum_t beta_t H~_t`` with ``beta = softmax_t(w_a . H~_t + b_a)``.

    Args:
        states: H_1..H_K, a list of 1 to 8 tensors ``[T, d]`` of one dtype (fp32, bf16 or fp16); never stacked.
        depth_weights: alpha, ``[B, K]``.
        attention_weight: w_a, ``[d]``.
        attention_bias: b_a, ``[1]``.
        layout: where the tokens of each of the B sequences lie.
        attention_tokens: what beta runs over: ``"all"`` tokens of the sequence or its ``"response"``.

    Returns:
        `PooledViews`, each ``[B, d]`` fp32.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    if not fit(layout, "K*Td BK d 1", states, depth_weights, attention_weight, attention_bias):
        check_layout(layout)
        if isinstance(states, Tensor) or not isinstance(states, (list, tuple)):
            raise ValueError(f"states: {type(states).__name__} came, expected a list of K tensors [T, d]")
        check_depths("states", len(states))
        check_states("states[0]", states[0], layout)
        first = states[0]
        shape, dtype = first.shape, first.dtype
        for k, x in enumerate(states):
            if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (shape, dtype, first.device):
                check_like(f"states[{k}]", x, shape, first, "states[0]")
                raise ValueError(f"states[{k}]: dtype {x.dtype} came, expected {dtype} as states[0]")
        check_like("depth_weights", depth_weights, (layout.num_sequences, len(states)), first, "states[0]")
        check_like("attention_weight", attention_weight, shape[1:], first, "states[0]")
        check_like("attention_bias", attention_bias, (1,), first, "states[0]")
    check_choice("attention_tokens", attention_tokens, ("all", "response"))
    last, mean, attention, _ = _multi_view_pool(
        list(states),
        depth_weights,
        attention_weight,
        attention_bias,
        _tables(layout),
        layout.max_length,
        attention_tokens == "response",
        backends.choose_backend(states[0].device, "pooling").backend,
    )
    return PooledViews(last, mean, attention)


def _multi_view_pool_fake(states: list[Tensor], depth_weights: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype, shape = arithmetic_dtype(states[0].dtype), (depth_weights.shape[0], states[0].shape[1])
    views = [states[0].new_empty(shape, dtype=dtype) for _ in range(3)]
    return *views, states[0].new_empty(shape[0], dtype=dtype)


@operator("multi_view_pool", _multi_view_pool_fake)
def _multi_view_pool(
    states: list[Tensor],
    depth_weights: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    tables: list[Tensor],
    max_length: int,
    response_only: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels(backend).multi_view_pool_forward(
        states,
        depth_weights,
        attention_weight,
        attention_bias,
        LayoutTables.of(tables),
        max_length,
        response_only,
    )


def _multi_view_pool_backward_fake(
    grads: list[Tensor],
    states: list[Tensor],
    depth_weights: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    *_: Any,
) -> list[Tensor]:
    return [fresh(x) for x in (*states, depth_weights, attention_weight, attention_bias)]


@operator("multi_view_pool_backward", _multi_view_pool_backward_fake)
def _multi_view_pool_backward(
    grads: list[Tensor],
    states: list[Tensor],
    depth_weights: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    attention: Tensor,
    log_sum_exp: Tensor,
    tables: list[Tensor],
    max_length: int,
    response_only: bool,
    backend: str,
) -> list[Tensor]:
    dstates, dalpha, dweight, dbias = _kernels(backend).multi_view_pool_backward(
        *grads,
        states,
        depth_weights,
        attention_weight,
        attention_bias,
        attention,
        log_sum_exp,
        LayoutTables.of(tables),
        max_length,
        response_only,
    )
    return [
        *dstates,
        dalpha.to(depth_weights.dtype),
        dweight.to(attention_weight.dtype),
        dbias.to(attention_bias.dtype),
    ]


def _multi_view_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, alpha, weight, bias, *ctx.call = inputs
    _, _, attention, log_sum_exp = output
    _without_gradient(ctx, log_sum_exp)
    ctx.save_for_backward(*states, alpha, weight, bias, attention, log_sum_exp)


def _multi_view_pool_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *states, alpha, weight, bias, attention, log_sum_exp = ctx.saved_tensors
    *dstates, dalpha, dweight, dbias = _multi_view_pool_backward(
        [or_zeros(grad, attention) for grad in grads[:3]],
        states,
        alpha,
        weight,
        bias,
        attention,
        log_sum_exp,
        *ctx.call,
    )
    return dstates, dalpha, dweight, dbias, _NO_GRADIENT, None, None, None


_multi_view_pool.register_autograd(_multi_view_pool_gradients, setup_context=_multi_view_pool_context)


def masked_mean_pool(hidden: Tensor, layout: SequenceLayout, tokens: str = "response") -> Tensor:
    """Masked mean pooling: ``z = sum_t m_t h_t / sum_t m_t`` (``z_M`` and ``z_P`` of the paper's Stage II).

    Args:
        hidden: ``[T, d]`` fp32, bf16 or fp16.
        layout: where the tokens of each of the B sequences lie.
        tokens: what m selects: the ``"response"``, the ``"prompt"`` or ``"all"`` tokens of a sequence.

    Returns:
        ``[B, d]`` fp32; a zero vector where nothing is selected (an empty prompt).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    if not fit(layout, "Td", hidden):
        check_layout(layout)
        check_states("hidden", hidden, layout)
    check_choice("tokens", tokens, ("response", "prompt", "all"))
    backend = backends.choose_backend(hidden.device, "pooling").backend
    return _masked_mean_pool(hidden, _tables(layout), layout.max_length, tokens, backend)


def _masked_mean_pool_fake(hidden: Tensor, tables: list[Tensor], *_: Any) -> Tensor:
    return hidden.new_empty(tables[1].shape[0], hidden.shape[1], dtype=arithmetic_dtype(hidden.dtype))


@operator("masked_mean_pool", _masked_mean_pool_fake)
def _masked_mean_pool(
    hidden: Tensor, tables: list[Tensor], max_length: int, tokens: str, backend: str
) -> Tensor:
    return _kernels(backend).masked_mean_pool_forward(hidden, LayoutTables.of(tables), max_length, tokens)


def _masked_mean_pool_backward_fake(
    grad: Tensor,
    hidden_dtype: torch.dtype,
    tables: list[Tensor],
    max_length: int,
    tokens: str,
    backend: str,
) -> Tensor:
    return grad.new_empty(tables[0].shape[0], grad.shape[1], dtype=hidden_dtype)


@operator("masked_mean_pool_backward", _masked_mean_pool_backward_fake)
def _masked_mean_pool_backward(
    grad: Tensor,
    hidden_dtype: torch.dtype,
    tables: list[Tensor],
    max_length: int,
    tokens: str,
    backend: str,
) -> Tensor:
    mean = {"everything" if tokens == "all" else tokens: grad}
    return _kernels(backend).spread_means(LayoutTables.of(tables), max_length, hidden_dtype, **mean)


def _masked_mean_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, *ctx.call = inputs
    ctx.hidden_dtype = hidden.dtype


def _masked_mean_pool_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dhidden = _masked_mean_pool_backward(grad, ctx.hidden_dtype, *ctx.call)
    return dhidden, _NO_GRADIENT, None, None, None


_masked_mean_pool.register_autograd(_masked_mean_pool_gradients, setup_context=_masked_mean_pool_context)


def attention_pool(
    hidden: Tensor, weight: Tensor, bias: Tensor, layout: SequenceLayout, tokens: str = "all"
) -> Tensor:
    """Attention pooling: ``z = sum_t beta_t h_t``, ``beta = softmax_t(w . h_t + b)`` (paper, Stage II).

    Args:
        hidden: ``[T, d]`` fp32, bf16 or fp16.
        weight: w, ``[d]``.
        bias: b, ``[1]``.
        layout: where the tokens of each of the B sequences lie.
        tokens: what beta runs over: ``"all"`` tokens of the sequence or its ``"response"``.

    Returns:
        ``[B, d]`` fp32.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    if not fit(layout, "Td d 1", hidden, weight, bias):
        check_layout(layout)
        check_states("hidden", hidden, layout)
        check_like("weight", weight, (hidden.shape[1],), hidden, "hidden")
        check_like("bias", bias, (1,), hidden, "hidden")
    check_choice("tokens", tokens, ("all", "response"))
    backend = backends.choose_backend(hidden.device, "pooling").backend
    pooled, _ = _attention_pool(
        hidden, weight, bias, _tables(layout), layout.max_length, tokens == "response", backend
    )
    return pooled


def _attention_pool_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    dtype, batch = arithmetic_dtype(hidden.dtype), tables[1].shape[0]
    return hidden.new_empty(batch, hidden.shape[1], dtype=dtype), hidden.new_empty(batch, dtype=dtype)


@operator("attention_pool", _attention_pool_fake)
def _attention_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: list[Tensor],
    max_length: int,
    response_only: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).attention_pool_forward(
        hidden, weight, bias, LayoutTables.of(tables), max_length, response_only
    )


def _attention_pool_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(hidden), fresh(weight), fresh(bias)


@operator("attention_pool_backward", _attention_pool_backward_fake)
def _attention_pool_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    pooled: Tensor,
    log_sum_exp: Tensor,
    tables: list[Tensor],
    max_length: int,
    response_only: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight, dbias = _kernels(backend).attention_pool_backward(
        grad, hidden, weight, bias, pooled, log_sum_exp, LayoutTables.of(tables), max_length, response_only
    )
    return dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _attention_pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, *ctx.call = inputs
    _without_gradient(ctx, output[1])
    ctx.save_for_backward(hidden, weight, bias, *output)


def _attention_pool_gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    dhidden, dweight, dbias = _attention_pool_backward(grad, *ctx.saved_tensors, *ctx.call)
    return dhidden, dweight, dbias, _NO_GRADIENT, None, None, None


_attention_pool.register_autograd(_attention_pool_gradients, setup_context=_attention_pool_context)
