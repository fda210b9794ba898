"""The pooling operations on Triton kernels: what is launched, in which order, with which scratch memory.

Scratch is two fp32 numbers per chunk of `CHUNK_TOKENS` tokens and feature in the forward (2 / 64 of a state's numbers),
one in the backward. Rows wider than `widest_row` do not fit a program's registers: their logits are
computed first, and the states are read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adajudge_kernels.launches import (
    FUSED,
    ON_AMD,
    TRITON_DTYPES,
    aligned,
    device_of,
    narrow_block,
    parts,
    power_of_2,
    sum_rows,
)
from adajudge_kernels.pooling import backward_kernels
from adajudge_kernels.pooling import triton_kernels as kernels
from adajudge_kernels.pooling.configurations import COMBINED_CHUNKS, Tile, tile, widest_row
from adajudge_kernels.registration import arithmetic_dtype
from adajudge_kernels.tables import CHUNK_TOKENS, LayoutTables


def depth_gate_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha [B, K]``, ``z_P [B, d]`` and the context ``c [B, d]``."""
    hidden, weight, bias = aligned(hidden), aligned(weight), aligned(bias)
    acc, batch, (depths, d) = arithmetic_dtype(hidden.dtype), tables.sequences.shape[0], weight.shape
    alpha = hidden.new_empty(batch, depths, dtype=acc)
    prompt_mean, context = (hidden.new_empty(batch, d, dtype=acc) for _ in range(2))
    if batch:
        with device_of(hidden):
            sums = _sums(hidden, tables, prompt=True, response=True)
            _combine_sums(sums, tables, prompt=prompt_mean, everything=context)
            kernels.gate[(batch,)](
                context,
                weight,
                bias,
                alpha,
                D=d,
                K=depths,
                DEPTHS=power_of_2(depths),
                BLOCK=max(16, min(1024, power_of_2(d))),
                ACC=TRITON_DTYPES[acc],
                num_warps=4,
                **FUSED,
            )
    return alpha, prompt_mean, context


def masked_mean_pool_forward(hidden: Tensor, tables: LayoutTables, max_length: int, which: str) -> Tensor:
    """Mean over the tokens that `which` names, ``[B, d]``; zero where there are none."""
    hidden = aligned(hidden)
    pooled = hidden.new_empty(
        tables.sequences.shape[0], hidden.shape[1], dtype=arithmetic_dtype(hidden.dtype)
    )
    if pooled.shape[0]:
        with device_of(hidden):
            sums = _sums(hidden, tables, prompt=which != "response", response=which != "prompt")
            name = "everything" if which == "all" else which
            _combine_sums(sums, tables, **{name: pooled})
    return pooled


