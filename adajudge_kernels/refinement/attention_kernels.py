"""Triton kernels of attention inside sequences: a flash attention over two ranges of keys.

A group of queries (see `AttentionTables`) sees the range before it, which other groups may share, and its own. Keys are
counted by their virtual position, which runs through both ranges, and read in blocks from position 0 on: a query's bits
depend neither on the batch nor on where its prompt lies. Scores live in registers only; the backward recomputes them
from the saved log-sum-exp (to the base 2, as the exponentials are). A key's gradient is summed by one program over all
queries that see it, group after group: no atomics.

Names: H heads, RATIO of them for each head of keys and values; E features a head, in a block of WIDTH; M queries and N
keys a step. `DOT` is what enters matrix products (the states' own dtype), `ACC` what they are summed in. Offsets of
elements are int64.
"""

import triton
import triton.language as tl

from adajudge_kernels.rounded import divided

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(x, rows, row_stride, mask, E: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr):
    """Rows of one head, ``[.., WIDTH]``, zero where there is none. `x` points at the head."""
    columns = tl.arange(0, WIDTH)
    inside = mask[:, None] & (columns < E)[None, :]
    places = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(places, mask=inside, other=0.0).to(DOT)


@triton.jit
def _put(x, rows, row_stride, mask, values, E: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = mask[:, None] & (columns < E)[None, :]
    places = x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(places, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b, ACC: tl.constexpr):
    """``a b`` summed in ACC; of fp32 numbers exactly, without tensor cores."""
    return tl.dot(a, b, out_dtype=ACC, input_precision="ieee")


@triton.jit
def _wide_product(a, b, ACC: tl.constexpr):
    """``a b^T`` of rows of features. Wide fp32 rows do not fit in registers: even and odd features one after the other."""
    if a.dtype.primitive_bitwidth >= 32 and a.shape[1] > 128:
        a0, a1 = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        b0, b1 = tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))
        return _product(a0, tl.trans(b0), ACC) + _product(a1, tl.trans(b1), ACC)
    return _product(a, tl.trans(b), ACC)


@triton.jit
def _exponentials(scores, shift, FACTOR: tl.constexpr):
    """``2^(FACTOR scores - shift)`` of rows, rounded once, as a product and difference of their own may be or may not: a
    query's bits must not depend on whether its tile needed a mask."""
    factor = tl.full(scores.shape, FACTOR, scores.dtype)
    return tl.exp2(tl.fma(scores, factor, -tl.broadcast_to(shift[:, None], scores.shape)))


