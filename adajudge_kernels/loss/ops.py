"""The public loss: checks, operator and autograd."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.arguments import check_float, check_like, check_number
from adajudge_kernels.registration import arithmetic_dtype, fresh, operator

__all__ = ["focal_bradley_terry_loss"]

_MOST_ENTROPY = math.log(3) + 1e-6  # of three view weights; ln 3 may come rounded up


def focal_bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    gamma: float = 2.0,
    temperature: float = 1.0,
    pair_weight: Tensor | None = None,
    view_weights: Tensor | None = None,
    entropy_floor: float = 0.5,
    entropy_weight: float = 0.1,
) -> Tensor:
    """Focal Bradley-Terry loss with an entropy floor on the router (the paper's training objective).

    ``p = sigmoid((r+ - r-) / temperature)``,
    ``L = mean[-w (1-p)^gamma log p] + entropy_weight * mean[max(0, entropy_floor - H(pi))^2]``, H in nats.
    Computed from the logit, never from p. ``gamma=0`` without `view_weights` is plain Bradley-Terry.

    Args:
        chosen, rejected: rewards r+ and r-, ``[N]``.
        gamma: focusing exponent, at least 0.
        temperature: tau_bt, above 0.
        pair_weight: w, ``[N]``, not negative (not checked: that would wait for the device); default all ones. The
            mean divides by N, not by the sum of w.
        view_weights: pi of every sequence on both sides, ``[N', 3]``; default: no entropy term.
        entropy_floor: eta in nats, at most ln 3, which is the entropy of three equal weights.
        entropy_weight: lambda, at least 0.

    Returns:
        A scalar, fp32. Zero for no pairs.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it names the argument.
    """
    check_float("chosen", chosen, 1, "[N]")
    check_like("rejected", rejected, tuple(chosen.shape), chosen, "chosen")
    if pair_weight is not None:
        check_like("pair_weight", pair_weight, tuple(chosen.shape), chosen, "chosen")
    if view_weights is not None:
        check_float("view_weights", view_weights, 2, "[N', 3]")
        check_like("view_weights", view_weights, (view_weights.shape[0], 3), chosen, "chosen")
    check_number("gamma", gamma, 0.0)
    check_number("temperature", temperature, 0.0, inclusive=False)
    check_number("entropy_floor", entropy_floor, 0.0)
    check_number("entropy_weight", entropy_weight, 0.0)
    if entropy_floor > _MOST_ENTROPY:
        raise ValueError(
            f"entropy_floor: {entropy_floor} came, expected at most ln 3 = {math.log(3):.4f} nats"
        )
    numbers = [float(x) for x in (gamma, temperature, entropy_floor, entropy_weight)]
    backend = backends.choose_backend(chosen.device, "loss").backend
    return _loss(chosen, rejected, pair_weight, view_weights, *numbers, backend)


def _loss_fake(chosen: Tensor, *_: Any) -> Tensor:
    return chosen.new_empty((), dtype=arithmetic_dtype(chosen.dtype))


@operator("focal_bradley_terry_loss", _loss_fake)
def _loss(
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    gamma: float,
    temperature: float,
    entropy_floor: float,
    entropy_weight: float,
    backend: str,
) -> Tensor:
    return backends.load("loss", backend).focal_bradley_terry_loss_forward(
        chosen, rejected, pair_weight, view_weights, gamma, temperature, entropy_floor, entropy_weight
    )


def _loss_backward_fake(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = arithmetic_dtype(chosen.dtype)
    optional = [
        chosen.new_empty(0, dtype=dtype) if x is None else fresh(x) for x in (pair_weight, view_weights)
    ]
    return fresh(chosen), fresh(rejected), optional[0], optional[1]


@operator("focal_bradley_terry_loss_backward", _loss_backward_fake)
def _loss_backward(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    gamma: float,
    temperature: float,
    entropy_floor: float,
    entropy_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load("loss", backend).focal_bradley_terry_loss_backward(
        grad, chosen, rejected, pair_weight, view_weights, gamma, temperature, entropy_floor, entropy_weight
    )


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, gamma, temperature, floor, weight, ctx.backend = inputs
    ctx.numbers = (gamma, temperature, floor, weight)
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*[x for x in tensors if x is not None])


def _loss_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if present else None for present in ctx.present]
    gradients = _loss_backward(grad, *tensors, *ctx.numbers, ctx.backend)
    wanted = [g if present else None for g, present in zip(gradients, ctx.present, strict=True)]
    return *wanted, None, None, None, None, None


_loss.register_autograd(_loss_gradients, setup_context=_loss_context)
