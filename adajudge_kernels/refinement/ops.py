"""The refinement block's pieces: checks, operators and autograd. Matrix products stay with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.arguments import (
    MAX_FEATURES,
    check_choice,
    check_float,
    check_layout,
    check_like,
    check_number,
    check_shape,
)
from adajudge_kernels.layout import SequenceLayout
from adajudge_kernels.refinement.libraries import OWN, attend, choose_attention
from adajudge_kernels.registration import arithmetic_dtype, fresh, operator
from adajudge_kernels.tables import AttentionTables

__all__ = ["residual_rms_norm", "sequence_attention", "swiglu"]

MAX_HEAD_SIZE = 256


def _kernels(backend: str) -> Any:
    return backends.load("refinement", backend)


def _backend(x: Tensor) -> str:
    return backends.choose_backend(x.device, "refinement").backend


def residual_rms_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual addition and normalisation: ``u = x + update``, ``u / sqrt(mean(u^2) + eps) * weight``.

    Args:
        x: the residual stream, ``[T, d]`` fp32, bf16 or fp16.
        update: what a sublayer adds to it, as x, or None for nothing.
        weight: ``[d]``.
        eps: added to the mean square, not negative.

    Returns:
        ``(u, RMSNorm(u))``, both ``[T, d]`` in the dtype of x; arithmetic in fp32. Without an update u is x itself.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    check_float("x", x, 2, "[T, d]")
    if not 1 <= x.shape[1] <= MAX_FEATURES:
        raise ValueError(f"x: {x.shape[1]} features came, expected 1 to {MAX_FEATURES}")
    check_like("weight", weight, (x.shape[1],), x, "x")
    check_number("eps", eps, 0.0)
    if update is None:
        return x, _rms_norm(x, weight, eps, _backend(x))
    check_like("update", update, x.shape, x, "x")
    if update.dtype != x.dtype:
        raise ValueError(f"update: dtype {update.dtype} came, expected {x.dtype} as x")
    return _residual_rms_norm(x, update, weight, eps, _backend(x))


def _rms_norm_fake(x: Tensor, *_: Any) -> Tensor:
    return fresh(x)


@operator("rms_norm", _rms_norm_fake)
def _rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return _kernels(backend).residual_rms_norm_forward(x, None, weight, eps)[1]


def _residual_rms_norm_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fresh(x), fresh(x)


@operator("residual_rms_norm", _residual_rms_norm_fake)
def _residual_rms_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).residual_rms_norm_forward(x, update, weight, eps)


def _rms_norm_backward_fake(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return fresh(total), fresh(weight)


@operator("rms_norm_backward", _rms_norm_backward_fake)
def _rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtotal, dweight = _kernels(backend).residual_rms_norm_backward(
        grad_total, grad_normed, total, weight, eps
    )
    return dtotal, dweight.to(weight.dtype)


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.call = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dx, dweight = _rms_norm_backward(None, grad, *ctx.saved_tensors, *ctx.call)
    return dx, dweight, None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_context)


def _residual_rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, *ctx.call = inputs
    ctx.save_for_backward(output[0], weight)


def _residual_rms_norm_gradients(ctx: Any, grad_total: Tensor, grad_normed: Tensor) -> tuple[Any, ...]:
    dtotal, dweight = _rms_norm_backward(grad_total, grad_normed, *ctx.saved_tensors, *ctx.call)
    return dtotal, dtotal, dweight, None, None


_residual_rms_norm.register_autograd(_residual_rms_norm_gradients, setup_context=_residual_rms_norm_context)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the merged projection ``[T, 2f]``, gate first: ``[T, f]`` in its dtype.

    Raises:
        ValueError: not a floating point tensor of that shape.
    """
    check_float("gate_up", gate_up, 2, "[T, 2f]")
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up: shape {tuple(gate_up.shape)} came, expected [T, 2f], an even last dimension"
        )
    return _swiglu(gate_up, _backend(gate_up))


