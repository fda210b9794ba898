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

from adajudge_kernels.rounded import divided

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
def _loaded(states, rows, mask, K: tl.constexpr):
    """``H_k`` of a tile of tokens, a tuple; zeros where the mask says no."""
    tiles = ()
    for k in tl.static_range(K):
        tiles += (tl.load(states[k] + rows, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _depth_weights(alpha, b, K: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """A sequence's ``alpha_k``, a tuple; empty if there are none."""
    weights = ()
    if WEIGHTED:
        for k in tl.static_range(K):
            weights += (tl.load(alpha + b * K + k).to(ACC),)
    return weights


@triton.jit
def _mixed(tiles, weights, K: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """``h = sum_k alpha_k H_k`` of a tile of tokens; its first tensor if there are no depth weights."""
    h = tiles[0].to(ACC)
    if WEIGHTED:
        h *= weights[0]
        for k in tl.static_range(1, K):
            h += weights[k] * tiles[k].to(ACC)
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
    STAGES: tl.constexpr,
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
    weights = _depth_weights(alpha, b, K, WEIGHTED, ACC)
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
    for step in tl.range(0, tl.minimum(CHUNK, length - begin), TOKENS, num_stages=STAGES):
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
        tiles = _loaded(states, rows, seen[:, None] & inside[None, :], K)
        h = _mixed(tiles, weights, K, WEIGHTED, ACC)
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
        tl.store(prompt_mean + out, divided(prompt, tl.maximum(prompts, 1).to(ACC)), mask=inside)
    if RESPONSE_MEAN:
        tl.store(response_mean + out, divided(response, responses.to(ACC)), mask=inside)
    if ALL_MEAN:
        tl.store(all_mean + out, divided(prompt + response, (prompts + responses).to(ACC)), mask=inside)


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
        tl.store(response_mean + b * D + columns, divided(response, responses.to(ACC)), mask=inside)
    tl.store(pooled + b * D + columns, divided(weighted, total), mask=inside)
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
    products = tl.zeros((DEPTHS, BLOCK), ACC)
    for start in tl.static_range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        c = tl.load(context + b * D + columns, mask=columns < D, other=0.0)
        mask = (k < K)[:, None] & (columns < D)[None, :]
        w = tl.load(weight + k[:, None] * D + columns[None, :], mask=mask, other=0.0).to(ACC)
        products += w * c[None, :]
    logits = tl.load(bias + k, mask=k < K, other=0.0).to(ACC) + tl.sum(products, axis=1)
    logits = tl.where(k < K, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits))
    tl.store(alpha + b * K + k, divided(exponentials, tl.sum(exponentials)), mask=k < K)


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
    weights = _depth_weights(alpha, b, K, WEIGHTED, ACC)
    for step in range(0, tl.minimum(CHUNK, length - begin), TOKENS):
        position = begin + step + tl.arange(0, TOKENS)
        valid = position < length
        slot = tl.where(position < first, start0 + position, start1 + position - first)
        seen = _read(valid, tl.load(roles + slot, mask=valid, other=0), not RESPONSE_ONLY, True)
        # Summed over features at the end: until then, no thread waits for another.
        products = tl.zeros((TOKENS, BLOCK), ACC)
        grad_products = tl.zeros((TOKENS, BLOCK), ACC)
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < D
            rows = slot.to(tl.int64)[:, None] * D + columns[None, :]
            tiles = _loaded(states, rows, seen[:, None] & inside[None, :], K)
            h = _mixed(tiles, weights, K, WEIGHTED, ACC)
            w = tl.load(weight + columns, mask=inside, other=0.0).to(ACC)
            products += h * w[None, :]
            if BACKWARD:
                g = tl.load(grad + b * D + columns, mask=inside, other=0.0)
                z = tl.load(pooled + b * D + columns, mask=inside, other=0.0)
                grad_products += (h - z[None, :]) * g[None, :]
        out = chunk * CHUNK + step + tl.arange(0, TOKENS)
        tl.store(logits + out, tl.sum(products, axis=1) + tl.load(bias).to(ACC), mask=valid)
        if BACKWARD:
            tl.store(grad_dots + out, tl.sum(grad_products, axis=1), mask=valid)
