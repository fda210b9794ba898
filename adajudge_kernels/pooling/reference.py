"""Plain PyTorch pooling: the definition of correct, readable next to the paper's equations (Stages I and II).

Tokens are gathered into a dense ``[B, L, d]`` block, L the longest sequence, and everything is a masked sum over
it. Sums have a fixed binary tree counted from each sequence's own start, so a sequence's result has the same bits
whatever else is in the batch and however it is laid out: trailing zeros add nothing, and every other step is
elementwise. Arithmetic is fp32 (fp64 for fp64 states).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adajudge_kernels.layout import LayoutTables, TokenRole
from adajudge_kernels.ordered import sum_features, sum_tokens, upcast


class Tokens(NamedTuple):
    """The dense view of a layout: which token slot is the i-th token of sequence b, and what it is."""

    slot: Tensor  # [B, L] int64, slot in [0, T); 0 where there is no token
    valid: Tensor  # [B, L] bool
    response: Tensor  # [B, L] bool


def dense_tokens(tables: LayoutTables, max_length: int) -> Tokens:
    """Virtual positions 0..L-1 of every sequence run through its first range, then through its second."""
    start0, stop0, start1, stop1 = tables.ranges.long().unsqueeze(-1).unbind(1)  # each [B, 1]
    position = torch.arange(max_length, device=tables.roles.device)
    first = stop0 - start0
    index = torch.where(position < first, start0 + position, start1 + position - first)
    valid = position < first + stop1 - start1
    index = torch.where(valid, index, 0)
    response = valid & (tables.roles[index] == TokenRole.RESPONSE) if tables.roles.numel() else valid
    return Tokens(index, valid, response)


def tokens_in_view(tables: LayoutTables, max_length: int, response_only: bool) -> Tokens:
    """What the attention view sees; what it does not see (and no other view reads) is as if it were not there."""
    tokens = dense_tokens(tables, max_length)
    return tokens._replace(valid=tokens.response) if response_only else tokens


def gather(states: Tensor, tokens: Tokens) -> Tensor:
    """``[T, d] -> [B, L, d]`` in arithmetic precision, zero where there is no token (selected, not multiplied)."""
    if tokens.slot.numel() == 0:
        return upcast(states.new_zeros(*tokens.slot.shape, states.shape[1]))
    return torch.where(tokens.valid.unsqueeze(-1), upcast(states[tokens.slot]), 0)


def add_to_tokens(values: Tensor, tokens: Tokens, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """``[B, L, d] -> [T, d]``: what all readers of a token say of it, summed in a fixed order."""
    total = values.new_zeros(num_tokens, values.shape[-1])
    index = tokens.slot.flatten()
    rows = selected(tokens.valid.unsqueeze(-1), values).flatten(0, 1)
    # Both are deterministic sums: index_add_ walks in order on the CPU, index_put_ sorts on CUDA.
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    elif num_tokens:
        total.index_add_(0, index, rows)
    return total.to(dtype)


def selected(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, else zero."""
    return torch.where(mask, values, 0)


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """``sum_t m_t h_t / sum_t m_t``: ``[B, L, d], [B, L] -> [B, d]``, zero where nothing is selected."""
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return sum_tokens(selected(mask.unsqueeze(-1), states)) / count


