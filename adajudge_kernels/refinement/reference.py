"""Plain PyTorch pieces of the refinement block (Stage I): the definition of correct.

Attention goes range by range: the queries of a group see the keys before it (its shared prompt) and its own. No mask
over the whole batch is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adajudge_kernels.ordered import silu, silu_derivative, upcast
from adajudge_kernels.tables import AttentionTables

_SCORES = 1 << 22  # attention scores that the backward holds at once


def residual_rms_norm_forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``u = x + update`` and ``RMSNorm(u) = u / sqrt(mean(u^2) + eps) * weight``, both in the dtype of x.

    u is rounded to that dtype first: the norm is of what the residual stream holds, and the backward sees the same.
    """
    total = (x if update is None else (upcast(x) + upcast(update)).to(x.dtype)).contiguous()
    u = upcast(total)
    return total, (u * _inverse_norm(u, eps) * upcast(weight)).to(x.dtype)


def residual_rms_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (of the update too: they are the same) and of the weight.

    With ``n = u / rms(u)`` and ``h = weight * g``: ``du = (h - n mean(h n)) / rms(u) + g_u``.
    """
    u, g = upcast(total).contiguous(), upcast(grad_normed).contiguous()
    inverse = _inverse_norm(u, eps)
    n, h = u * inverse, g * upcast(weight)
    du = (h - n * (h * n).mean(dim=-1, keepdim=True)) * inverse
    if grad_total is not None:
        du = du + upcast(grad_total)
    return du.to(total.dtype), (g * n).sum(dim=0)


def _inverse_norm(u: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(u.square().mean(dim=-1, keepdim=True) + eps)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the merged projection: ``[T, 2f] -> [T, f]``."""
    gate, up = upcast(gate_up.contiguous()).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the merged projection, ``[T, 2f]``."""
    gate, up = upcast(gate_up).chunk(2, dim=-1)
    g = upcast(grad)
    return torch.cat([g * up * silu_derivative(gate), g * silu(gate)], dim=-1).to(gate_up.dtype)


class _Group(NamedTuple):
    """Queries ``rows`` at ``positions`` of the keys ``[before, own]``; positions count from the first of these keys."""

    rows: slice
    positions: Tensor
    one_run: bool  # of positions, none left out
    before: slice
    own: slice


def _groups(tables: AttentionTables, causal: bool) -> Iterator[_Group]:
    for (start0, stop0, start1, stop1, *_), (first, stop, _) in zip(
        tables.groups.tolist(), tables.queries.tolist(), strict=True
    ):
        if first == stop:
            continue
        if tables.rows.numel():
            tokens = tables.rows[first:stop]
            first_token, last_token = tokens[[0, -1]].tolist()
        else:
            tokens = torch.arange(first, stop, device=tables.rows.device)
            first_token, last_token = first, stop - 1
        if causal:  # nothing behind the last query is seen
            stop1 = last_token + 1
        positions = tokens - start1 + (stop0 - start0)
        one_run = last_token - first_token == stop - first - 1
        yield _Group(slice(first, stop), positions, one_run, slice(start0, stop0), slice(start1, stop1))


def _seen(group: _Group, keys: int, causal: bool) -> Tensor | None:
    """bool ``[n, m]``: which keys each query sees; None for all."""
    if not causal:
        return None
    return torch.arange(keys, device=group.positions.device) <= group.positions[:, None]


def _heads(x: Tensor, group: _Group) -> Tensor:
    """A group's keys or values, ``[heads, m, e]``."""
    if group.before.start == group.before.stop:
        return x[group.own].transpose(0, 1)
    return torch.cat([x[group.before], x[group.own]]).transpose(0, 1)


def sequence_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: AttentionTables,
    causal: bool,
    scale: float,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Attention ``[N, H, e]``, zero where there is no query; the second output is empty, nothing more is kept."""
    out = query.new_zeros(query.shape)
    grouped = key.shape[1] != query.shape[1]
    for group in _groups(tables, causal):
        q, k, v = query[group.rows].transpose(0, 1), _heads(key, group), _heads(value, group)
        queries, keys = q.shape[1], k.shape[1]
        square = causal and group.one_run and keys <= 2 * queries
        if square:  # rows of no query in front: torch skips what is_causal hides, half of all, but nothing under a mask
            q = F.pad(q, (0, 0, keys - queries, 0)) if keys > queries else q
        seen = None if square else _seen(group, keys, causal)
        mixed = F.scaled_dot_product_attention(
            q[None], k[None], v[None], seen, is_causal=square, scale=scale, enable_gqa=grouped
        )
        out[group.rows] = mixed[0, :, -queries:].transpose(0, 1)
    return out, query.new_empty(0, dtype=upcast(query[:0]).dtype)


def sequence_attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    tables: AttentionTables,
    causal: bool,
    scale: float,
) -> None:
    """Write the gradients of query, key and value; keys that several groups see sum theirs in the groups' order.

    With ``P = softmax(scale Q K^T)``: ``dV = P^T dO``, ``dP = dO V^T``, ``dS = P (dP - rowsum(P dP))``,
    ``dQ = scale dS K``, ``dK = scale dS^T Q``.
    """
    arithmetic = upcast(query[:0]).dtype
    heads, ratio = key.shape[1], query.shape[1] // key.shape[1]
    dquery = query.new_zeros(query.shape, dtype=arithmetic)
    dkey, dvalue = (x.new_zeros(x.shape, dtype=arithmetic) for x in (key, value))
    for group in _groups(tables, causal):
        k, v = (upcast(_heads(x, group)) for x in (key, value))  # [heads, m, e]
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        block = max(1, _SCORES // (query.shape[1] * k.shape[1]))
        for begin in range(group.rows.start, group.rows.stop, block):
            rows = slice(begin, min(begin + block, group.rows.stop))
            q, g = (  # [heads, ratio * n, e]: the query heads of a key head are rows of one product
                upcast(x[rows]).unflatten(1, (heads, ratio)).permute(1, 2, 0, 3).flatten(1, 2)
                for x in (query, grad)
            )
            scores = q @ k.mT * scale
            if causal:
                own = group.positions[rows.start - group.rows.start : rows.stop - group.rows.start]
                hidden = torch.arange(k.shape[1], device=own.device) > own[:, None]
                scores.unflatten(1, (ratio, -1)).masked_fill_(hidden, float("-inf"))
            p = torch.softmax(scores, dim=-1)
            dv += p.mT @ g
            ds = p * (g @ v.mT)
            ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1)
            dk += ds.mT @ q * scale
            dq = (ds @ k * scale).unflatten(1, (ratio, -1)).permute(2, 0, 1, 3)
            dquery[rows] = dq.flatten(1, 2)
        before = group.before.stop - group.before.start
        for total, part in ((dkey, dk.transpose(0, 1)), (dvalue, dv.transpose(0, 1))):
            total[group.before] += part[:before]
            total[group.own] += part[before:]
    for place, total in ((grad_query, dquery), (grad_key, dkey), (grad_value, dvalue)):
        place.copy_(total)
