"""Triton kernels of the pooling family.

A sequence is cut into chunks counted from its own start; a program scans one chunk and writes partial results, and a
second kernel combines a sequence's chunks in order. So a sequence's bits depend on nothing else in the batch, nothing
is summed by atomics, and nothing of size [T, d] is written in the forward. All arithmetic is in `ACC` (fp32; fp64 for
fp64 states), right after the load.

Numbers that change from batch to batch are not specialised on: a new T compiles nothing.

Names: `states` is the tuple of the K tensors ``[T, D]``, rows contiguous; D, K and everything in capitals is known at
compile time. Offsets of elements are int64.
"""

import triton
import triton.language as tl

PROMPT = tl.constexpr(1)
RESPONSE = tl.constexpr(2)


@triton.jit
def _sequence(sequences, b):
    """(start0, start1, tokens of the first range, tokens in all) of a sequence."""
    row = sequences + b * 8
    start0 = tl.load(row)
    start1 = tl.load(row + 2)
    first = tl.load(row + 1) - start0
    return start0, start1, first, first + tl.load(row + 3) - start1


@triton.jit
def _mixed(states, alpha, rows, mask, K: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """``h = sum_k alpha_k H_k`` of a tile of tokens; the states' own first tensor if there are no depth weights."""
    h = tl.load(states[0] + rows, mask=mask, other=0.0).to(ACC)
    if WEIGHTED:
        h *= tl.load(alpha).to(ACC)
        for k in tl.static_range(1, K):
            h += tl.load(alpha + k).to(ACC) * tl.load(states[k] + rows, mask=mask, other=0.0).to(ACC)
    return h


@triton.jit
def _read(valid, role, PROMPTS: tl.constexpr, RESPONSES: tl.constexpr):
    """The tokens whose states are wanted; no other's are loaded."""
    if PROMPTS and RESPONSES:
        return valid  # and no load waits for the roles
    return valid & (role == (PROMPT if PROMPTS else RESPONSE))


@triton.jit
def scan(
    states,
    alpha,
    weight,
    bias,
    logits,
    roles,
    sequences,
    chunks,
    last_out,
    prompt_sums,
    response_sums,
    weighted_sums,
    tops,
    totals,
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LAST: tl.constexpr,
    PROMPT_SUM: tl.constexpr,
    RESPONSE_SUM: tl.constexpr,
    ATTENTION: tl.constexpr,
    RESPONSE_ONLY: tl.constexpr,
    LOGITS_GIVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One chunk: its sums over prompt and response tokens, its part of the attention view, the last response row.

    Grid (chunks, blocks of D). With attention, either one block holds a whole row, or the logits are given.
    """
    chunk = tl.program_id(0).to(tl.int64)
    b = tl.load(chunks + chunk).to(tl.int64)
    begin = (chunk.to(tl.int32) - tl.load(sequences + b * 8 + 7)) * CHUNK
    start0, start1, first, length = _sequence(sequences, b)
    tau = tl.load(sequences + b * 8 + 4)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    if PROMPT_SUM:
        prompt_sum = tl.zeros((BLOCK,), ACC)
    if RESPONSE_SUM:
        response_sum = tl.zeros((BLOCK,), ACC)
    if ATTENTION:
        weighted = tl.zeros((BLOCK,), ACC)
        top = tl.full((), float("-inf"), ACC)
        total = tl.zeros((), ACC)
        if not LOGITS_GIVEN:
            w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
            shift = tl.load(bias).to(ACC)
    for step in range(0, tl.minimum(CHUNK, length - begin), TOKENS):
        position = begin + step + tl.arange(0, TOKENS)
        valid = position < length
        slot = tl.where(position < first, start0 + position, start1 + position - first)
        role = tl.load(roles + slot, mask=valid, other=0)
        rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
        seen = _read(
            valid,
            role,
            PROMPT_SUM or (ATTENTION and not RESPONSE_ONLY),
            RESPONSE_SUM or ATTENTION or LAST,
        )
        h = _mixed(states, alpha + b * K, rows, seen[:, None] & inside[None, :], K, WEIGHTED, ACC)
        if PROMPT_SUM:
            prompt_sum += tl.sum(tl.where((role == PROMPT)[:, None], h, 0.0), axis=0)
        if RESPONSE_SUM:
            response_sum += tl.sum(tl.where((role == RESPONSE)[:, None], h, 0.0), axis=0)
        if LAST:
            is_last = valid & (slot == tau)
            if tl.max(is_last.to(tl.int32)) > 0:
                row = tl.sum(tl.where(is_last[:, None], h, 0.0), axis=0)
                tl.store(last_out + b * D + columns, row, mask=inside)
        if ATTENTION:
            if LOGITS_GIVEN:
                logit = tl.load(logits + chunk * CHUNK + step + tl.arange(0, TOKENS), mask=valid, other=0.0)
            else:
                logit = tl.sum(h * w[None, :], axis=1) + shift
            logit = tl.where(seen, logit, float("-inf"))
            new_top = tl.maximum(top, tl.max(logit))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            rescale = tl.exp(top - safe)
            beta = tl.exp(logit - safe)
            weighted = weighted * rescale + tl.sum(h * beta[:, None], axis=0)
            total = total * rescale + tl.sum(beta)
            top = new_top
    out = chunk * D + columns
    if PROMPT_SUM:
        tl.store(prompt_sums + out, prompt_sum, mask=inside)
    if RESPONSE_SUM:
        tl.store(response_sums + out, response_sum, mask=inside)
    if ATTENTION:
        tl.store(weighted_sums + out, weighted, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(tops + chunk, top)
            tl.store(totals + chunk, total)


@triton.jit
def combine_sums(
    prompt_sums,
    response_sums,
    sequences,
    prompt_mean,
    response_mean,
    all_mean,
    D: tl.constexpr,
    PROMPT_MEAN: tl.constexpr,
    RESPONSE_MEAN: tl.constexpr,
    ALL_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Means of a sequence from its chunks' sums, `ROWS` chunks at a time from its first. Grid (B, blocks of D)."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    prompts = tl.load(sequences + b * 8 + 5)
    responses = tl.load(sequences + b * 8 + 6)
    first = tl.load(sequences + b * 8 + 7).to(tl.int64)
    count = (prompts + responses + CHUNK - 1) // CHUNK
    prompt = tl.zeros((BLOCK,), ACC)
    response = tl.zeros((BLOCK,), ACC)
    for step in range(0, count, ROWS):
        chunk = step + tl.arange(0, ROWS)
        rows = (first + chunk)[:, None] * D + columns[None, :]
        mask = (chunk < count)[:, None] & inside[None, :]
        if PROMPT_MEAN or ALL_MEAN:
            prompt += tl.sum(tl.load(prompt_sums + rows, mask=mask, other=0.0), axis=0)
        if RESPONSE_MEAN or ALL_MEAN:
            response += tl.sum(tl.load(response_sums + rows, mask=mask, other=0.0), axis=0)
    out = b * D + columns
    if PROMPT_MEAN:
        tl.store(prompt_mean + out, prompt / tl.maximum(prompts, 1).to(ACC), mask=inside)
    if RESPONSE_MEAN:
        tl.store(response_mean + out, response / responses.to(ACC), mask=inside)
    if ALL_MEAN:
        tl.store(all_mean + out, (prompt + response) / (prompts + responses).to(ACC), mask=inside)


@triton.jit
def combine_views(
    weighted_sums,
    tops,
    totals,
    response_sums,
    sequences,
    pooled,
    log_sum_exp,
    response_mean,
    D: tl.constexpr,
    RESPONSE_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The attention view of a sequence from its chunks' parts, and the mean over its response. Grid (B, blocks of D)."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    first = tl.load(sequences + b * 8 + 7).to(tl.int64)
    responses = tl.load(sequences + b * 8 + 6)
    count = (tl.load(sequences + b * 8 + 5) + responses + CHUNK - 1) // CHUNK
    response = tl.zeros((BLOCK,), ACC)
    top = tl.full((), float("-inf"), ACC)
    total = tl.zeros((), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    for step in range(0, count, ROWS):
        chunk = step + tl.arange(0, ROWS)
        own = chunk < count
        tile_tops = tl.load(tops + first + chunk, mask=own, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tile_tops))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp(top - safe)
        scale = tl.exp(tile_tops - safe)
        rows = (first + chunk)[:, None] * D + columns[None, :]
        tile = tl.load(weighted_sums + rows, mask=own[:, None] & inside[None, :], other=0.0)
        weighted = weighted * rescale + tl.sum(tile * scale[:, None], axis=0)
        total = total * rescale + tl.sum(tl.load(totals + first + chunk, mask=own, other=0.0) * scale)
        top = new_top
        if RESPONSE_MEAN:
            tile = tl.load(response_sums + rows, mask=own[:, None] & inside[None, :], other=0.0)
            response += tl.sum(tile, axis=0)
    if RESPONSE_MEAN:
        tl.store(response_mean + b * D + columns, response / responses.to(ACC), mask=inside)
    tl.store(pooled + b * D + columns, weighted / total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(log_sum_exp + b, top + tl.log(total))


@triton.jit
def gate(
    context,
    weight,
    bias,
    alpha,
    D: tl.constexpr,
    K: tl.constexpr,
    DEPTHS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``alpha = softmax(W c + b)`` of one sequence; DEPTHS is K rounded up to a power of two. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, DEPTHS)
    logits = tl.load(bias + k, mask=k < K, other=0.0).to(ACC)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        c = tl.load(context + b * D + columns, mask=columns < D, other=0.0)
        mask = (k < K)[:, None] & (columns < D)[None, :]
        w = tl.load(weight + k[:, None] * D + columns[None, :], mask=mask, other=0.0).to(ACC)
        logits += tl.sum(w * c[None, :], axis=1)
    logits = tl.where(k < K, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits))
    tl.store(alpha + b * K + k, exponentials / tl.sum(exponentials), mask=k < K)


@triton.jit
def dots(
    states,
    alpha,
    weight,
    bias,
    grad,
    pooled,
    roles,
    sequences,
    chunks,
    logits,
    grad_dots,
    D: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RESPONSE_ONLY: tl.constexpr,
    BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """For rows too wide for registers: ``w . h_t + b`` of a chunk's tokens, block by block of a row, and in the
    backward ``g_A . (h_t - z_A)`` too. Grid (chunks,)."""
    chunk = tl.program_id(0).to(tl.int64)
    b = tl.load(chunks + chunk).to(tl.int64)
    begin = (chunk.to(tl.int32) - tl.load(sequences + b * 8 + 7)) * CHUNK
    start0, start1, first, length = _sequence(sequences, b)
    for step in range(0, tl.minimum(CHUNK, length - begin), TOKENS):
        position = begin + step + tl.arange(0, TOKENS)
        valid = position < length
        slot = tl.where(position < first, start0 + position, start1 + position - first)
        seen = _read(valid, tl.load(roles + slot, mask=valid, other=0), not RESPONSE_ONLY, True)
        logit = tl.zeros((TOKENS,), ACC) + tl.load(bias).to(ACC)
        grad_dot = tl.zeros((TOKENS,), ACC)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < D
            rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
            h = _mixed(states, alpha + b * K, rows, seen[:, None] & inside[None, :], K, WEIGHTED, ACC)
            w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
            logit += tl.sum(h * w[None, :], axis=1)
            if BACKWARD:
                g = tl.load(grad + b * D + columns, mask=inside, other=0.0)
                z = tl.load(pooled + b * D + columns, mask=inside, other=0.0)
                grad_dot += tl.sum((h - z[None, :]) * g[None, :], axis=1)
        out = chunk * CHUNK + step + tl.arange(0, TOKENS)
        tl.store(logits + out, logit, mask=valid)
        if BACKWARD:
            tl.store(grad_dots + out, grad_dot, mask=valid)


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
    DEPTHS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VIEWS: tl.constexpr,
    RESPONSE_ONLY: tl.constexpr,
    SHARED: tl.constexpr,
    DOTS_GIVEN: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
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
    if not DOTS_GIVEN:
        z = tl.load(pooled + b * D + columns, mask=inside, other=0.0)
        shift = tl.load(bias).to(ACC)
    if VIEWS:
        g_mean = tl.load(grad_mean + b * D + columns, mask=inside, other=0.0)
        g_mean = g_mean / tl.load(sequences + b * 8 + 6).to(ACC)
    lse = tl.load(log_sum_exp + b)
    k_index = tl.arange(0, DEPTHS)
    d_alpha = tl.zeros((DEPTHS,), ACC)
    d_weight = tl.zeros((BLOCK,), ACC)
    for step in range(0, tl.minimum(CHUNK, length - begin), TOKENS):
        position = begin + step + tl.arange(0, TOKENS)
        valid = position < length
        slot = tl.where(position < first, start0 + position, start1 + position - first)
        role = tl.load(roles + slot, mask=valid, other=0)
        rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
        seen = _read(valid, role, not RESPONSE_ONLY, True)
        mask = seen[:, None] & inside[None, :]
        scalars = chunk * CHUNK + step + tl.arange(0, TOKENS)
        h = _mixed(states, alpha + b * K, rows, mask, K, WEIGHTED, ACC)
        if DOTS_GIVEN:
            logit = tl.load(logits + scalars, mask=valid, other=0.0)
            grad_dot = tl.load(grad_dots + scalars, mask=valid, other=0.0)
        else:
            logit = tl.sum(h * w[None, :], axis=1) + shift
            grad_dot = tl.sum((h - z[None, :]) * g_attention[None, :], axis=1)
        beta = tl.where(seen, tl.exp(tl.where(seen, logit, lse) - lse), 0.0)
        d_logit = tl.where(seen, beta * grad_dot, 0.0)
        g = beta[:, None] * g_attention[None, :] + d_logit[:, None] * w[None, :]
        d_weight += tl.sum(d_logit[:, None] * h, axis=0)
        if VIEWS:
            g += tl.where((role == RESPONSE)[:, None], g_mean[None, :], 0.0)
            is_last = valid & (slot == tau)
            if tl.max(is_last.to(tl.int32)) > 0:
                g_last = tl.load(grad_last + b * D + columns, mask=inside, other=0.0)
                g += tl.where(is_last[:, None], g_last[None, :], 0.0)
        own = (valid & (position >= first) if SHARED else valid)[:, None] & inside[None, :]
        for k in tl.static_range(K):
            d_state = g
            if WEIGHTED:
                x = tl.load(states[k] + rows, mask=mask, other=0.0).to(ACC)
                d_alpha += tl.where(k_index == k, tl.sum(tl.where(mask, g, 0.0) * x), 0.0)
                d_state = g * tl.load(alpha + b * K + k).to(ACC)
            tl.store(grad_states[k] + rows, d_state.to(grad_states[k].dtype.element_ty), mask=own)
        if SHARED and tl.program_id(1) == 0:
            tl.store(betas + scalars, beta, mask=valid)
            tl.store(grad_logits + scalars, d_logit, mask=valid)
    tl.store(grad_weight_parts + chunk * D + columns, d_weight, mask=inside)
    if WEIGHTED:
        part = (chunk * tl.num_programs(1) + tl.program_id(1)) * K
        tl.store(grad_alpha_parts + part + k_index, d_alpha, mask=k_index < K)


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
            g = tl.load(grad_all + b * D + columns, mask=inside, other=0.0) / (prompts + responses).to(ACC)
            prompt += g
            response += g
        if PROMPT_MEAN:
            g = tl.load(grad_prompt + b * D + columns, mask=inside, other=0.0)
            prompt += g / tl.maximum(prompts, 1).to(ACC)
        if RESPONSE_MEAN:
            response += tl.load(grad_response + b * D + columns, mask=inside, other=0.0) / responses.to(ACC)
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
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of shared prompt tokens: ``dH_k,t = sum_b alpha_bk (beta_bt g_A,b + dlogit_bt w)`` over the candidates
    that read the token, in their order. Needs no states. Grid (chunks of groups, blocks of D)."""
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
    if is_prompt:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < D
        w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
        for step in range(0, tl.minimum(CHUNK, stop - start - within), TOKENS):
            position = within + step + tl.arange(0, TOKENS)
            valid = start + position < stop
            rows = (start + position).to(tl.int64)[:, None] * D + columns[None, :]
            mask = valid[:, None] & inside[None, :]
            for k in tl.static_range(K):
                total = tl.zeros((TOKENS, BLOCK), ACC)
                for index in range(0, readers):
                    b = reader.to(tl.int64) + index
                    scalars = tl.load(sequences + b * 8 + 7).to(tl.int64) * CHUNK + position
                    beta = tl.load(betas + scalars, mask=valid, other=0.0)
                    d_logit = tl.load(grad_logits + scalars, mask=valid, other=0.0)
                    g = tl.load(grad_attention + b * D + columns, mask=inside, other=0.0)
                    g = beta[:, None] * g[None, :] + d_logit[:, None] * w[None, :]
                    if WEIGHTED:
                        g *= tl.load(alpha + b * K + k).to(ACC)
                    total += g
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