def _swiglu_fake(gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@operator("swiglu", _swiglu_fake)
def _swiglu(gate_up: Tensor, backend: str) -> Tensor:
    return _kernels(backend).swiglu_forward(gate_up)


def _swiglu_backward_fake(grad: Tensor, gate_up: Tensor, *_: Any) -> Tensor:
    return fresh(gate_up)


@operator("swiglu_backward", _swiglu_backward_fake)
def _swiglu_backward(grad: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return _kernels(backend).swiglu_backward(grad, gate_up)


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _swiglu_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _swiglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


_swiglu.register_autograd(_swiglu_gradients, setup_context=_swiglu_context)


def sequence_attention(
    projections: Sequence[Tensor],
    layout: SequenceLayout,
    causal: bool = True,
    scale: float | None = None,
    queries: str = "all",
) -> Tensor:
    """Softmax attention inside each sequence: ``softmax(scale Q K^T) V`` over the prompt, then the own response.

    Prompts that candidates share are read where they lie; their tokens' gradients are summed over the candidates in
    order. There is no mask over the batch, and nothing of the size of the scores is written.

    Args:
        projections: query ``[N, H, e]``, key and value ``[T, J, e]`` with H a multiple of J (grouped-query heads) and e
            at most 256; as ``[query, key, value]``, as ``[query, key_value [T, 2, J, e]]`` or, with H = J, merged as
            ``[qkv [T, 3, H, e]]``.
        layout: where the tokens of each sequence lie; prompt-shared only with `causal`.
        causal: whether a token sees only itself and what is before it in its sequence.
        scale: of the scores; default ``1 / sqrt(e)``.
        queries: which tokens have a row in the query: ``"all"`` T slots, or in their order the ``"response"`` tokens.

    Returns:
        ``[N, H, e]`` in the dtype of query; zero at padding.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; bidirectional attention over a prompt-shared
            layout, where a prompt's states would depend on which candidate reads them.
    """
    check_layout(layout)
    check_choice("queries", queries, ("all", "response"))
    tables = layout.attention if queries == "all" else layout.response_attention
    assert tables is not None  # as check_layout says
    _check_projections(projections, layout, layout.num_tokens if queries == "all" else tables.rows.shape[0])
    if layout.shares_prompts and not causal:
        raise ValueError(
            "causal=False came with a prompt-shared layout: the prompt would see its candidates' responses; "
            "expected causal attention, or a packed or padded layout"
        )
    if scale is None:
        scale = int(projections[0].shape[-1]) ** -0.5
    check_number("scale", scale, 0.0, inclusive=False)
    query, key, value = _split(projections)
    chosen = choose_attention(query, layout, queries).backend
    if chosen != OWN:
        return attend(chosen, query, key, value, layout, causal, scale)
    padded = layout.kept is not None
    out, _ = _sequence_attention(list(projections), tables, causal, scale, padded, _backend(projections[0]))
    return out


def _check_projections(projections: Sequence[Tensor], layout: SequenceLayout, num_queries: int) -> None:
    names = {1: ("qkv",), 2: ("query", "key_value"), 3: ("query", "key", "value")}
    if not isinstance(projections, (list, tuple)) or len(projections) not in names:
        came = len(projections) if isinstance(projections, (list, tuple)) else type(projections).__name__
        raise ValueError(
            f"projections: {came} came, expected a list of qkv, of query and key_value, or of query, key and value"
        )
    tokens = layout.num_tokens
    first, name = projections[0], names[len(projections)][0]
    if len(projections) == 1:
        check_float(name, first, 4, "[T, 3, H, e]")
        check_shape(name, first, (tokens, 3, *first.shape[2:]))
        if num_queries != tokens:
            raise ValueError(
                f"qkv: {tokens} rows came with queries='response', expected query and key_value apart, the query of "
                f"{num_queries} rows"
            )
    else:
        check_float(name, first, 3, "[N, H, e]")
    if first.shape[0] != num_queries:
        raise ValueError(f"{name}: {first.shape[0]} rows came, expected {num_queries} for this layout")
    if first.device != layout.device:
        raise ValueError(
            f"{name}: on {first.device}, but the layout is on {layout.device}; use layout.to(..)"
        )
    heads, size = first.shape[-2:]
    if heads < 1:
        raise ValueError(f"{name}: {heads} heads came, expected at least one")
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"{name}: heads of {size} features came, expected 1 to {MAX_HEAD_SIZE}")
    for other_name, other in zip(names[len(projections)][1:], projections[1:], strict=True):
        form = (tokens, 2) if other_name == "key_value" else (tokens,)
        check_float(other_name, other, len(form) + 2, f"[T, {'2, ' * (len(form) - 1)}J, e]")
        check_like(other_name, other, (*form, projections[1].shape[-2], size), first, name)
        if other.dtype != first.dtype:
            raise ValueError(f"{other_name}: dtype {other.dtype} came, expected {first.dtype} as {name}")
        if other.shape[-2] < 1 or heads % other.shape[-2]:
            raise ValueError(
                f"{other_name}: {other.shape[-2]} heads came, expected a divisor of the {heads} query heads"
            )


def _split(projections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Query, key and value, whichever of them came merged."""
    return tuple(part for x in projections for part in (x.unbind(1) if x.dim() == 4 else (x,)))


def _sequence_attention_fake(
    projections: list[Tensor],
    tables: list[Tensor],
    causal: bool,
    scale: float,
    padded: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    query, *_ = _split(projections)
    kept = (query.shape[1], query.shape[0]) if backend == "triton" else (0,)
    return fresh(query), query.new_empty(kept, dtype=arithmetic_dtype(query.dtype))


@operator("sequence_attention", _sequence_attention_fake)
def _sequence_attention(
    projections: list[Tensor],
    tables: list[Tensor],
    causal: bool,
    scale: float,
    padded: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).sequence_attention_forward(
        *_split(projections), AttentionTables(*tables), causal, scale, padded
    )


def _sequence_attention_backward_fake(
    grad: Tensor, out: Tensor, log_sum_exp: Tensor, projections: list[Tensor], *_: Any
) -> list[Tensor]:
    return [fresh(x) for x in projections]


@operator("sequence_attention_backward", _sequence_attention_backward_fake)
def _sequence_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    projections: list[Tensor],
    tables: list[Tensor],
    causal: bool,
    scale: float,
    padded: bool,
    backend: str,
) -> list[Tensor]:
    gradients = [
        (torch.zeros if padded else torch.empty)(x.shape, dtype=x.dtype, device=x.device) for x in projections
    ]
    _kernels(backend).sequence_attention_backward(
        grad,
        out,
        log_sum_exp,
        *_split(projections),
        *_split(gradients),
        AttentionTables(*tables),
        causal,
        scale,
    )
    return gradients


def _sequence_attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    projections, *ctx.call = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *projections)


def _sequence_attention_gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Any, ...]:
    out, log_sum_exp, *projections = ctx.saved_tensors
    gradients = _sequence_attention_backward(grad, out, log_sum_exp, projections, *ctx.call)
    return gradients, [None] * len(AttentionTables._fields), None, None, None, None


_sequence_attention.register_autograd(
    _sequence_attention_gradients, setup_context=_sequence_attention_context
)
