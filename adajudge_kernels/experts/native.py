"""The gated expert combination on the compiled kernels: outputs made here, everything else in `csrc/`.

The two large weights are read in their own dtypes; views come in the precision of the arithmetic, small weights as
`compiled.small` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.compiled import address, as_arithmetic, contiguous, dtype_code, small, stored
from adajudge_kernels.registration import arithmetic_dtype

_LARGE = (0, 4)  # of the eight weights: view_in_weight, router_in_weight


def gated_expert_combination_forward(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward ``[B]``, view scores ``[B, 3]`` and view weights ``[B, 3]``."""
    acc, batch = arithmetic_dtype(last.dtype), last.shape[0]
    reward = last.new_empty(batch, dtype=acc)
    scores, pi = (last.new_empty(batch, 3, dtype=acc) for _ in range(2))
    views, weights = _read([last, mean, attention, prompt], weights, acc)
    compiled.run("experts", reward, _call(views, weights, [reward, scores, pi]))
    return reward, scores, pi


def gated_expert_combination_backward(
    grad_reward: Tensor,
    grad_scores: Tensor,
    grad_pi: Tensor,
    last: Tensor,
    mean: Tensor,
    attention: Tensor,
    prompt: Tensor,
    weights: list[Tensor],
) -> list[Tensor]:
    """Gradients of the four views and the eight weights, hidden layers recomputed from the views."""
    acc, given = arithmetic_dtype(last.dtype), [last, mean, attention, prompt, *weights]
    views, weights = _read(given[:4], weights, acc)
    grads = [as_arithmetic(x, acc) for x in (grad_reward, grad_scores, grad_pi)]
    dviews = [torch.empty_like(x) for x in views]
    dweights = [
        torch.empty_like(x) if i in _LARGE else x.new_empty(x.shape, dtype=acc) for i, x in enumerate(weights)
    ]
    compiled.run(
        "experts_backward",
        views[0],
        _call(views, weights, None),
        [address(x) for x in grads],
        [address(x) for x in dviews],
        *(address(dweights[i]) for i in _LARGE),
        [address(x) for x in _small(dweights)],
    )
    return [grad.to(x.dtype) for grad, x in zip([*dviews, *dweights], given, strict=True)]


def _read(views: list[Tensor], weights: list[Tensor], acc: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Views and weights as the kernels read them."""
    return [as_arithmetic(x, acc) for x in views], [
        contiguous(x) if i in _LARGE else small(x, acc) for i, x in enumerate(weights)
    ]


def _call(views: list[Tensor], weights: list[Tensor], outputs: list[Tensor] | None) -> Any:
    """The module's description of a call; the tensors must outlive it."""
    view_in, router_in = (weights[i] for i in _LARGE)
    return compiled.module.Experts(
        views[0].dtype == torch.float64,
        *views[0].shape,
        view_in.shape[1],
        router_in.shape[0],
        [address(x) for x in views],
        dtype_code(view_in.dtype),
        address(view_in),
        dtype_code(router_in.dtype),
        address(router_in),
        [stored(x) for x in _small(weights)],
        [0, 0, 0] if outputs is None else [address(x) for x in outputs],
    )


def _small(weights: list[Tensor]) -> list[Tensor]:
    """All but the two large weights."""
    return [x for i, x in enumerate(weights) if i not in _LARGE]
