"""The gated expert combination on the compiled kernels: outputs made here, everything else in `csrc/`.

The two large weights are read in their own dtypes.
"""

from __future__ import annotations

from torch import Tensor

from adajudge_kernels import compiled
from adajudge_kernels.registration import arithmetic_dtype

_LARGE = (0, 4)  # of the eight weights: view_in_weight, router_in_weight


def gated_expert_combination_forward(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward ``[B]``, view scores ``[B, 3]`` and view weights ``[B, 3]``."""
    acc, batch = arithmetic_dtype(last.dtype), last.shape[0]
    reward = last.new_empty(batch, dtype=acc)
    scores, pi = (last.new_empty(batch, 3, dtype=acc) for _ in range(2))
    compiled.run("experts", reward, [last, mean, attention, prompt], weights, reward, scores, pi)
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
    acc, views = arithmetic_dtype(last.dtype), [last, mean, attention, prompt]
    grads = grad_reward, grad_scores, grad_pi
    dviews = [x.new_empty(x.shape, dtype=acc) for x in views]
    dweights = [x.new_empty(x.shape, dtype=x.dtype if i in _LARGE else acc) for i, x in enumerate(weights)]
    compiled.run("experts_backward", last, views, weights, *grads, dviews, dweights)
    return [grad.to(x.dtype) for grad, x in zip([*dviews, *dweights], [*views, *weights], strict=True)]
