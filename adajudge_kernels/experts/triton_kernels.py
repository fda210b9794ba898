"""Triton kernels of the gated expert combination.

A row's hidden layers are cut into segments of PIECES x WIDTH input features; `hidden_parts` writes each segment's share
of the pre-activations, and the kernels that have a row to themselves add the shares up in order. What is done for a row
does not depend on the other rows, nothing is summed by atomics, and all arithmetic is in `ACC` (fp32; fp64 for fp64
views), right after the load, with exact products.

Columns of the shares, in order: the H hidden units of each view's MLP, then the H_R units of the router, four times:
once for each of the views that its input ``[z_L; z_M; z_A; z_P]`` consists of, which is never put together.
Offsets of elements are int64. Names in capitals are known at compile time; the number of rows is not specialised on.
"""

import triton
import triton.language as tl

from adajudge_kernels.rounded import divided


@triton.jit(do_not_specialize=["batch"])
def hidden_parts(
    last,
    mean,
    attention,
    prompt,
    view_in_weight,
    router_in_weight,
    parts,
    batch,
    D: tl.constexpr,
    H: tl.constexpr,
    H_R: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """``W[units, segment] . z[segment]`` of ROWS rows; the tile of weights is read once and stays in registers.

    Grid (tiles of units times tiles of rows, segments); `parts` is ``[B, segments, 3 H + 4 H_R]``. The weights lie as
    ``[PIECES, UNITS, WIDTH]`` so that a warp holds whole pieces: only WIDTH is summed across lanes, and no warp waits
    for another's sum.
    """
    row_tiles = (batch + ROWS - 1) // ROWS
    tile = tl.program_id(0) // row_tiles
    first = (tl.program_id(0) % row_tiles) * ROWS
    segment = tl.program_id(1)
    start = segment * (PIECES * WIDTH)
    feature = start + tl.arange(0, PIECES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [PIECES, WIDTH]
    view, unit, units, offset = _tile_of_units(tile, H, H_R, UNITS)
    seen = (unit < units)[None, :, None] & (feature < D)[:, None, :]  # [PIECES, UNITS, WIDTH]
    if tile < 3 * ((H + UNITS - 1) // UNITS):
        rows = (view * H + unit).to(tl.int64) * D
        weights = tl.load(
            view_in_weight + rows[None, :, None] + feature[:, None, :], mask=seen, other=0.0
        ).to(ACC)
    else:
        rows = unit.to(tl.int64) * (4 * D) + view * D
        weights = tl.load(
            router_in_weight + rows[None, :, None] + feature[:, None, :], mask=seen, other=0.0
        ).to(ACC)
    states = _view(last, mean, attention, prompt, view)
    column = offset + unit
    count = tl.minimum(ROWS, batch - first)
    for index in tl.range(0, count, num_stages=3):  # two rows are on their way while one is summed
        row = first.to(tl.int64) + index
        z = tl.load(states + row * D + feature, mask=feature < D, other=0.0).to(ACC)
        shares = tl.sum(tl.sum(weights * z[:, None, :], axis=0), axis=1)  # [UNITS]
        out = parts + (row * tl.num_programs(1) + segment) * (3 * H + 4 * H_R)
        tl.store(out + column, shares, mask=unit < units)


@triton.jit
def _tile_of_units(tile, H: tl.constexpr, H_R: tl.constexpr, UNITS: tl.constexpr):
    """The view that a tile of hidden units reads, its units, how many their MLP has, the column of unit 0."""
    VIEW_TILES: tl.constexpr = (H + UNITS - 1) // UNITS
    ROUTER_TILES: tl.constexpr = (H_R + UNITS - 1) // UNITS
    if tile < 3 * VIEW_TILES:
        view = tile // VIEW_TILES
        first = (tile % VIEW_TILES) * UNITS
        units = H
        offset = view * H
    else:
        view = (tile - 3 * VIEW_TILES) // ROUTER_TILES
        first = ((tile - 3 * VIEW_TILES) % ROUTER_TILES) * UNITS
        units = H_R
        offset = 3 * H + view * H_R
    return view, first + tl.arange(0, UNITS), units, offset


@triton.jit
def _view(last, mean, attention, prompt, view):
    """The pointer of one of the four views."""
    states = last
    if view == 1:
        states = mean
    if view == 2:
        states = attention
    if view == 3:
        states = prompt
    return states


@triton.jit
def combine(
    parts,
    view_in_bias,
    view_out_weight,
    view_out_bias,
    router_in_bias,
    router_out_weight,
    router_out_bias,
    reward,
    view_scores,
    view_weights,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``s_v``, ``pi`` and ``r = sum_v pi_v s_v`` of one row from its shares. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    own = parts + b * SEGMENTS * (3 * H + 4 * H_R)
    scores = _view_scores(own, view_in_bias, view_out_weight, view_out_bias, H, H_R, SEGMENTS, UNITS, ACC)
    pi = _view_weights(own, router_in_bias, router_out_weight, router_out_bias, H, H_R, SEGMENTS, UNITS, ACC)
    v = tl.arange(0, 4)
    tl.store(view_scores + b * 3 + v, scores, mask=v < 3)
    tl.store(view_weights + b * 3 + v, pi, mask=v < 3)
    tl.store(reward + b, tl.sum(pi * scores))


@triton.jit
def _view_scores(
    own,
    in_bias,
    out_weight,
    out_bias,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``s_v``, ``[4]``; the fourth is 0."""
    v = tl.arange(0, 4)
    total = tl.zeros((4, UNITS), ACC)
    for start in range(0, H, UNITS):
        unit = start + tl.arange(0, UNITS)
        column, inside = _view_columns(unit, H)
        pre = _view_pre_activations(own, in_bias, column, inside, H, H_R, SEGMENTS, ACC)
        total += _silu(pre) * tl.load(out_weight + column, mask=inside, other=0.0).to(ACC)
    return tl.sum(total, axis=1) + tl.load(out_bias + v, mask=v < 3, other=0.0).to(ACC)


@triton.jit
def _view_weights(
    own,
    in_bias,
    out_weight,
    out_bias,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``pi``, ``[4]``; the fourth is 0."""
    v = tl.arange(0, 4)
    total = tl.zeros((4, UNITS), ACC)
    for start in range(0, H_R, UNITS):
        unit = start + tl.arange(0, UNITS)
        pre = _router_pre_activations(own, in_bias, unit, H, H_R, SEGMENTS, ACC)
        total += _silu(pre)[None, :] * _router_out_weights(out_weight, unit, H_R, ACC)
    logits = tl.sum(total, axis=1) + tl.load(out_bias + v, mask=v < 3, other=0.0).to(ACC)
    logits = tl.where(v < 3, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits))
    return divided(exponentials, tl.sum(exponentials))


@triton.jit
def _view_columns(unit, H: tl.constexpr):
    """Columns ``[4, UNITS]`` of hidden units in the three view MLPs, and which of them there are."""
    v = tl.arange(0, 4)
    return v[:, None] * H + unit[None, :], (v < 3)[:, None] & (unit < H)[None, :]


@triton.jit
def _view_pre_activations(
    own,
    in_bias,
    column,
    inside,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``[4, UNITS]`` of the view MLPs, segment by segment."""
    pre = tl.load(in_bias + column, mask=inside, other=0.0).to(ACC)
    for segment in range(SEGMENTS):
        pre += tl.load(own + segment * (3 * H + 4 * H_R) + column, mask=inside, other=0.0)
    return pre


@triton.jit
def _router_pre_activations(
    own,
    in_bias,
    unit,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``[UNITS]`` of the router, segment by segment of each view."""
    pre = tl.load(in_bias + unit, mask=unit < H_R, other=0.0).to(ACC)
    for segment in range(SEGMENTS):
        for view in tl.static_range(4):
            column = segment * (3 * H + 4 * H_R) + 3 * H + view * H_R + unit
            pre += tl.load(own + column, mask=unit < H_R, other=0.0)
    return pre


@triton.jit
def _router_out_weights(out_weight, unit, H_R: tl.constexpr, ACC: tl.constexpr):
    """``[4, UNITS]``; the fourth row is 0."""
    v = tl.arange(0, 4)
    inside = (v < 3)[:, None] & (unit < H_R)[None, :]
    return tl.load(out_weight + v[:, None] * H_R + unit[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _silu(x):
    return divided(x, 1 + tl.exp(-x))


@triton.jit
def _silu_derivative(x):
    """``sigma(x) (1 + x (1 - sigma(x)))``."""
    sigma = divided(1.0, 1 + tl.exp(-x))
    return sigma * (1 + x * (1 - sigma))


@triton.jit
def combine_backward(
    grad_reward,
    grad_scores,
    grad_weights,
    parts,
    view_in_bias,
    view_out_weight,
    view_out_bias,
    router_in_bias,
    router_out_weight,
    router_out_bias,
    grad_outputs,
    grad_hidden,
    hidden,
    H: tl.constexpr,
    H_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row's gradients of the MLPs' outputs and of the pre-activations, and the hidden layers. Grid (B,).

    ``ds_v = pi_v g_r + g_s``, ``dpi_v = s_v g_r + g_pi``, ``dlogit = pi (dpi - pi . dpi)``; `grad_outputs` is
    ``[B, 6]``: ds, then dlogit. `grad_hidden` and `hidden` are ``[B, 3 H + H_R]``.
    """
    b = tl.program_id(0).to(tl.int64)
    own = parts + b * SEGMENTS * (3 * H + 4 * H_R)
    scores = _view_scores(own, view_in_bias, view_out_weight, view_out_bias, H, H_R, SEGMENTS, UNITS, ACC)
    pi = _view_weights(own, router_in_bias, router_out_weight, router_out_bias, H, H_R, SEGMENTS, UNITS, ACC)
    v = tl.arange(0, 4)
    g = tl.load(grad_reward + b)
    d_scores = pi * g + tl.load(grad_scores + b * 3 + v, mask=v < 3, other=0.0)
    d_pi = scores * g + tl.load(grad_weights + b * 3 + v, mask=v < 3, other=0.0)
    d_logits = pi * (d_pi - tl.sum(pi * d_pi))
    tl.store(grad_outputs + b * 6 + v, d_scores, mask=v < 3)
    tl.store(grad_outputs + b * 6 + 3 + v, d_logits, mask=v < 3)
    row = b * (3 * H + H_R)
    for start in range(0, H, UNITS):
        unit = start + tl.arange(0, UNITS)
        column, inside = _view_columns(unit, H)
        pre = _view_pre_activations(own, view_in_bias, column, inside, H, H_R, SEGMENTS, ACC)
        w = tl.load(view_out_weight + column, mask=inside, other=0.0).to(ACC)
        tl.store(grad_hidden + row + column, d_scores[:, None] * w * _silu_derivative(pre), mask=inside)
        tl.store(hidden + row + column, _silu(pre), mask=inside)
    for start in range(0, H_R, UNITS):
        unit = start + tl.arange(0, UNITS)
        pre = _router_pre_activations(own, router_in_bias, unit, H, H_R, SEGMENTS, ACC)
        w = _router_out_weights(router_out_weight, unit, H_R, ACC)
        d_pre = tl.sum(d_logits[:, None] * w, axis=0) * _silu_derivative(pre)
        tl.store(grad_hidden + row + 3 * H + unit, d_pre, mask=unit < H_R)
        tl.store(hidden + row + 3 * H + unit, _silu(pre), mask=unit < H_R)


@triton.jit(do_not_specialize=["batch"])
def view_gradients(
    grad_hidden,
    view_in_weight,
    router_in_weight,
    grad_last,
    grad_mean,
    grad_attention,
    grad_prompt,
    batch,
    D: tl.constexpr,
    H: tl.constexpr,
    H_R: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dz_v = W_v^T dpre_v + W_r[:, v]^T dpre_r`` of ROWS rows and WIDTH features, the prompt's without the first term.
    Grid (tiles of rows, blocks of D, 4 views)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    view = tl.program_id(2)
    rows = grad_hidden + row[:, None] * (3 * H + H_R)
    present = row[:, None] < batch
    total = tl.zeros((ROWS, WIDTH), ACC)
    if view < 3:
        weights = view_in_weight + view.to(tl.int64) * H * D
        total = _through(rows + view * H, present, weights, feature, total, H, D, D, UNITS, ACC)
    total = _through(
        rows + 3 * H, present, router_in_weight + view * D, feature, total, H_R, D, 4 * D, UNITS, ACC
    )
    out = _view(grad_last, grad_mean, grad_attention, grad_prompt, view)
    inside = present & (feature < D)[None, :]
    _store(out + row[:, None] * D + feature[None, :], total, inside)


@triton.jit
def _through(
    rows,
    present,
    weights,
    feature,
    total,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """`total` ``[ROWS, WIDTH]`` and the gradients of N hidden units, times their weights (rows STRIDE apart)."""
    for start in range(0, N, UNITS):
        unit = start + tl.arange(0, UNITS)
        g = tl.load(rows + unit[None, :], mask=present & (unit < N)[None, :], other=0.0)
        inside = (unit < N)[:, None] & (feature < D)[None, :]
        w = tl.load(weights + unit.to(tl.int64)[:, None] * STRIDE + feature[None, :], mask=inside, other=0.0)
        total = tl.dot(g, w.to(ACC), total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit(do_not_specialize=["batch"])
def weight_gradients(
    grad_hidden,
    last,
    mean,
    attention,
    prompt,
    grad_view_in_weight,
    grad_router_in_weight,
    batch,
    D: tl.constexpr,
    H: tl.constexpr,
    H_R: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
):
    """``dW = sum_b dpre_b z_b^T`` of a tile of hidden units and WIDTH features of the view they read, rows in order.
    Grid (tiles of units, blocks of D)."""
    tile = tl.program_id(0)
    feature = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    view, unit, units, _ = _tile_of_units(tile, H, H_R, UNITS)
    is_view = tile < 3 * ((H + UNITS - 1) // UNITS)
    column = unit + (view * H if is_view else 3 * H)
    states = _view(last, mean, attention, prompt, view)
    total = tl.zeros((UNITS, WIDTH), ACC)
    for start in range(0, batch, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (unit < units)[:, None] & (row < batch)[None, :]
        g = tl.load(grad_hidden + row[None, :] * (3 * H + H_R) + column[:, None], mask=inside, other=0.0)
        inside = (row < batch)[:, None] & (feature < D)[None, :]
        z = tl.load(states + row[:, None] * D + feature[None, :], mask=inside, other=0.0).to(ACC)
        total = tl.dot(g, z, total, input_precision="ieee", out_dtype=ACC)
    inside = (unit < units)[:, None] & (feature < D)[None, :]
    if is_view:
        out = (view * H + unit).to(tl.int64)[:, None] * D + feature[None, :]
        _store(grad_view_in_weight + out, total, inside)
    else:
        out = unit.to(tl.int64)[:, None] * (4 * D) + view * D + feature[None, :]
        _store(grad_router_in_weight + out, total, inside)


@triton.jit(do_not_specialize=["batch"])
def vector_gradients(
    grad_outputs,
    grad_hidden,
    hidden,
    grad_view_in_bias,
    grad_view_out_weight,
    grad_view_out_bias,
    grad_router_in_bias,
    grad_router_out_weight,
    grad_router_out_bias,
    batch,
    H: tl.constexpr,
    H_R: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of the biases and the output weights: sums over rows, in order. Grid (blocks of columns + 1,).

    ``db_in = sum_b dpre``, ``dw_out = sum_b dout hidden``; the last program sums the MLPs' outputs.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _output_biases(grad_outputs, grad_view_out_bias, grad_router_out_bias, batch, ROWS, ACC)
    else:
        column = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
        is_view = column < 3 * H
        is_router = (column >= 3 * H) & (column < 3 * H + H_R)
        first = tl.where(is_view, column // H, 3)  # of the outputs that a unit reaches
        bias = tl.zeros((UNITS,), ACC)
        out0 = tl.zeros((UNITS,), ACC)
        out1 = tl.zeros((UNITS,), ACC)
        out2 = tl.zeros((UNITS,), ACC)
        for start in range(0, batch, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            inside = (row < batch) & (is_view | is_router)[None, :]
            more = inside & is_router[None, :]
            place = row * (3 * H + H_R) + column[None, :]
            bias += tl.sum(tl.load(grad_hidden + place, mask=inside, other=0.0), axis=0)
            a = tl.load(hidden + place, mask=inside, other=0.0)
            outputs = grad_outputs + row * 6 + first[None, :]
            out0 += tl.sum(a * tl.load(outputs, mask=inside, other=0.0), axis=0)
            out1 += tl.sum(a * tl.load(outputs + 1, mask=more, other=0.0), axis=0)
            out2 += tl.sum(a * tl.load(outputs + 2, mask=more, other=0.0), axis=0)
        _store(grad_view_in_bias + column, bias, is_view)
        _store(grad_view_out_weight + column, out0, is_view)
        unit = column - 3 * H
        _store(grad_router_in_bias + unit, bias, is_router)
        _store(grad_router_out_weight + unit, out0, is_router)
        _store(grad_router_out_weight + H_R + unit, out1, is_router)
        _store(grad_router_out_weight + 2 * H_R + unit, out2, is_router)


@triton.jit
def _output_biases(
    grad_outputs, grad_view_out_bias, grad_router_out_bias, batch, ROWS: tl.constexpr, ACC: tl.constexpr
):
    """``db_out = sum_b dout`` of the three view MLPs and of the router's three outputs."""
    output = tl.arange(0, 8)
    total = tl.zeros((8,), ACC)
    for start in range(0, batch, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < batch) & (output < 6)[None, :]
        total += tl.sum(tl.load(grad_outputs + row * 6 + output[None, :], mask=inside, other=0.0), axis=0)
    _store(grad_view_out_bias + output, total, output < 3)
    _store(grad_router_out_bias + output - 3, total, (output >= 3) & (output < 6))


@triton.jit
def _store(pointers, values, mask):
    """Store in the dtype that lies there."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
