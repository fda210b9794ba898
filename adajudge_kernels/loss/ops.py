"""The public loss: checks, operator and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
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

    Under ``torch.compile`` the numbers are constants: one that follows a schedule compiles anew at each value, so keep that
    loss outside the compiled function (it is one launch).

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
    tensors = chosen, rejected, pair_weight, view_weights
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    backend = backends.choose_backend(chosen.device, "loss").backend
    return _loss(*tensors, *numbers, gradients, backend)[0]


def _loss_fake(
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    gamma: float,
    temperature: float,
    entropy_floor: float,
    entropy_weight: float,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = arithmetic_dtype(chosen.dtype)
    shapes = [x.shape if gradients and x is not None else (0,) for x in (chosen, pair_weight, view_weights)]
    dchosen, dpair_weight, dview_weights = (chosen.new_empty(shape, dtype=dtype) for shape in shapes)
    return chosen.new_empty((), dtype=dtype), dchosen, dpair_weight, dview_weights


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
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; if `gradients`, also its gradients by chosen, pair_weight and view_weights, for which all is at hand."""
    return backends.load("loss", backend).focal_bradley_terry_loss_forward(
        chosen,
        rejected,
        pair_weight,
        view_weights,
        gamma,
        temperature,
        entropy_floor,
        entropy_weight,
        gradients,
    )


def _loss_backward_fake(
    grad: Tensor, gradients: list[Tensor], inputs: list[Tensor], backend: str
) -> list[Tensor]:
    return [fresh(x) for x in inputs]


@operator("focal_bradley_terry_loss_backward", _loss_backward_fake)
def _loss_backward(grad: Tensor, gradients: list[Tensor], inputs: list[Tensor], backend: str) -> list[Tensor]:
    """Gradients of `inputs` (chosen, rejected and what else there was), in their dtypes: the forward's times `grad`.

    The inputs' values are not read; through them autograd sees that there is a second derivative to refuse.
    """
    dchosen, *others = (grad * x for x in gradients)
    return [x.to(y.dtype) for x, y in zip((dchosen, -dchosen, *others), inputs, strict=True)]


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*output[1:], *(x for x in tensors if x is not None))


def _loss_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    dchosen, dpair_weight, dview_weights, *inputs = ctx.saved_tensors
    optional = zip((dpair_weight, dview_weights), ctx.present[2:], strict=True)
    unscaled = [dchosen, *(x for x, present in optional if present)]
    gradients = iter(_loss_backward(grad, unscaled, inputs, ctx.backend))
    return *(next(gradients) if present else None for present in ctx.present), *[None] * 6


_loss.register_autograd(_loss_gradients, setup_context=_loss_context)
