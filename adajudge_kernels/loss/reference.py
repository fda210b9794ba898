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
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scalar loss, and its gradients by chosen, pair_weight and view_weights, in arithmetic precision.

    A mean over no pairs (or no sequences) is zero. A gradient is empty if its argument is None or `gradients` is False;
    rejected's is that of chosen, negated. ``d/dz[-(1-p)^gamma log p] = (1-p)^gamma (gamma p log p - (1-p))``.
    """
    z = _logit(chosen, rejected, temperature)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)
    modulation = torch.exp(gamma * log_q)
    pairs = max(z.numel(), 1)
    w = torch.ones_like(z) if pair_weight is None else upcast(pair_weight)
    loss = (-modulation * log_p * w).sum() / pairs
    dchosen, dpair_weight, dview_weights = (z.new_empty(0) for _ in range(3))
    if gradients:
        dz = modulation * (gamma * torch.exp(log_p) * log_p - torch.exp(log_q))
        dchosen = dz * w / (pairs * temperature)
    if gradients and pair_weight is not None:
        dpair_weight = -modulation * log_p / pairs
    if view_weights is not None:
        pi = upcast(view_weights)
        log_pi, sequences = _log_weights(pi), max(len(pi), 1)
        shortfall = (entropy_floor + (pi * log_pi).sum(dim=1, keepdim=True)).clamp(min=0)
        loss = loss + entropy_weight * (shortfall * shortfall).sum() / sequences
        if gradients:
            dview_weights = entropy_weight * 2 * shortfall * (log_pi + 1) / sequences
    return loss, dchosen, dpair_weight, dview_weights
