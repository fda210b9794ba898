"""Plain PyTorch gated expert combination: the definition of correct (Stage III).

``s_v = MLP_v(z_v)``, ``pi = softmax(MLP_r([z_L; z_M; z_A; z_P]))``, ``r = sum_v pi_v s_v``. The forward uses
`ordered.linear`, so that a sequence's reward has the same bits in any batch; the backward uses matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adajudge_kernels.ordered import linear, silu, silu_derivative, sum_features, upcast


def _hidden(
    views: list[Tensor], router_input: Tensor, weights: list[Tensor]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Pre-activations of the three view MLPs and the router, and the weights in arithmetic precision."""
    w = [upcast(weight) for weight in weights]
    view_in_weight, view_in_bias, _, _, router_in_weight, router_in_bias, _, _ = w
    pre = [linear(view, view_in_weight[v]) + view_in_bias[v] for v, view in enumerate(views)]
    return pre, linear(router_input, router_in_weight) + router_in_bias, w


class _Evaluation(NamedTuple):
    view_pre: list[Tensor]  # 3 x [B, h]
    router_pre: Tensor  # [B, h_r]
    scores: Tensor  # [B, 3]
    pi: Tensor  # [B, 3]
    weights: list[Tensor]


def _evaluate(views: list[Tensor], router_input: Tensor, weights: list[Tensor]) -> _Evaluation:
    view_pre, router_pre, w = _hidden(views, router_input, weights)
    _, _, view_out_weight, view_out_bias, _, _, router_out_weight, router_out_bias = w
    scores = [sum_features(silu(pre) * view_out_weight[v]) for v, pre in enumerate(view_pre)]
    logits = sum_features(silu(router_pre).unsqueeze(1) * router_out_weight) + router_out_bias
    exponentials = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    pi = exponentials / sum_features(exponentials).unsqueeze(1)
    return _Evaluation(view_pre, router_pre, torch.stack(scores, dim=1) + view_out_bias, pi, w)


def gated_expert_combination_forward(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward ``[B]``, view scores ``[B, 3]`` and view weights ``[B, 3]``."""
    views = [upcast(z) for z in (last, mean, attention, prompt)]
    out = _evaluate(views[:3], torch.cat(views, dim=1), weights)
    return sum_features(out.pi * out.scores), out.scores, out.pi


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
    views = [upcast(z) for z in (last, mean, attention, prompt)]
    router_input = torch.cat(views, dim=1)
    view_pre, router_pre, scores, pi, w = _evaluate(views[:3], router_input, weights)
    view_in_weight, _, view_out_weight, _, router_in_weight, _, router_out_weight, _ = w

    dscores = grad_reward[:, None] * pi + grad_scores  # r = sum_v pi_v s_v
    dpi = grad_reward[:, None] * scores + grad_pi
    dlogits = pi * (dpi - (pi * dpi).sum(dim=1, keepdim=True))

    drouter_pre = dlogits @ router_out_weight * silu_derivative(router_pre)
    dinput = drouter_pre @ router_in_weight
    dviews = list(dinput.chunk(4, dim=1))
    dview_pre = [dscores[:, v, None] * view_out_weight[v] * silu_derivative(view_pre[v]) for v in range(3)]
    for v in range(3):
        dviews[v] = dviews[v] + dview_pre[v] @ view_in_weight[v]
    dweights = [
        torch.stack([dview_pre[v].mT @ views[v] for v in range(3)]),
        torch.stack([pre.sum(dim=0) for pre in dview_pre]),
        torch.stack([(dscores[:, v, None] * silu(view_pre[v])).sum(dim=0) for v in range(3)]),
        dscores.sum(dim=0),
        drouter_pre.mT @ router_input,
        drouter_pre.sum(dim=0),
        dlogits.mT @ silu(router_pre),
        dlogits.sum(dim=0),
    ]
    given = [last, mean, attention, prompt, *weights]
    return [grad.to(x.dtype).contiguous() for grad, x in zip([*dviews, *dweights], given, strict=True)]
