"""The head, and its pooling alone, as people write them in plain PyTorch: padded ``[B, L, d]`` states, masks, one operation
after the other.

It takes an `AdaJudgeHead`'s weights and gives its rewards (a test compares them), so that the two sides of a benchmark do the
same work.
"""

import torch
import torch.nn.functional as F

from benchmarks.case import widened


def eager_head(head, hidden, attention_mask, response_mask):
    """Rewards ``[B]`` of right-padded states ``[B, L, d]``; masks ``[B, L]`` of ones and zeros."""
    real, response = attention_mask.bool(), (response_mask * attention_mask).bool()
    states, depth_weights, prompt_mean = eager_refinement(head.refinement, hidden, real, response)
    attended = response if head.pooling.attention_tokens == "response" else real
    pooling = head.pooling.attention_weight, head.pooling.attention_bias
    views = eager_pooling(states, depth_weights, *pooling, attended, response)
    return eager_experts(head.experts, views, prompt_mean)


def eager_refinement(refinement, hidden, real, response):
    """K states ``[B, L, d]``, depth weights ``[B, K]`` and prompt mean ``[B, d]``."""
    context, prompt_mean = masked_means(hidden, real, real & ~response)
    depth_weights = torch.softmax(F.linear(context, refinement.gate.weight, refinement.gate.bias), dim=1)
    states = []
    for block in refinement.blocks:
        hidden = eager_block(block, hidden)
        states.append(hidden)
    return states, depth_weights, prompt_mean


def eager_pooling(states, alpha, weight, bias, attention_mask, response_mask):
    """Last, mean and attention view of K states ``[B, L, d]``, in their dtype; bool masks ``[B, L]``."""
    refined = alpha[:, 0, None, None] * states[0]
    for k in range(1, len(states)):
        refined = refined + alpha[:, k, None, None] * states[k]
    logits = (refined @ weight + bias).masked_fill(~attention_mask, float("-inf"))
    beta = torch.softmax(logits, dim=1)
    response = response_mask.unsqueeze(-1).to(refined.dtype)
    mean = (refined * response).sum(dim=1) / response.sum(dim=1)
    return refined[last_tokens(response_mask)], mean, (beta.unsqueeze(-1) * refined).sum(dim=1)


def eager_pooling_as_products(states, alpha, weight, bias, attention_mask, response_mask):
    """The same without a mixed state: its logit and its sums are mixed instead, which the states' matrix products give."""
    shares = alpha.unbind(1)
    logits = (
        sum(share[:, None] * (state @ weight) for share, state in zip(shares, states, strict=True)) + bias
    )
    beta = torch.softmax(logits.masked_fill(~attention_mask, float("-inf")), dim=1)
    mean = response_mask / response_mask.sum(dim=1, keepdim=True)
    weights = torch.stack([mean.to(beta.dtype), beta], dim=1)
    last = last_tokens(response_mask)
    mixed = sum(
        share[:, None, None] * torch.cat([state[last][:, None], weights @ state], dim=1)
        for share, state in zip(shares, states, strict=True)
    )
    return mixed.unbind(1)


def eager_packed_pooling(states, alpha, weight, bias, sequence, response, last):
    """The same of packed states ``[T, d]``: `sequence` and `response` say of each token whose it is, and whether it is of a
    response; `last` is the row of each sequence's last token."""
    count, d = len(last), states[0].shape[1]
    refined = alpha[sequence, 0, None] * states[0]
    for k in range(1, len(states)):
        refined = refined + alpha[sequence, k, None] * states[k]
    logits = widened(refined @ weight + bias)
    top = logits.new_full((count,), float("-inf")).scatter_reduce(0, sequence, logits, "amax")
    exponentials = torch.exp(logits - top[sequence])
    beta = exponentials / logits.new_zeros(count).index_add(0, sequence, exponentials)[sequence]
    zeros = torch.zeros(count, d, device=refined.device)
    attention = zeros.index_add(0, sequence, beta[:, None] * refined)
    total = zeros.index_add(0, sequence[response], widened(refined[response]))
    counts = torch.bincount(sequence[response], minlength=count)
    return refined[last], total / counts[:, None], attention


def last_tokens(response_mask):
    """Where the last response token of each sequence is, for ``states[...]``."""
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    rows = torch.arange(len(response_mask), device=response_mask.device)
    return rows, (position * response_mask).argmax(dim=1)


def masked_means(hidden, *masks):
    """Means over the tokens of each mask ``[B, L]``, ``[B, d]`` each: one matrix product, which reads the states once."""
    weights = torch.stack([mask / mask.sum(dim=1, keepdim=True).clamp(min=1) for mask in masks], dim=1)
    return (weights.to(hidden.dtype) @ hidden).unbind(1)


def eager_block(block, hidden):
    """A block on right-padded states: causal attention lets no token see the padding behind it, so no mask is needed."""
    batch, length, d = hidden.shape
    normed = F.rms_norm(hidden, (d,), block.attention_norm, block.eps)
    qkv = F.linear(normed, block.qkv.weight).view(batch, length, 3, block.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(batch, length, d), block.output.weight)
    normed = F.rms_norm(hidden, (d,), block.mlp_norm, block.eps)
    gate, up = F.linear(normed, block.gate_up.weight).chunk(2, dim=-1)
    return hidden + F.linear(F.silu(gate) * up, block.down.weight)


def eager_experts(experts, views, prompt_mean):
    scores = [
        F.linear(
            F.silu(F.linear(view, experts.view_in_weight[v], experts.view_in_bias[v])),
            experts.view_out_weight[v : v + 1],
            experts.view_out_bias[v : v + 1],
        )
        for v, view in enumerate(views)
    ]
    router = F.silu(
        F.linear(torch.cat([*views, prompt_mean], dim=1), experts.router_in_weight, experts.router_in_bias)
    )
    weights = torch.softmax(F.linear(router, experts.router_out_weight, experts.router_out_bias), dim=1)
    return (weights * torch.cat(scores, dim=1)).sum(dim=1)
