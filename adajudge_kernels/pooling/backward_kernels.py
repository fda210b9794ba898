"""Triton kernels of the pooling family's backward; conventions and names as in `triton_kernels`.

A program goes over one chunk, recomputes what the forward did not keep, and writes its tokens' gradients and its part of
those that are sums over tokens, which small kernels add up in order.
"""

import triton
import triton.language as tl

from adajudge_kernels.pooling.triton_kernels import (
    RESPONSE,
    _depth_weights,
    _loaded,
    _mixed,
    _read,
    _sequence,
)
from adajudge_kernels.rounded import divided


@triton.jit
def scan_backward(
    states,
    grad_states,
    alpha,
    weight,
    bias,
    logits,
    grad_dots,
    grad_last,
    grad_mean,
    grad_attention,
    pooled,
    log_sum_exp,
    roles,
    sequences,
    chunks,
    betas,
    grad_logits,
    grad_alpha_parts,
    grad_weight_parts,
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VIEWS: tl.constexpr,
    RESPONSE_ONLY: tl.constexpr,
    SHARED: tl.constexpr,
    DOTS_GIVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One chunk's gradients: of the states, and its parts of those of the depth weights and the attention weight.

    ``g_t = [t=tau] g_L + m_t/n g_M + beta_t g_A + dlogit_t w`` with ``dlogit_t = beta_t (g_A . (h_t - z_A))``;
    ``dH_k,t = alpha_k g_t``. With shared prompts (SHARED) the gradients of prompt tokens are left to
    `spread_attention`, for which beta and dlogit are kept. Without VIEWS there is only the attention view.
    Grid (chunks, blocks of D).
    """
    chunk = tl.program_id(0).to(tl.int64)
    b = tl.load(chunks + chunk).to(tl.int64)
    begin = (chunk.to(tl.int32) - tl.load(sequences + b * 8 + 7)) * CHUNK
    start0, start1, first, length = _sequence(sequences, b)
    tau = tl.load(sequences + b * 8 + 4)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
    g_attention = tl.load(grad_attention + b * D + columns, mask=inside, other=0.0)
    z = tl.load(pooled + b * D + columns, mask=inside, other=0.0)
    if not DOTS_GIVEN:
        shift = tl.load(bias).to(ACC)
    if VIEWS:
        g_mean = tl.load(grad_mean + b * D + columns, mask=inside, other=0.0)
        g_mean = divided(g_mean, tl.load(sequences + b * 8 + 6).to(ACC))
    lse = tl.load(log_sum_exp + b)
    # Features that a thread loads at once: their sum waits for no other.
    WIDTH: tl.constexpr = 128 // states[0].dtype.element_ty.primitive_bitwidth
    weights = _depth_weights(alpha, b, K, WEIGHTED, ACC)
    d_alpha = ()
    if WEIGHTED:
        for _ in tl.static_range(K):
            d_alpha += (tl.zeros((TOKENS, BLOCK // WIDTH), ACC),)
    d_weight = tl.zeros((BLOCK,), ACC)
    for step in tl.range(0, tl.minimum(CHUNK, length - begin), TOKENS, num_stages=STAGES):
        position = begin + step + tl.arange(0, TOKENS)
        valid = position < length
        slot = tl.where(position < first, start0 + position, start1 + position - first)
        role = tl.load(roles + slot, mask=valid, other=0)
        rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
        seen = _read(valid, role, not RESPONSE_ONLY, True)
        mask = seen[:, None] & inside[None, :]
        scalars = chunk * CHUNK + step + tl.arange(0, TOKENS)
        tiles = _loaded(states, rows, mask, K)
        h = _mixed(tiles, weights, K, WEIGHTED, ACC)
        if DOTS_GIVEN:
            logit = tl.load(logits + scalars, mask=valid, other=0.0)
            grad_dot = tl.load(grad_dots + scalars, mask=valid, other=0.0)
        else:
            products = tl.join(h * w[None, :], (h - z[None, :]) * g_attention[None, :])
            logit, grad_dot = tl.split(tl.sum(products, axis=1))  # one sum of two numbers: threads wait once
            logit += shift
        beta = tl.where(seen, tl.exp(tl.where(seen, logit, lse) - lse), 0.0)
        d_logit = tl.where(seen, beta * grad_dot, 0.0)
        g = beta[:, None] * g_attention[None, :] + d_logit[:, None] * w[None, :]
        if RESPONSE_ONLY:
            g = tl.where(seen[:, None], g, 0.0)  # however large g_A is
        d_weight += tl.sum(d_logit[:, None] * (h - z[None, :]), axis=0)
        if VIEWS:
            g += tl.where((role == RESPONSE)[:, None], g_mean[None, :], 0.0)
            is_last = valid & (slot == tau)
            if tl.max(is_last.to(tl.int32)) > 0:
                g_last = tl.load(grad_last + b * D + columns, mask=inside, other=0.0)
                g += tl.where(is_last[:, None], g_last[None, :], 0.0)
        own = (valid & (position >= first) if SHARED else valid)[:, None] & inside[None, :]
        parts = d_alpha
        d_alpha = ()
        for k in tl.static_range(K):
            d_state = g
            if WEIGHTED:
                products = tl.where(mask, g, 0.0) * tiles[k].to(ACC)
                products = tl.reshape(products, (TOKENS, BLOCK // WIDTH, WIDTH))
                d_alpha += (parts[k] + tl.sum(products, axis=2),)
                d_state = g * weights[k]
            tl.store(grad_states[k] + rows, d_state.to(grad_states[k].dtype.element_ty), mask=own)
        if SHARED and tl.program_id(1) == 0:
            tl.store(betas + scalars, beta, mask=valid)
            tl.store(grad_logits + scalars, d_logit, mask=valid)
    tl.store(grad_weight_parts + chunk * D + columns, d_weight, mask=inside)
    if WEIGHTED:
        part = (chunk * tl.num_programs(1) + tl.program_id(1)) * K
        for k in tl.static_range(K):
            tl.store(grad_alpha_parts + part + k, tl.sum(d_alpha[k]))


@triton.jit
def sum_alpha_parts(
    parts,
    sequences,
    grad_alpha,
    K: tl.constexpr,
    DEPTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Depth weights' gradient of a sequence: its chunks' parts, in order. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.load(sequences + b * 8 + 7).to(tl.int64)
    length = tl.load(sequences + b * 8 + 5) + tl.load(sequences + b * 8 + 6)
    count = (length + CHUNK - 1) // CHUNK * BLOCKS
    k = tl.arange(0, DEPTHS)
    total = tl.zeros((DEPTHS,), ACC)
    for step in range(0, count, ROWS):
        row = step + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (k < K)[None, :]
        part = (first * BLOCKS + row)[:, None] * K + k[None, :]
        total += tl.sum(tl.load(parts + part, mask=mask, other=0.0), axis=0)
    tl.store(grad_alpha + b * K + k, total, mask=k < K)


@triton.jit
def spread_means(
    grad_prompt,
    grad_response,
    grad_all,
    roles,
    sequences,
    groups,
    group_chunks,
    grad_hidden,
    D: tl.constexpr,
    PROMPT_MEAN: tl.constexpr,
    RESPONSE_MEAN: tl.constexpr,
    ALL_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of means: every token gets its readers' shares, in the readers' order. Grid (chunks, blocks of D)."""
    chunk = tl.program_id(0).to(tl.int64)
    group = groups + tl.load(group_chunks + chunk).to(tl.int64) * 5
    begin = tl.load(group) + (chunk.to(tl.int32) - tl.load(group + 4)) * CHUNK
    stop = tl.load(group + 1)
    reader = tl.load(group + 2)
    readers = tl.load(group + 3)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    prompt = tl.zeros((BLOCK,), ACC)
    response = tl.zeros((BLOCK,), ACC)
    for index in range(0, readers):
        b = reader.to(tl.int64) + index
        prompts = tl.load(sequences + b * 8 + 5)
        responses = tl.load(sequences + b * 8 + 6)
        if ALL_MEAN:
            g = tl.load(grad_all + b * D + columns, mask=inside, other=0.0)
            g = divided(g, (prompts + responses).to(ACC))
            prompt += g
            response += g
        if PROMPT_MEAN:
            g = tl.load(grad_prompt + b * D + columns, mask=inside, other=0.0)
            prompt += divided(g, tl.maximum(prompts, 1).to(ACC))
        if RESPONSE_MEAN:
            g = tl.load(grad_response + b * D + columns, mask=inside, other=0.0)
            response += divided(g, responses.to(ACC))
    for step in range(0, tl.minimum(CHUNK, stop - begin), TOKENS):
        slot = begin + step + tl.arange(0, TOKENS)
        valid = slot < stop
        role = tl.load(roles + slot, mask=valid, other=0)
        g = tl.where((role == RESPONSE)[:, None], response[None, :], prompt[None, :])
        rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
        mask = valid[:, None] & inside[None, :]
        tl.store(grad_hidden + rows, g.to(grad_hidden.dtype.element_ty), mask=mask)


@triton.jit
def spread_attention(
    grad_states,
    alpha,
    weight,
    grad_attention,
    betas,
    grad_logits,
    sequences,
    groups,
    group_chunks,
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RESPONSE_ONLY: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of shared prompt tokens: ``dH_k,t = sum_b alpha_bk beta_bt g_A,b + (sum_b alpha_bk dlogit_bt) w`` over the
    candidates that read the token, in their order; zeros with RESPONSE_ONLY. Needs no states.
    Grid (chunks of groups, blocks of D)."""
    chunk = tl.program_id(0).to(tl.int64)
    group = groups + tl.load(group_chunks + chunk).to(tl.int64) * 5
    start = tl.load(group)
    within = (chunk.to(tl.int32) - tl.load(group + 4)) * CHUNK
    stop = tl.load(group + 1)
    reader = tl.load(group + 2)
    readers = tl.load(group + 3)
    # A response is the second range of its one reader, and has its gradient already.
    is_prompt = readers != 1
    if readers == 1:
        is_prompt = tl.load(sequences + reader.to(tl.int64) * 8 + 2) != start
    if RESPONSE_ONLY:
        readers = 0
    if is_prompt:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < D
        w = tl.load(weight + columns, mask=inside & (readers > 0), other=0.0).to(ACC)
        for step in range(0, tl.minimum(CHUNK, stop - start - within), TOKENS):
            position = within + step + tl.arange(0, TOKENS)
            valid = start + position < stop
            rows = (start + position).to(tl.int64)[:, None] * D + columns[None, :]
            mask = valid[:, None] & inside[None, :]
            totals = ()
            of_weight = ()
            for _ in tl.static_range(K):
                totals += (tl.zeros((TOKENS, BLOCK), ACC),)
                of_weight += (tl.zeros((TOKENS,), ACC),)
            for index in range(0, readers):
                b = reader.to(tl.int64) + index
                scalars = tl.load(sequences + b * 8 + 7).to(tl.int64) * CHUNK + position
                beta = tl.load(betas + scalars, mask=valid, other=0.0)
                d_logit = tl.load(grad_logits + scalars, mask=valid, other=0.0)
                g = tl.load(grad_attention + b * D + columns, mask=inside, other=0.0)
                weights = _depth_weights(alpha, b, K, WEIGHTED, ACC)
                parts = totals
                weight_parts = of_weight
                totals = ()
                of_weight = ()
                for k in tl.static_range(K):
                    share = weights[k] * beta if WEIGHTED else beta
                    totals += (parts[k] + share[:, None] * g[None, :],)
                    of_weight += (weight_parts[k] + (weights[k] * d_logit if WEIGHTED else d_logit),)
            for k in tl.static_range(K):
                total = totals[k] + of_weight[k][:, None] * w[None, :]
                tl.store(grad_states[k] + rows, total.to(grad_states[k].dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def zero_padding(
    outputs, roles, count, D: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros in the rows of padding tokens, and of nothing else. Grid (tiles of tokens,)."""
    slot = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    padding = (slot < count) & (tl.load(roles + slot, mask=slot < count, other=1) == 0)
    if tl.max(padding.to(tl.int32)) > 0:
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = padding[:, None] & (columns < D)[None, :]
            zeros = tl.zeros((TOKENS, BLOCK), tl.float32)
            for k in tl.static_range(K):
                rows = slot[:, None] * D + columns[None, :]
                tl.store(outputs[k] + rows, zeros.to(outputs[k].dtype.element_ty), mask=mask)
