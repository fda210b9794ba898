"""The Triton kernel of the focal Bradley-Terry loss: one program, so that the sums have one order and need no second launch.

Arithmetic is in `ACC` (fp32; fp64 for fp64 rewards), right after the load. Names in capitals are known at compile time.
"""

import triton
import triton.language as tl

from adajudge_kernels.rounded import divided


@triton.jit(do_not_specialize=["pairs", "sequences"])
def focal_bradley_terry(
    chosen,
    rejected,
    pair_weight,
    view_weights,
    loss,
    grad_chosen,
    grad_pair_weight,
    grad_view_weights,
    pairs,
    sequences,
    gamma,
    temperature,
    entropy_floor,
    entropy_weight,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
    ACC: tl.constexpr,
):
    """The scalar loss, and its gradients where they are wanted; BLOCK pairs, then BLOCK sequences, at a time.

    ``z = (r+ - r-) / tau``, ``L = mean[-w q^gamma log p] + lambda mean[max(0, eta - H(pi))^2]``, ``p = sigmoid(z)``,
    ``q = 1 - p``; ``dL/dz = w q^gamma (gamma p log p - q) / N``.
    """
    i = tl.arange(0, BLOCK)
    share = divided(1.0, tl.maximum(pairs, 1).to(ACC))
    tau = tl.full((), temperature, ACC)
    slope = divided(share, tau)
    focal = tl.zeros((BLOCK,), ACC)
    for start in range(0, pairs, BLOCK):
        inside = start + i < pairs
        r_chosen = tl.load(chosen + start + i, mask=inside, other=0.0).to(ACC)
        r_rejected = tl.load(rejected + start + i, mask=inside, other=0.0).to(ACC)
        z = divided(r_chosen - r_rejected, tau)
        log_p = _log_sigmoid(z)
        log_q = _log_sigmoid(-z)
        modulation = tl.exp(gamma * log_q)
        value = -modulation * log_p
        if GRADIENTS:
            d_z = slope * modulation * (gamma * tl.exp(log_p) * log_p - tl.exp(log_q))
        if WEIGHTED:
            w = tl.load(pair_weight + start + i, mask=inside, other=0.0).to(ACC)
            if GRADIENTS:
                tl.store(grad_pair_weight + start + i, share * value, mask=inside)
                d_z *= w
            value *= w
        if GRADIENTS:
            tl.store(grad_chosen + start + i, d_z, mask=inside)
        focal += tl.where(inside, value, 0.0)
    total = share * tl.sum(focal)
    if ENTROPY:
        squares = tl.zeros((BLOCK,), ACC)
        scale = divided(tl.full((), entropy_weight, ACC), tl.maximum(sequences, 1).to(ACC))
        for start in range(0, sequences, BLOCK):
            inside = start + i < sequences
            row = (start + i).to(tl.int64) * 3
            shortfall = tl.zeros((BLOCK,), ACC) + entropy_floor
            for v in tl.static_range(3):
                pi = tl.load(view_weights + row + v, mask=inside, other=1.0).to(ACC)
                shortfall += pi * _log_weight(pi, TINY)
            shortfall = tl.where(inside & ~(shortfall < 0), shortfall, 0.0)  # NaN stays NaN
            squares += shortfall * shortfall
            if GRADIENTS:
                for v in tl.static_range(3):
                    pi = tl.load(view_weights + row + v, mask=inside, other=1.0).to(ACC)
                    tl.store(
                        grad_view_weights + row + v,
                        2 * scale * shortfall * (_log_weight(pi, TINY) + 1),
                        mask=inside,
                    )
        total += scale * tl.sum(squares)
    tl.store(loss, total)


@triton.jit
def _log_sigmoid(z):
    """``min(z, 0) - log(1 + e)`` with ``e = exp(-|z|)``: accurate however small e is."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    kept = tl.where(u == 1, 1.0, u - 1)  # of e, which log(u) is of: the rest is made up for
    return tl.minimum(z, 0.0) - tl.where(u == 1, e, tl.log(u) * divided(e, kept))


@triton.jit
def _log_weight(pi, TINY: tl.constexpr):
    """``log pi``, finite where a softmax underflowed to 0: `TINY` stands for what is below it."""
    return tl.log(tl.maximum(pi, TINY))
