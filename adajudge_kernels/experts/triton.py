"""The gated expert combination on Triton kernels: what is launched, in which order, with which scratch memory.

Forward, two launches: `hidden_parts` reads the weights of all four MLPs, once for every `_ROWS` rows, and `combine` does
the rest, a row each. Backward, five: the hidden layers are computed anew by the same `hidden_parts`, `combine_backward`
turns them into gradients of the pre-activations, and three launches form the gradients of the views, of the two large
weights, and of the small ones; each sums in a fixed order. Scratch is fp32, per row the shares of the pre-activations
(``3 h + 4 h_r`` per segment of `_SEGMENT` features) and in the backward ``2 (3 h + h_r) + 6`` more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adajudge_kernels.experts import triton_kernels as kernels
from adajudge_kernels.launches import FUSED, ON_AMD, TRITON_DTYPES, aligned, device_of, parts, power_of_2
from adajudge_kernels.registration import arithmetic_dtype

# How the work is cut: powers of two, the same for all architectures, and nothing that depends on the number of rows, as a
# row's bits must not. A segment of _SEGMENT features times _UNITS hidden units is 128 weights a thread: as many as
# registers hold beside a row's features, all of them on their way at once. A tile of weights serves _ROWS rows, so that
# up to this batch each weight is read once. A piece of _WIDTH features is 16 or 32 lanes that load 16 bytes each.
_SEGMENT, _UNITS, _ROWS, _WIDTH = 1024, 16, 16, 128
_HIDDEN = {"num_warps": 4, **FUSED}
# A combining program's step: units of the three view MLPs, 8 numbers a thread. Left alone, the compiler may spill to
# use fewer registers than it has.
_COMBINED_UNITS = 256
_COMBINED = {"num_warps": 4, **FUSED} | ({} if ON_AMD else {"maxnreg": 192})
# The backward's products, 16 rows at a time as tl.dot has no less. The views' gradients have the fewest programs, 4 a
# block of features at small batches: narrow blocks, many warps, three steps of weights on their way.
_VIEW_PRODUCT = {"ROWS": 16, "UNITS": 32, "WIDTH": 64, "num_warps": 8, "num_stages": 4, **FUSED}
_WEIGHT_PRODUCT = {"ROWS": 16, "UNITS": 64, "WIDTH": 64, "num_warps": 4, **FUSED}
_VECTORS = {"ROWS": 16, "UNITS": 64, "num_warps": 4, **FUSED}


def gated_expert_combination_forward(
    last: Tensor, mean: Tensor, attention: Tensor, prompt: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward ``[B]``, view scores ``[B, 3]`` and view weights ``[B, 3]``."""
    views, weights = _views(last, mean, attention, prompt), [aligned(x) for x in weights]
    acc, batch = arithmetic_dtype(last.dtype), last.shape[0]
    reward = last.new_empty(batch, dtype=acc)
    scores, pi = (last.new_empty(batch, 3, dtype=acc) for _ in range(2))
    if batch:
        with device_of(last):
            shares = _hidden_parts(views, weights)
            kernels.combine[(batch,)](
                shares, *_small(weights), reward, scores, pi, **_combining(shares, weights)
            )
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
    views, weights = _views(last, mean, attention, prompt), [aligned(x) for x in weights]
    acc, (batch, d), (h, h_r) = arithmetic_dtype(last.dtype), last.shape, _widths(weights)
    given = (last, mean, attention, prompt)
    if not batch:
        return [x.new_zeros(x.shape) for x in (*given, *weights)]
    dviews, dweights = [torch.empty_like(x) for x in views], [torch.empty_like(x) for x in weights]
    doutputs = last.new_empty(batch, 6, dtype=acc)
    dhidden, hidden = (last.new_empty(batch, 3 * h + h_r, dtype=acc) for _ in range(2))
    grads = [aligned(x) for x in (grad_reward, grad_scores, grad_pi)]
    sizes = {"H": h, "H_R": h_r, "ACC": TRITON_DTYPES[acc]}
    with device_of(last):
        shares = _hidden_parts(views, weights)
        kernels.combine_backward[(batch,)](
            *grads, shares, *_small(weights), doutputs, dhidden, hidden, **_combining(shares, weights)
        )
        kernels.view_gradients[(parts(batch, _VIEW_PRODUCT["ROWS"]), parts(d, _VIEW_PRODUCT["WIDTH"]), 4)](
            dhidden, weights[0], weights[4], *dviews, batch, D=d, **sizes, **_VIEW_PRODUCT
        )
        tiles = _unit_tiles(weights, _WEIGHT_PRODUCT["UNITS"])
        kernels.weight_gradients[(tiles, parts(d, _WEIGHT_PRODUCT["WIDTH"]))](
            dhidden, *views, dweights[0], dweights[4], batch, D=d, **sizes, **_WEIGHT_PRODUCT
        )
        kernels.vector_gradients[(parts(3 * h + h_r, _VECTORS["UNITS"]) + 1,)](
            doutputs, dhidden, hidden, *_small(dweights), batch, **sizes, **_VECTORS
        )
    return [*(grad.to(x.dtype) for grad, x in zip(dviews, given, strict=True)), *dweights]


def _hidden_parts(views: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Each segment's share of the pre-activations, ``[B, segments, 3 h + 4 h_r]``."""
    (batch, d), (h, h_r) = views[0].shape, _widths(weights)
    segment = max(16, min(_SEGMENT, power_of_2(d)))
    width = min(_WIDTH, segment)
    acc = arithmetic_dtype(views[0].dtype)
    shares = views[0].new_empty(batch, parts(d, segment), 3 * h + 4 * h_r, dtype=acc)
    kernels.hidden_parts[(_unit_tiles(weights, _UNITS) * parts(batch, _ROWS), shares.shape[1])](
        *views,
        weights[0],
        weights[4],
        shares,
        batch,
        D=d,
        H=h,
        H_R=h_r,
        ROWS=_ROWS,
        UNITS=_UNITS,
        PIECES=segment // width,
        WIDTH=width,
        ACC=TRITON_DTYPES[acc],
        **_HIDDEN,
    )
    return shares


def _views(*views: Tensor) -> list[Tensor]:
    """The four views in one dtype, the arithmetic's if they come in several."""
    if len({x.dtype for x in views}) > 1:
        return [aligned(x.to(arithmetic_dtype(x.dtype))) for x in views]
    return [aligned(x) for x in views]


def _small(weights: Sequence[Tensor]) -> list[Tensor]:
    """All but the two large weights."""
    return [*weights[1:4], *weights[5:]]


def _widths(weights: Sequence[Tensor]) -> tuple[int, int]:
    """h and h_r."""
    return weights[0].shape[1], weights[4].shape[0]


def _unit_tiles(weights: Sequence[Tensor], units: int) -> int:
    """Tiles of hidden units of one MLP and one view that it reads: three view MLPs, and the router four times."""
    h, h_r = _widths(weights)
    return 3 * parts(h, units) + 4 * parts(h_r, units)


def _combining(shares: Tensor, weights: Sequence[Tensor]) -> dict[str, Any]:
    h, h_r = _widths(weights)
    return {
        "H": h,
        "H_R": h_r,
        "SEGMENTS": shares.shape[1],
        "UNITS": max(16, min(_COMBINED_UNITS, power_of_2(max(h, h_r)))),
        "ACC": TRITON_DTYPES[shares.dtype],
        **_COMBINED,
    }
