"""Plain PyTorch focal Bradley-Terry loss with an entropy floor, computed from the logit.

``z = (r+ - r-) / tau``, ``L = mean[-w (1-p)^gamma log p] + lambda mean[max(0, eta - H(pi))^2]``, ``p = sigmoid(z)``.
With ``log p = logsigmoid(z)`` and ``log(1-p) = logsigmoid(-z)`` nothing overflows or cancels, however large z is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adajudge_kernels.ordered import upcast


def _logit(chosen: Tensor, rejected: Tensor, temperature: float) -> Tensor:
    return (upcast(chosen) - upcast(rejected)) / temperature


def _log_weights(view_weights: Tensor) -> Tensor:
    """``log pi``, finite where a softmax underflowed to 0 (its gradient is then multiplied by that 0)."""
    return torch.log(view_weights.clamp(min=torch.finfo(view_weights.dtype).tiny))


def focal_bradley_terry_loss_forward(
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    gamma: float,
    temperature: float,
    entropy_floor: float,
    entropy_weight: float,
) -> Tensor:
    """The scalar loss; a mean over no pairs (or no sequences) is zero."""
    z = _logit(chosen, rejected, temperature)
    focal = -torch.exp(gamma * F.logsigmoid(-z)) * F.logsigmoid(z)
    if pair_weight is not None:
        focal = focal * upcast(pair_weight)
    loss = focal.sum() / max(focal.numel(), 1)
    if view_weights is not None:
        pi = upcast(view_weights)
        entropy = -(pi * _log_weights(pi)).sum(dim=1)
        shortfall = (entropy_floor - entropy).clamp(min=0)
        loss = loss + entropy_weight * (shortfall * shortfall).sum() / max(shortfall.numel(), 1)
    return loss


def focal_bradley_terry_loss_backward(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    pair_weight: Tensor | None,
    view_weights: Tensor | None,
    gamma: float,
    temperature: float,
    entropy_floor: float,
    entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of chosen, rejected, pair_weight and view_weights (empty for an argument that is None).

    ``d/dz[-(1-p)^gamma log p] = (1-p)^gamma (gamma p log p - (1-p))``.
    """
    z = _logit(chosen, rejected, temperature)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)
    modulation = torch.exp(gamma * log_q)
    scale = grad / max(z.numel(), 1)
    dz = modulation * (gamma * torch.exp(log_p) * log_p - torch.exp(log_q)) * scale / temperature
    dpair_weight = z.new_zeros(0)
    if pair_weight is not None:
        dz = dz * upcast(pair_weight)
        dpair_weight = (-modulation * log_p * scale).to(pair_weight.dtype)
    dview_weights = z.new_zeros(0)
    if view_weights is not None:
        pi = upcast(view_weights)
        log_pi = _log_weights(pi)
        shortfall = (entropy_floor + (pi * log_pi).sum(dim=1, keepdim=True)).clamp(min=0)
        dview_weights = grad * entropy_weight * 2 * shortfall * (log_pi + 1) / max(len(pi), 1)
        dview_weights = dview_weights.to(view_weights.dtype)
    return dz.to(chosen.dtype), (-dz).to(rejected.dtype), dpair_weight, dview_weights