def multi_view_pool_forward(
    states: list[Tensor],
    depth_weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z_L, z_M, z_A``, each ``[B, d]``, and the log-sum-exp ``[B]`` of the attention view."""
    return _views_forward(states, depth_weights, weight, bias, tables, response_only)


def attention_pool_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int, response_only: bool
) -> tuple[Tensor, Tensor]:
    """``z_A [B, d]`` of one state, and the log-sum-exp ``[B]``."""
    _, _, attention, log_sum_exp = _views_forward([hidden], None, weight, bias, tables, response_only)
    return attention, log_sum_exp


def multi_view_pool_backward(
    grad_last: Tensor,
    grad_mean: Tensor,
    grad_attention: Tensor,
    states: list[Tensor],
    depth_weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    attention: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of the states, the depth weights, the attention weight and bias (whose gradient is zero)."""
    grads = grad_last, grad_mean, grad_attention
    dstates, dalpha, dweight = _views_backward(
        grads, states, depth_weights, weight, bias, attention, log_sum_exp, tables, response_only
    )
    return dstates, dalpha, dweight, dweight.new_zeros(1)


def attention_pool_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    pooled: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias."""
    grads = None, None, grad
    (dhidden,), _, dweight = _views_backward(
        grads, [hidden], None, weight, bias, pooled, log_sum_exp, tables, response_only
    )
    return dhidden, dweight, dweight.new_zeros(1)


def _views_forward(
    states: Sequence[Tensor],
    depth_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    response_only: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All views with depth weights, the attention view alone without (the other two then hold nothing)."""
    states = tuple(aligned(x) for x in states)
    weight, bias = aligned(weight), aligned(bias)
    all_views = depth_weights is not None
    alpha = weight if depth_weights is None else aligned(depth_weights)
    d, batch, chunks = states[0].shape[1], tables.sequences.shape[0], tables.chunks.shape[0]
    acc = arithmetic_dtype(states[0].dtype)
    last, mean, attention = (states[0].new_empty(batch, d, dtype=acc) for _ in range(3))
    log_sum_exp = states[0].new_empty(batch, dtype=acc)
    if not batch:
        return last, mean, attention, log_sum_exp
    wide = d > widest_row("scan", len(states), states[0].dtype)
    plan = tile("scan", d, len(states), states[0].dtype)
    weighted = states[0].new_empty(chunks, d, dtype=acc)
    sums = states[0].new_empty(chunks, d, dtype=acc) if all_views else weighted
    tops, totals = (states[0].new_empty(chunks, dtype=acc) for _ in range(2))
    with device_of(states[0]):
        logits = tops
        if wide:
            logits = states[0].new_empty(chunks * CHUNK_TOKENS, dtype=acc)
            _dots(states, alpha, weight, bias, tables, all_views, response_only, logits)
        kernels.scan[(chunks, parts(d, plan.block))](
            states,
            alpha,
            weight,
            bias,
            logits,
            tables.roles,
            tables.sequences,
            tables.chunks,
            last,
            sums,
            sums,
            weighted,
            tops,
            totals,
            D=d,
            K=len(states),
            WEIGHTED=all_views,
            LAST=all_views,
            PROMPT_SUM=False,
            RESPONSE_SUM=all_views,
            ATTENTION=True,
            RESPONSE_ONLY=response_only,
            LOGITS_GIVEN=wide,
            STAGES=plan.stages,
            **_constants(plan, acc),
        )
        block = narrow_block(d)
        kernels.combine_views[(batch, parts(d, block))](
            weighted,
            tops,
            totals,
            sums,
            tables.sequences,
            attention,
            log_sum_exp,
            mean,
            D=d,
            RESPONSE_MEAN=all_views,
            CHUNK=CHUNK_TOKENS,
            ROWS=COMBINED_CHUNKS,
            BLOCK=block,
            ACC=TRITON_DTYPES[acc],
            num_warps=4,
            **FUSED,
        )
    return last, mean, attention, log_sum_exp


def _views_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor],
    states: Sequence[Tensor],
    depth_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    pooled: Tensor,
    log_sum_exp: Tensor,
    tables: LayoutTables,
    response_only: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of states, depth weights and attention weight."""
    states = tuple(aligned(x) for x in states)
    weight, bias = aligned(weight), aligned(bias)
    all_views = depth_weights is not None
    alpha = weight if depth_weights is None else aligned(depth_weights)
    last, mean, attention = (pooled if grad is None else aligned(grad) for grad in grads)
    d, depths = states[0].shape[1], len(states)
    batch, chunks = tables.sequences.shape[0], tables.chunks.shape[0]
    acc = arithmetic_dtype(states[0].dtype)
    dalpha = states[0].new_empty(batch, depths, dtype=acc)
    if not batch:
        return [torch.zeros_like(x) for x in states], dalpha, weight.new_zeros(d, dtype=acc)
    dstates = [torch.empty_like(x) for x in states]
    shared = tables.groups.shape[0] != batch
    wide = d > widest_row("scan_backward", depths, states[0].dtype)
    plan = tile("scan_backward", d, depths, states[0].dtype)
    blocks = parts(d, plan.block)
    constants = {"D": d, "K": depths, "WEIGHTED": all_views}
    per_token = [states[0].new_empty(chunks * CHUNK_TOKENS, dtype=acc) for _ in range(2 * wide + 2 * shared)]
    logits, dots = per_token[:2] if wide else (weight, weight)
    betas, dlogits = per_token[-2:] if shared else (weight, weight)
    dalpha_parts = states[0].new_empty(chunks * blocks, depths, dtype=acc)
    dweight_parts = states[0].new_empty(chunks, d, dtype=acc)
    with device_of(states[0]):
        if wide:
            _dots(
                states, alpha, weight, bias, tables, all_views, response_only, logits, attention, pooled, dots
            )
        backward_kernels.scan_backward[(chunks, blocks)](
            states,
            tuple(dstates),
            alpha,
            weight,
            bias,
            logits,
            dots,
            last,
            mean,
            attention,
            pooled,
            log_sum_exp,
            tables.roles,
            tables.sequences,
            tables.chunks,
            betas,
            dlogits,
            dalpha_parts,
            dweight_parts,
            VIEWS=all_views,
            RESPONSE_ONLY=response_only,
            SHARED=shared,
            DOTS_GIVEN=wide,
            **constants,
            STAGES=plan.stages,
            **_constants(plan, acc),
        )
        if shared:
            spread = tile("spread_attention", d, depths, states[0].dtype)
            backward_kernels.spread_attention[(tables.group_chunks.shape[0], parts(d, spread.block))](
                tuple(dstates),
                alpha,
                weight,
                attention,
                betas,
                dlogits,
                tables.sequences,
                tables.groups,
                tables.group_chunks,
                RESPONSE_ONLY=response_only,
                **constants,
                **_constants(spread, acc),
            )
        else:
            _zero_padding(dstates, tables)
        if all_views:
            backward_kernels.sum_alpha_parts[(batch,)](
                dalpha_parts,
                tables.sequences,
                dalpha,
                K=depths,
                DEPTHS=power_of_2(depths),
                BLOCKS=blocks,
                CHUNK=CHUNK_TOKENS,
                ROWS=COMBINED_CHUNKS,
                ACC=TRITON_DTYPES[acc],
                num_warps=1,
                **FUSED,
            )
        return dstates, dalpha, sum_rows(dweight_parts)


def _dots(
    states: tuple[Tensor, ...],
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    weighted: bool,
    response_only: bool,
    logits: Tensor,
    grad: Tensor | None = None,
    pooled: Tensor | None = None,
    grad_dots: Tensor | None = None,
) -> None:
    plan = tile("dots", states[0].shape[1], len(states), states[0].dtype)
    kernels.dots[(tables.chunks.shape[0],)](
        states,
        alpha,
        weight,
        bias,
        logits if grad is None else grad,
        logits if pooled is None else pooled,
        tables.roles,
        tables.sequences,
        tables.chunks,
        logits,
        logits if grad_dots is None else grad_dots,
        D=states[0].shape[1],
        K=len(states),
        WEIGHTED=weighted,
        RESPONSE_ONLY=response_only,
        BACKWARD=grad is not None,
        **_constants(plan, logits.dtype),
    )


Sums = tuple[Tensor | None, Tensor | None]


def _sums(hidden: Tensor, tables: LayoutTables, prompt: bool, response: bool) -> Sums:
    """Each chunk's sum over its prompt tokens and over its response tokens, ``[N, d]``."""
    chunks, d = tables.chunks.shape[0], hidden.shape[1]
    acc = arithmetic_dtype(hidden.dtype)
    sums = [hidden.new_empty(chunks, d, dtype=acc) if wanted else None for wanted in (prompt, response)]
    plan = tile("sums", d, 1, hidden.dtype)
    prompt_sums, response_sums = (hidden if x is None else x for x in sums)
    kernels.scan[(chunks, parts(d, plan.block))](
        (hidden,),
        hidden,
        hidden,
        hidden,
        hidden,
        tables.roles,
        tables.sequences,
        tables.chunks,
        hidden,
        prompt_sums,
        response_sums,
        hidden,
        hidden,
        hidden,
        D=d,
        K=1,
        WEIGHTED=False,
        LAST=False,
        PROMPT_SUM=prompt,
        RESPONSE_SUM=response,
        ATTENTION=False,
        RESPONSE_ONLY=False,
        LOGITS_GIVEN=False,
        STAGES=plan.stages,
        **_constants(plan, acc),
    )
    return sums[0], sums[1]


