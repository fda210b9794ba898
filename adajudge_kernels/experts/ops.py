"""The public expert combination: checks, operator and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.arguments import check_float, check_like
from adajudge_kernels.registration import arithmetic_dtype, fresh, operator

__all__ = ["CombinedReward", "ExpertWeights", "gated_expert_combination"]


class ExpertWeights(NamedTuple):
    """Weights of the three view MLPs (views in the order last, mean, attention) and of the router."""

    view_in_weight: Tensor  # [3, h, d]
    view_in_bias: Tensor  # [3, h]
    view_out_weight: Tensor  # [3, h]
    view_out_bias: Tensor  # [3]
    router_in_weight: Tensor  # [h_r, 4d]
    router_in_bias: Tensor  # [h_r]
    router_out_weight: Tensor  # [3, h_r]
    router_out_bias: Tensor  # [3]


class CombinedReward(NamedTuple):
    """What `gated_expert_combination` returns, all fp32."""

    reward: Tensor  # [B]
    view_scores: Tensor  # [B, 3]
    view_weights: Tensor  # [B, 3]


def gated_expert_combination(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: ExpertWeights
) -> CombinedReward:
    """Three view scores mixed by the router into one reward (paper, Stage III).

    ``s_v = MLP_v(z_v)``, ``pi = softmax(MLP_r([z_L; z_M; z_A; z_P]))``, ``r = sum_v pi_v s_v``; every MLP is
    Linear -> SiLU -> Linear.

    Args:
        last, mean, attention, prompt: z_L, z_M, z_A, z_P, each ``[B, d]`` fp32, bf16 or fp16.
        weights: `ExpertWeights`, in fp32, bf16 or fp16.

    Returns:
        `CombinedReward`: reward ``[B]``, view scores and view weights ``[B, 3]``, fp32. No sigmoid is applied.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device; it names the argument.
    """
    check_float("last", last, 2, "[B, d]")
    batch, d = last.shape
    for name, view in (("mean", mean), ("attention", attention), ("prompt", prompt)):
        check_like(name, view, (batch, d), last, "last")
    if not isinstance(weights, (tuple, list)) or len(weights) != len(ExpertWeights._fields):
        raise ValueError(f"weights: {type(weights).__name__} came, expected ExpertWeights")
    weights = ExpertWeights(*weights)
    check_float("weights.view_in_weight", weights.view_in_weight, 3, "[3, h, d]")
    check_float("weights.router_in_weight", weights.router_in_weight, 2, "[h_r, 4d]")
    h, h_r = weights.view_in_weight.shape[1], weights.router_in_weight.shape[0]
    shapes = ((3, h, d), (3, h), (3, h), (3,), (h_r, 4 * d), (h_r,), (3, h_r), (3,))
    for name, weight, shape in zip(ExpertWeights._fields, weights, shapes, strict=True):
        check_like(f"weights.{name}", weight, shape, last, "last")
    backend = backends.choose_backend(last.device, "experts").backend
    return CombinedReward(*_experts(last, mean, attention, prompt, list(weights), backend))


def _experts_fake(last: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, batch = arithmetic_dtype(last.dtype), last.shape[0]
    scores, pi = (last.new_empty(batch, 3, dtype=dtype) for _ in range(2))
    return last.new_empty(batch, dtype=dtype), scores, pi


@operator("gated_expert_combination", _experts_fake)
def _experts(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = backends.load("experts", backend)
    return kernels.gated_expert_combination_forward(last, mean, attention, prompt, weights)


def _experts_backward_fake(grads: list[Tensor], views: list[Tensor], *rest: Any) -> list[Tensor]:
    return [fresh(x) for x in (*views, *rest[0])]


@operator("gated_expert_combination_backward", _experts_backward_fake)
def _experts_backward(
    grads: list[Tensor], views: list[Tensor], weights: list[Tensor], backend: str
) -> list[Tensor]:
    return backends.load("experts", backend).gated_expert_combination_backward(*grads, *views, weights)


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *views, weights, ctx.backend = inputs
    ctx.save_for_backward(*views, *weights)


def _experts_gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)  # read once: non-reentrant checkpointing allows no second reading
    gradients = _experts_backward(list(grads), saved[:4], saved[4:], ctx.backend)
    return *gradients[:4], list(gradients[4:]), None


_experts.register_autograd(_experts_gradients, setup_context=_experts_context)
