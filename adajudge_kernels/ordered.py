"""Sums whose order of additions is fixed, for results that do not depend on the batch.

``torch.sum`` and matrix products choose their order by shape, thread count and alignment; elementwise additions
have none to choose. Folding a tensor pair by pair leaves only those.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = 64  # a multiple of every vector width
_HELD = 1 << 18  # partial sums at once


def upcast(x: Tensor) -> Tensor:
    """To the precision arithmetic is done in: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def sum_tokens(x: Tensor) -> Tensor:
    """``[B, L, ...] -> [B, ...]``, neighbours first: zeros behind a sequence's end do not change its tree."""
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0] if x.shape[1] else x.new_zeros(x.shape[0], *x.shape[2:])


def sum_features(x: Tensor) -> Tensor:
    """``[..., n] -> [...]``, halves first (contiguous rows; n does not depend on the batch)."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., 2 * half :]], dim=-1) if x.shape[-1] % 2 else folded
    return x[..., 0] if x.shape[-1] else x.new_zeros(x.shape[:-1])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``: ``[B, n], [m, n] -> [B, m]``, each row's bits independent of the other rows."""
    # What is summed up stays in the cache.
    rows = max(1, _HELD // (weight.shape[0] * min(_LANES, x.shape[1])))
    return torch.cat([_linear(part, weight) for part in x.split(rows)])


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Partial sums run down `_LANES` columns at a time, then across the lanes."""
    rows, n = x.shape
    lanes = x.new_zeros(rows, weight.shape[0], min(_LANES, n))
    for begin in range(0, n, _LANES):
        columns = slice(begin, begin + _LANES)
        product = x[:, None, columns] * weight[None, :, columns]
        if product.shape[-1] == lanes.shape[-1]:
            lanes += product
        else:
            lanes[..., : product.shape[-1]] += product
    return sum_features(lanes)


def silu(x: Tensor) -> Tensor:
    """``x / (1 + exp(-x))``. torch's own differs by a bit between its vector body and its scalar tail.

    Written with ``exp(-|x|)``, so that nothing overflows.
    """
    small = torch.exp(-x.abs())
    return x * torch.where(x >= 0, 1, small) / (1 + small)


def silu_derivative(x: Tensor) -> Tensor:
    """``sigma(x) (1 + x (1 - sigma(x)))``."""
    sigma = 1 / (1 + torch.exp(-x))
    return sigma * (1 + x * (1 - sigma))
