"""focal_bradley_terry_loss with an entropy floor against the same in plain PyTorch, eager and compiled."""

import functools

import pytest
import torch
import torch.nn.functional as F

import adajudge_kernels as ak
from benchmarks.case import OURS, Case, Side, compiled, copies

GAMMA, FLOOR, WEIGHT = 2.0, 0.9, 0.1


def eager_loss(chosen, rejected, view_weights):
    log_p = F.logsigmoid(chosen - rejected)
    focal = -((1 - log_p.exp()) ** GAMMA) * log_p
    entropy = -(view_weights * view_weights.log()).sum(dim=1)
    return focal.mean() + WEIGHT * (FLOOR - entropy).clamp(min=0).square().mean()


def loss_case(pairs, device, places):
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    leaves = [drawn(pairs), drawn(pairs), torch.softmax(2 * drawn(2 * pairs, 3), dim=1)]

    fused = compiled(eager_loss)

    def ours(chosen, rejected, view_weights):
        return ak.focal_bradley_terry_loss(
            chosen,
            rejected,
            gamma=GAMMA,
            view_weights=view_weights,
            entropy_floor=FLOOR,
            entropy_weight=WEIGHT,
        )

    def exact(backward):
        doubles = [x.double().requires_grad_() for x in leaves]
        return Side(lambda *x: [eager_loss(*x)], [doubles]).outputs(0, backward)

    moved = sum(x.nbytes for x in leaves)
    return Case(
        group=f"loss, {pairs} pairs",
        shape=f"N={pairs}",
        dtype=torch.float32,
        device=device,
        sides={
            OURS: Side(lambda *x: [ours(*x)], copies(leaves, places)),
            "eager": Side(lambda *x: [eager_loss(*x)], copies(leaves, places)),
            "torch.compile": Side(lambda *x: [fused(*x)], copies(leaves, places)),
        },
        exact=exact,
        tokens=2 * pairs,  # sequences
        forward_bytes=moved,
        backward_bytes=2 * moved,
    )


@pytest.mark.parametrize("side", [OURS, "eager", "torch.compile"])
def test_loss(measured, pairs, side, device):
    """Forward and backward: nobody wants the loss alone."""
    measured(functools.partial(loss_case, pairs, device), side, True, family="loss")