def _combine_sums(
    sums: Sums,
    tables: LayoutTables,
    prompt: Tensor | None = None,
    response: Tensor | None = None,
    everything: Tensor | None = None,
) -> None:
    """Write the means that have a place to go to."""
    out = next(x for x in (prompt, response, everything) if x is not None)
    batch, d = out.shape
    block = narrow_block(d)
    kernels.combine_sums[(batch, parts(d, block))](
        *(out if x is None else x for x in sums),
        tables.sequences,
        *(out if x is None else x for x in (prompt, response, everything)),
        D=d,
        PROMPT_MEAN=prompt is not None,
        RESPONSE_MEAN=response is not None,
        ALL_MEAN=everything is not None,
        CHUNK=CHUNK_TOKENS,
        ROWS=COMBINED_CHUNKS,
        BLOCK=block,
        ACC=TRITON_DTYPES[out.dtype],
        num_warps=4,
        **FUSED,
    )


def spread_means(
    tables: LayoutTables,
    max_length: int,
    dtype: torch.dtype,
    prompt: Tensor | None = None,
    response: Tensor | None = None,
    everything: Tensor | None = None,
) -> Tensor:
    """``[T, d]`` from the gradients ``[B, d]`` of the means that were taken."""
    grads = [None if x is None else aligned(x) for x in (prompt, response, everything)]
    given = next(x for x in grads if x is not None)
    batch, d = given.shape
    if not batch:
        return given.new_zeros(tables.roles.shape[0], d, dtype=dtype)
    out = given.new_empty(tables.roles.shape[0], d, dtype=dtype)
    plan = tile("spread_means", d, 1, dtype)
    with device_of(out):
        backward_kernels.spread_means[(tables.group_chunks.shape[0], parts(d, plan.block))](
            *(given if x is None else x for x in grads),
            tables.roles,
            tables.sequences,
            tables.groups,
            tables.group_chunks,
            out,
            D=d,
            PROMPT_MEAN=prompt is not None,
            RESPONSE_MEAN=response is not None,
            ALL_MEAN=everything is not None,
            **_constants(plan, given.dtype),
        )
        if tables.groups.shape[0] == batch:
            _zero_padding([out], tables)
    return out


def _zero_padding(outputs: list[Tensor], tables: LayoutTables) -> None:
    tokens, d = outputs[0].shape
    backward_kernels.zero_padding[(parts(tokens, CHUNK_TOKENS),)](
        tuple(outputs),
        tables.roles,
        tokens,
        D=d,
        K=len(outputs),
        TOKENS=CHUNK_TOKENS,
        BLOCK=min(64, narrow_block(d)),
        num_warps=4,
        **FUSED,
    )


def _constants(plan: Tile, acc: torch.dtype) -> dict[str, object]:
    constants = {
        "CHUNK": CHUNK_TOKENS,
        "TOKENS": plan.tokens,
        "BLOCK": plan.block,
        "ACC": TRITON_DTYPES[acc],
        "num_warps": plan.warps,
        "num_stages": plan.stages,
        **FUSED,
    }
    if plan.registers is not None and not ON_AMD:
        constants["maxnreg"] = plan.registers
    return constants
