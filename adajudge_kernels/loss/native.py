"""The focal Bradley-Terry loss on the compiled kernels: outputs made here, everything else in `csrc/`."""

from __future__ import annotations

from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.registration import arithmetic_dtype


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
    """The scalar loss, and its gradients by chosen, pair_weight and view_weights as the reference backend gives them."""
    acc = arithmetic_dtype(chosen.dtype)
    loss = chosen.new_empty((), dtype=acc)
    given = chosen, pair_weight, view_weights
    wanted = [gradients and x is not None for x in given]
    dchosen, dpair_weight, dview_weights = (
        chosen.new_empty(x.shape if want and x is not None else 0, dtype=acc)
        for x, want in zip(given, wanted, strict=True)
    )
    compiled.run(
        "loss",
        loss,
        gamma,
        temperature,
        entropy_floor,
        entropy_weight,
        chosen,
        rejected,
        pair_weight,
        view_weights,
        loss,
        *(
            x if want else None
            for x, want in zip((dchosen, dpair_weight, dview_weights), wanted, strict=True)
        ),
    )
    return loss, dchosen, dpair_weight, dview_weights
