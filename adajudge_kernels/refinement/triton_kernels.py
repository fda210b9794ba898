"""Triton kernels of a refinement block's norm and SwiGLU.

A program takes TOKENS rows at a time, the whole row at once, in `ACC` (fp32; fp64 for fp64 states) right after the load: a
row's bits depend on nothing else. Names: ``[T, D]`` states with contiguous rows; offsets of elements are int64.
"""

import triton
import triton.language as tl

from adajudge_kernels.rounded import divided


@triton.jit(do_not_specialize=["count"])
def residual_rms_norm(
    x,
    update,
    weight,
    total_out,
    normed_out,
    eps,
    count,
    D: tl.constexpr,
    UPDATE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``u = x + update``, rounded to the states' dtype, and of that ``u / sqrt(mean(u^2) + eps) * weight``. Grid (tiles of
    tokens,)."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    places = row[:, None] * D + columns[None, :]
    mask = (row < count)[:, None] & inside[None, :]
    u = tl.load(x + places, mask=mask, other=0.0).to(ACC)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
    if UPDATE:
        u += tl.load(update + places, mask=mask, other=0.0).to(ACC)
        u = u.to(total_out.dtype.element_ty)
        tl.store(total_out + places, u, mask=mask)
        u = u.to(ACC)
    inverse = tl.rsqrt(tl.sum(u * u, axis=1) * (1.0 / D) + eps)
    normed = u * inverse[:, None] * w[None, :]
    tl.store(normed_out + places, normed.to(normed_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def residual_rms_norm_backward(
    grad_total,
    grad_normed,
    total,
    weight,
    grad_out,
    grad_weight_parts,
    eps,
    count,
    D: tl.constexpr,
    UPDATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``du = (h - n mean(h n)) / rms(u) + g_u`` with ``n = u / rms(u)``, ``h = weight g``, and a chunk's part of
    ``dweight = sum g n``. Grid (chunks of tokens,)."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
    d_weight = tl.zeros((BLOCK,), ACC)
    for step in range(0, CHUNK, TOKENS):
        row = chunk * CHUNK + step + tl.arange(0, TOKENS)
        places = row[:, None] * D + columns[None, :]
        mask = (row < count)[:, None] & inside[None, :]
        u = tl.load(total + places, mask=mask, other=0.0).to(ACC)
        g = tl.load(grad_normed + places, mask=mask, other=0.0).to(ACC)
        inverse = tl.rsqrt(tl.sum(u * u, axis=1) * (1.0 / D) + eps)
        n = u * inverse[:, None]
        d_weight += tl.sum(g * n, axis=0)
        h = g * w[None, :]
        du = (h - n * (tl.sum(h * n, axis=1) * (1.0 / D))[:, None]) * inverse[:, None]
        if UPDATE:
            du += tl.load(grad_total + places, mask=mask, other=0.0).to(ACC)
        tl.store(grad_out + places, du.to(grad_out.dtype.element_ty), mask=mask)
    tl.store(grad_weight_parts + chunk * D + columns, d_weight, mask=inside)


@triton.jit(do_not_specialize=["count"])
def wide_rms_norm_backward(
    grad_total,
    grad_normed,
    total,
    weight,
    grad_out,
    grad_weight_parts,
    eps,
    count,
    D: tl.constexpr,
    UPDATE: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """As `residual_rms_norm_backward`, for rows that do not fit in registers: each is read twice, the second time from the
    cache, and a chunk's part of dweight is summed in its place, which no other program touches."""
    chunk = tl.program_id(0).to(tl.int64)
    for step in range(0, CHUNK, TOKENS):
        row = chunk * CHUNK + step + tl.arange(0, TOKENS)
        squares = tl.zeros((TOKENS,), ACC)
        products = tl.zeros((TOKENS,), ACC)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            places = row[:, None] * D + columns[None, :]
            mask = (row < count)[:, None] & (columns < D)[None, :]
            u = tl.load(total + places, mask=mask, other=0.0).to(ACC)
            g = tl.load(grad_normed + places, mask=mask, other=0.0).to(ACC)
            w = tl.load(weight + columns, mask=columns < D, other=0.0).to(ACC)
            squares += tl.sum(u * u, axis=1)
            products += tl.sum(g * w[None, :] * u, axis=1)
        inverse = tl.rsqrt(squares * (1.0 / D) + eps)
        mean = products * inverse * (1.0 / D)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            places = row[:, None] * D + columns[None, :]
            mask = (row < count)[:, None] & (columns < D)[None, :]
            n = tl.load(total + places, mask=mask, other=0.0).to(ACC) * inverse[:, None]
            g = tl.load(grad_normed + places, mask=mask, other=0.0).to(ACC)
            w = tl.load(weight + columns, mask=columns < D, other=0.0).to(ACC)
            du = (g * w[None, :] - n * mean[:, None]) * inverse[:, None]
            if UPDATE:
                du += tl.load(grad_total + places, mask=mask, other=0.0).to(ACC)
            tl.store(grad_out + places, du.to(grad_out.dtype.element_ty), mask=mask)
            part = grad_weight_parts + chunk * D + columns
            before = tl.load(part, mask=(columns < D) & (step > 0), other=0.0)
            tl.store(part, before + tl.sum(g * n, axis=0), mask=columns < D)
        tl.debug_barrier()  # what a thread has stored, another may load in the next step


@triton.jit
def _sigmoid(x):
    """``1 / (1 + exp(-x))``; written with ``exp(-|x|)``, it never overflows."""
    small = tl.exp(-tl.abs(x))
    return divided(tl.where(x >= 0, 1.0, small), 1.0 + small)


@triton.jit
def swiglu(
    gate_up,
    out,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``silu(gate) up`` of a block of a row. Grid (T, blocks of F)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, mask=inside, other=0.0).to(ACC)
    up = tl.load(gate_up + row * 2 * F + F + columns, mask=inside, other=0.0).to(ACC)
    tl.store(out + row * F + columns, (gate * _sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    grad,
    gate_up,
    grad_gate_up,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dgate = g up s (1 + gate (1 - s))`` with ``s = sigmoid(gate)``, ``dup = g silu(gate)``. Grid (T, blocks of F)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, mask=inside, other=0.0).to(ACC)
    up = tl.load(gate_up + row * 2 * F + F + columns, mask=inside, other=0.0).to(ACC)
    g = tl.load(grad + row * F + columns, mask=inside, other=0.0).to(ACC)
    s = _sigmoid(gate)
    d_gate = g * up * s * (1.0 + gate * (1.0 - s))
    place = grad_gate_up + row * 2 * F + columns
    tl.store(place, d_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(place + F, (g * gate * s).to(grad_gate_up.dtype.element_ty), mask=inside)