@triton.jit
def _place(chunks, first_chunks, stride, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    """The group of a program's tile of SIZE rows and the tile's offset in it. A tile is a part of a chunk, or several
    chunks: then only the programs whose offset is a multiple of SIZE have work."""
    PARTS: tl.constexpr = max(1, CHUNK // SIZE)
    chunk = tl.program_id(0) // PARTS
    g = tl.load(chunks + chunk).to(tl.int64)
    offset = (chunk - tl.load(first_chunks + g * stride)) * CHUNK
    return g, offset + tl.program_id(0) % PARTS * SIZE


@triton.jit
def _keys(group):
    """(start0, start1, keys before the own range, keys in all) of a group."""
    start0 = tl.load(group)
    start1 = tl.load(group + 2)
    before = tl.load(group + 1) - start0
    return start0, start1, before, before + tl.load(group + 3) - start1


@triton.jit
def _queries(queries, rows, g, offset, start1, before, M: tl.constexpr, GATHERED: tl.constexpr):
    """Rows of a tile of a group's queries, which of them there are, and their positions (0 where there is none)."""
    row = tl.load(queries + g * 3) + offset + tl.arange(0, M)
    valid = row < tl.load(queries + g * 3 + 1)
    token = tl.load(rows + row, mask=valid, other=0).to(tl.int32) if GATHERED else row
    return row, valid, tl.where(valid, token - start1 + before, 0)


@triton.jit
def _seen(positions, key_positions, total, CAUSAL: tl.constexpr):
    seen = (key_positions < total)[None, :]
    if CAUSAL:
        seen = seen & (key_positions[None, :] <= positions[:, None])
    return seen


@triton.jit
def _bounds(valid, positions, total, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys before the first number are seen by every query of a tile, behind the second by none."""
    if CAUSAL:
        last = tl.max(positions) + 1
        first = tl.min(tl.where(valid, positions, last)) + 1
        return first // N * N, last
    return total // N * N, total


@triton.jit
def _forward_steps(
    state,
    begin,
    end,
    q,
    position,
    key,
    key_row,
    value,
    value_row,
    start0,
    start1,
    before,
    total,
    FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """The online softmax over keys from `begin` to `end`: largest score (not yet scaled), norm and weighted sum."""
    top, norm, mixed = state
    for step in range(begin, end, N):
        at = step + tl.arange(0, N)
        slot = tl.where(at < before, start0 + at, start1 + at - before)
        k = _tile(key, slot, key_row, at < total, E, WIDTH, DOT)
        v = _tile(value, slot, value_row, at < total, E, WIDTH, DOT)
        scores = _product(q, tl.trans(k), ACC)
        if MASKED:
            scores = tl.where(_seen(position, at, total, CAUSAL), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = _exponentials(scores, new_top * FACTOR, FACTOR)
        rescale = tl.exp2((top - new_top) * FACTOR)
        norm = norm * rescale + tl.sum(p, axis=1)
        mixed = mixed * rescale[:, None] + _product(p.to(DOT), v, ACC)
        top = new_top
    return top, norm, mixed


@triton.jit(do_not_specialize=["num_rows"])
def attention_forward(
    query,
    key,
    value,
    out,
    log_sum_exp,
    groups,
    queries,
    query_chunks,
    rows,
    num_rows,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GATHERED: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``softmax(scale Q K^T) V`` of a tile of M queries of one head, and the log-sum-exp. Grid (chunks of queries, H)."""
    head = tl.program_id(1).to(tl.int64)
    g, offset = _place(query_chunks, queries + 2, 3, CHUNK, M)
    if offset % M == 0:
        start0, start1, before, total = _keys(groups + g * 7)
        row, valid, position = _queries(queries, rows, g, offset, start1, before, M, GATHERED)
        q = _tile(query + head * query_head, row, query_row, valid, E, WIDTH, DOT)
        key += head // RATIO * key_head
        value += head // RATIO * value_head
        every, last = _bounds(valid, position, total, N, CAUSAL)
        FACTOR: tl.constexpr = SCALE * LOG2_E
        state = tl.full((M,), float("-inf"), ACC), tl.zeros((M,), ACC), tl.zeros((M, WIDTH), ACC)
        for masked in tl.static_range(2):
            state = _forward_steps(
                state,
                every if masked else 0,
                last if masked else every,
                q,
                position,
                key,
                key_row,
                value,
                value_row,
                start0,
                start1,
                before,
                total,
                FACTOR,
                masked,
                CAUSAL,
                E,
                WIDTH,
                N,
                DOT,
                ACC,
            )
        top, norm, mixed = state
        _put(out + head * E, row, H * E, valid, mixed * divided(1.0, norm)[:, None], E, WIDTH)
        tl.store(log_sum_exp + head * num_rows + row, top * FACTOR + tl.log2(norm), mask=valid)


@triton.jit
def _backward_steps(
    grad_query,
    begin,
    end,
    q,
    position,
    g_out,
    delta,
    lse,
    key,
    key_row,
    value,
    value_row,
    start0,
    start1,
    before,
    total,
    FACTOR: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dS K`` over keys from `begin` to `end`, added to what came before."""
    for step in range(begin, end, N):
        at = step + tl.arange(0, N)
        slot = tl.where(at < before, start0 + at, start1 + at - before)
        k = _tile(key, slot, key_row, at < total, E, WIDTH, DOT)
        v = _tile(value, slot, value_row, at < total, E, WIDTH, DOT)
        scores = _wide_product(q, k, ACC)
        if MASKED:
            scores = tl.where(_seen(position, at, total, CAUSAL), scores, float("-inf"))
        p = _exponentials(scores, lse, FACTOR)
        d_scores = p * (_product(g_out, tl.trans(v), ACC) - delta[:, None])
        grad_query += _product(d_scores.to(DOT), k, ACC)
    return grad_query


@triton.jit(do_not_specialize=["num_rows"])
def attention_backward_queries(
    query,
    key,
    value,
    grad,
    out,
    log_sum_exp,
    deltas,
    grad_query,
    groups,
    queries,
    query_chunks,
    rows,
    num_rows,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    grad_query_row,
    grad_query_head,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GATHERED: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dQ = scale dS K`` of a tile of queries, ``dS = P (dO V^T - delta)``, and ``delta = rowsum(dO O)``, which is kept
    for `attention_backward_keys`. Grid (chunks of queries, H)."""
    head = tl.program_id(1).to(tl.int64)
    g, offset = _place(query_chunks, queries + 2, 3, CHUNK, M)
    if offset % M == 0:
        start0, start1, before, total = _keys(groups + g * 7)
        row, valid, position = _queries(queries, rows, g, offset, start1, before, M, GATHERED)
        q = _tile(query + head * query_head, row, query_row, valid, E, WIDTH, DOT)
        g_out = _tile(grad + head * E, row, H * E, valid, E, WIDTH, DOT)
        o = _tile(out + head * E, row, H * E, valid, E, WIDTH, DOT)
        delta = tl.sum(g_out.to(ACC) * o.to(ACC), axis=1)
        tl.store(deltas + head * num_rows + row, delta, mask=valid)
        lse = tl.load(log_sum_exp + head * num_rows + row, mask=valid, other=0.0)
        key += head // RATIO * key_head
        value += head // RATIO * value_head
        every, last = _bounds(valid, position, total, N, CAUSAL)
        FACTOR: tl.constexpr = SCALE * LOG2_E
        d_query = tl.zeros((M, WIDTH), ACC)
        for masked in tl.static_range(2):
            d_query = _backward_steps(
                d_query,
                every if masked else 0,
                last if masked else every,
                q,
                position,
                g_out,
                delta,
                lse,
                key,
                key_row,
                value,
                value_row,
                start0,
                start1,
                before,
                total,
                FACTOR,
                masked,
                CAUSAL,
                E,
                WIDTH,
                N,
                DOT,
                ACC,
            )
        place = grad_query + head * grad_query_head
        _put(place, row, grad_query_row, valid, d_query * SCALE, E, WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def attention_backward_keys(
    query,
    key,
    value,
    grad,
    log_sum_exp,
    deltas,
    grad_key,
    grad_value,
    groups,
    key_chunks,
    queries,
    rows,
    num_rows,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    grad_key_row,
    grad_key_head,
    grad_value_row,
    grad_value_head,
    H: tl.constexpr,
    RATIO: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GATHERED: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dK = scale dS^T Q`` and ``dV = P^T dO`` of a tile of N keys, over the queries of its own group and then of the
    groups that have it before them, head after head. Grid (chunks of keys, heads of keys)."""
    key_heads = tl.program_id(1).to(tl.int64)
    own, offset = _place(key_chunks, groups + 6, 7, CHUNK, N)
    if offset % N == 0:
        _, start1, before, total = _keys(groups + own * 7)
        at = before + offset + tl.arange(0, N)
        there = at < total
        slot = start1 + offset + tl.arange(0, N)
        k = _tile(key + key_heads * key_head, slot, key_row, there, E, WIDTH, DOT)
        v = _tile(value + key_heads * value_head, slot, value_row, there, E, WIDTH, DOT)
        later = tl.load(groups + own * 7 + 4)
        count = tl.load(groups + own * 7 + 5)
        FACTOR: tl.constexpr = SCALE * LOG2_E
        d_key = tl.zeros((N, WIDTH), ACC)
        d_value = tl.zeros((N, WIDTH), ACC)
        for reader in range(-1, count):
            g = tl.where(reader < 0, own, (later + reader).to(tl.int64))
            is_own = reader < 0
            first_key = tl.load(groups + g * 7 + 2)
            in_front = tl.load(groups + g * 7 + 1) - tl.load(groups + g * 7)
            num_queries = tl.load(queries + g * 3 + 1) - tl.load(queries + g * 3)
            skipped = 0
            if CAUSAL and not GATHERED:
                skipped = tl.where(is_own, offset // M * M, 0)  # queries before the first of these keys
            for head_of_group in range(RATIO):
                head = key_heads * RATIO + head_of_group
                for begin in range(skipped, num_queries, M):
                    row, valid, position = _queries(queries, rows, g, begin, first_key, in_front, M, GATHERED)
                    q = _tile(query + head * query_head, row, query_row, valid, E, WIDTH, DOT)
                    g_out = _tile(grad + head * E, row, H * E, valid, E, WIDTH, DOT)
                    lse = tl.load(log_sum_exp + head * num_rows + row, mask=valid, other=0.0)
                    delta = tl.load(deltas + head * num_rows + row, mask=valid, other=0.0)
                    scores = _product(k, tl.trans(q), ACC)
                    seen = there[:, None] & valid[None, :]
                    if CAUSAL:
                        seen = seen & (at[:, None] <= position[None, :])
                    p = tl.exp2(tl.where(seen, scores * FACTOR - lse[None, :], float("-inf")))
                    d_value += _product(p.to(DOT), g_out, ACC)
                    d_scores = p * (_product(v, tl.trans(g_out), ACC) - delta[None, :])
                    d_key += _product(d_scores.to(DOT), q, ACC)
        place = grad_key + key_heads * grad_key_head
        _put(place, slot, grad_key_row, there, d_key * SCALE, E, WIDTH)
        _put(grad_value + key_heads * grad_value_head, slot, grad_value_row, there, d_value, E, WIDTH)
