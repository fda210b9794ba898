"""Plain PyTorch pieces of the refinement block (Stage I): the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adajudge_kernels.ordered import silu, upcast


def residual_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``u = x + update`` and ``RMSNorm(u) = u / sqrt(mean(u^2) + eps) * weight``, both in the dtype of x."""
    total = upcast(x) if update is None else upcast(x) + upcast(update)
    normed = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps) * upcast(weight)
    return (x if update is None else total.to(x.dtype)), normed.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the merged projection: ``[T, 2f] -> [T, f]``."""
    gate, up = upcast(gate_up).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ranges: Tensor,
    key_ranges: Tensor,
    max_length: int,
    causal: bool,
) -> Tensor:
    """Softmax attention within each sequence: ``[T, H, e] -> [T, H, e]``, padding rows zero.

    Every attention group's queries see its earlier range (the shared prompt) and its own; each token's output
    is computed once, also where several candidates share it.
    """
    tokens = query.shape[0]
    out = query.new_zeros(tokens + 1, *query.shape[1:])  # the last row takes what is no query
    if query_ranges.shape[0] == 0 or tokens == 0:
        return out[:tokens]
    begin, end = query_ranges.long().unsqueeze(-1).unbind(1)  # [G, 1]
    start0, stop0, start1, stop1 = key_ranges.long().unsqueeze(-1).unbind(1)
    before = stop0 - start0
    position = torch.arange(max_length, device=query.device)
    real_query, real_key = position < end - begin, position < before + stop1 - start1  # [G, L]
    query_index = torch.where(real_query, begin + position, tokens)
    key_index = torch.where(position < before, start0 + position, start1 + position - before)
    key_index = torch.where(real_key, key_index, 0)
    q = query[query_index.clamp(max=tokens - 1)].transpose(1, 2)  # [G, H, L, e]
    k, v = (  # padding selected away: NaN there must not meet a zero weight
        torch.where(real_key[..., None, None], x[key_index], 0).transpose(1, 2) for x in (key, value)
    )
    seen = real_key[:, None, :].expand(-1, max_length, -1)
    if causal:
        seen = seen & (position <= (position + before)[..., None])
    # Rows that are no query see one key, so that their softmax is finite; they go to the row that is dropped.
    seen = seen | (~real_query[..., None] & (position == 0))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2).to(out.dtype)
    return out.index_put((query_index,), mixed)[:tokens]