def attention_scores(refined: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``beta = softmax_t(w_a . h_t + b_a)`` over `mask`: ``[B, L]``, and the log-sum-exp ``[B]``."""
    logits = sum_features(refined * upcast(weight)) + upcast(bias)
    logits = torch.where(mask, logits, float("-inf"))
    if logits.shape[1] == 0:
        return logits, logits.sum(dim=1)
    top = logits.amax(dim=1, keepdim=True)
    weights = selected(mask, torch.exp(logits - top))
    total = sum_tokens(weights.unsqueeze(-1)).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights / total, (top + torch.log(total)).squeeze(1)


def mix_depths(states: list[Tensor], depth_weights: Tensor, tokens: Tokens) -> Tensor:
    """``H~_t = sum_k alpha_k H_k,t``: K times ``[T, d]``, ``[B, K] -> [B, L, d]``."""
    refined = gather(states[0], tokens) * upcast(depth_weights[:, 0, None, None])
    for k in range(1, len(states)):
        refined = refined + gather(states[k], tokens) * upcast(depth_weights[:, k, None, None])
    return refined


def depth_gate_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, tables: LayoutTables, max_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``alpha [B, K]``, ``z_P [B, d]`` and the context ``c [B, d]``."""
    tokens = dense_tokens(tables, max_length)
    states = gather(hidden, tokens)
    context = mean_over(states, tokens.valid)
    logits = sum_features(context.unsqueeze(1) * upcast(weight)) + upcast(bias)
    exponentials = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    alpha = exponentials / sum_features(exponentials).unsqueeze(1)
    return alpha, mean_over(states, tokens.valid & ~tokens.response), context


def spread_means(
    tables: LayoutTables,
    max_length: int,
    dtype: torch.dtype,
    prompt: Tensor | None = None,
    response: Tensor | None = None,
    everything: Tensor | None = None,
) -> Tensor:
    """``[T, d]`` from the gradients ``[B, d]`` of means: ``dh_t = m_t / n g``, summed over the means that were taken."""
    tokens = dense_tokens(tables, max_length)
    masks = tokens.valid & ~tokens.response, tokens.response, tokens.valid
    total = None
    for mask, grad in zip(masks, (prompt, response, everything), strict=True):
        if grad is not None:
            per_token = grad / mask.sum(dim=1, keepdim=True).clamp(min=1)
            part = selected(mask[..., None], per_token[:, None])
            total = part if total is None else total + part
    assert total is not None
    return add_to_tokens(total, tokens, tables.roles.shape[0], dtype)


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
    tokens = tokens_in_view(tables, max_length, response_only)
    refined = mix_depths(states, depth_weights, tokens)
    beta, log_sum_exp = attention_scores(refined, weight, bias, tokens.valid)
    last = sum_tokens(selected((tokens.slot == tables.last_response[:, None])[..., None], refined))
    return last, mean_over(refined, tokens.response), sum_tokens(refined * beta.unsqueeze(-1)), log_sum_exp


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
    """Gradients of the states, the depth weights, the attention weight and bias.

    ``g_t = [t=tau] g_L + m_t/n g_M + beta_t g_A + dlogit_t w_a`` with ``dlogit_t = beta_t (g_A . (H~_t - z_A))``;
    then ``dH_k,t = alpha_k g_t`` and ``dalpha_k = sum_t g_t . H_k,t``. ``dw_a = sum_t dlogit_t (H~_t - z_A)``: the
    dlogit of a sequence sum to zero, so z_A changes only how states far from zero are rounded. The bias shifts all logits
    of a softmax alike: its gradient, ``sum_t dlogit_t``, is zero, and is returned as such instead of as rounding noise.
    """
    tokens = tokens_in_view(tables, max_length, response_only)
    refined = mix_depths(states, depth_weights, tokens)
    logits = sum_features(refined * upcast(weight)) + upcast(bias)
    beta = torch.exp(torch.where(tokens.valid, logits - log_sum_exp[:, None], float("-inf")))
    dlogits = beta * ((refined - attention[:, None]) * grad_attention[:, None]).sum(dim=-1)
    is_last = (tokens.slot == tables.last_response[:, None]) & tokens.valid
    dmean = grad_mean / tokens.response.sum(dim=1, keepdim=True).clamp(min=1)
    drefined = (
        selected(is_last[..., None], grad_last[:, None])
        + selected(tokens.response[..., None], dmean[:, None])
        + beta[..., None] * grad_attention[:, None]
        + dlogits[..., None] * upcast(weight)
    )
    dstates = [
        add_to_tokens(drefined * upcast(depth_weights[:, k, None, None]), tokens, state.shape[0], state.dtype)
        for k, state in enumerate(states)
    ]
    dalpha = torch.stack([(drefined * gather(state, tokens)).sum(dim=(1, 2)) for state in states], dim=1)
    dweight = (dlogits[..., None] * (refined - attention[:, None])).sum(dim=(0, 1))
    return dstates, dalpha, dweight, dlogits.new_zeros(1)


def _token_mask(tokens: Tokens, which: str) -> Tensor:
    if which == "response":
        return tokens.response
    return tokens.valid & ~tokens.response if which == "prompt" else tokens.valid


def masked_mean_pool_forward(hidden: Tensor, tables: LayoutTables, max_length: int, which: str) -> Tensor:
    """Mean over the tokens that `which` names, ``[B, d]``; zero where there are none."""
    tokens = dense_tokens(tables, max_length)
    return mean_over(gather(hidden, tokens), _token_mask(tokens, which))


def attention_pool_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    tables: LayoutTables,
    max_length: int,
    response_only: bool,
) -> tuple[Tensor, Tensor]:
    """``z_A [B, d]`` of one state, and the log-sum-exp ``[B]``."""
    tokens = tokens_in_view(tables, max_length, response_only)
    states = gather(hidden, tokens)
    beta, log_sum_exp = attention_scores(states, weight, bias, tokens.valid)
    return sum_tokens(states * beta.unsqueeze(-1)), log_sum_exp


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
    """Gradients of hidden, weight and bias: the attention terms of `multi_view_pool_backward`."""
    tokens = tokens_in_view(tables, max_length, response_only)
    states = gather(hidden, tokens)
    logits = sum_features(states * upcast(weight)) + upcast(bias)
    beta = torch.exp(torch.where(tokens.valid, logits - log_sum_exp[:, None], float("-inf")))
    dlogits = beta * ((states - pooled[:, None]) * grad[:, None]).sum(dim=-1)
    dstates = beta[..., None] * grad[:, None] + dlogits[..., None] * upcast(weight)
    dhidden = add_to_tokens(dstates, tokens, hidden.shape[0], hidden.dtype)
    dweight = (dlogits[..., None] * (states - pooled[:, None])).sum(dim=(0, 1))
    return dhidden, dweight, dlogits.new_zeros(1)
