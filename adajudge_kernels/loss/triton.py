"""The focal Bradley-Terry loss on a Triton kernel: one launch of one program for the loss and its gradients.

Rewards are few (a training batch has tens of pairs) and the program's loop is fixed, so its sums have one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adajudge_kernels.launches import FUSED, ON_AMD, TRITON_DTYPES, aligned, device_of
from adajudge_kernels.loss import triton_kernels as kernels
from adajudge_kernels.registration import arithmetic_dtype

# Pairs at once: the usual batch is one step. Left alone, the compiler may spill to use fewer registers than it has.
_STEP = {"BLOCK": 1024, "num_warps": 8, **FUSED} | ({} if ON_AMD else {"maxnreg": 128})


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
    """The scalar loss, and its gradients by chosen, pair_weight and view_weights as the reference backend gives them.

    Gamma and the other numbers are fp32 for fp64 rewards too.
    """
    chosen, rejected = aligned(chosen), aligned(rejected)
    pair_weight, view_weights = (None if x is None else aligned(x) for x in (pair_weight, view_weights))
    acc = arithmetic_dtype(chosen.dtype)
    loss = chosen.new_empty((), dtype=acc)
    dchosen, dpair_weight, dview_weights = (
        chosen.new_empty(x.shape if gradients and x is not None else 0, dtype=acc)
        for x in (chosen, pair_weight, view_weights)
    )
    with device_of(chosen):
        kernels.focal_bradley_terry[(1,)](
            chosen,
            rejected,
            chosen if pair_weight is None else pair_weight,
            chosen if view_weights is None else view_weights,
            loss,
            dchosen,
            dpair_weight,
            dview_weights,
            chosen.shape[0],
            0 if view_weights is None else view_weights.shape[0],
            gamma,
            temperature,
            entropy_floor,
            entropy_weight,
            WEIGHTED=pair_weight is not None,
            ENTROPY=view_weights is not None,
            GRADIENTS=gradients,
            TINY=torch.finfo(acc).tiny,
            ACC=TRITON_DTYPES[acc],
            **_STEP,
        )
    return loss, dchosen, dpair_weight, dview_weights
