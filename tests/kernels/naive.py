"""The operations as loops over sequences, straight from the paper's equations: what backends are tested against.

Independent of `SequenceLayout` and of the reference backend on purpose. Differentiable; in fp64 it is the truth,
in the states' own dtype (upcast to fp32 right after the load) it is "the plain PyTorch version".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Sequence(NamedTuple):
    rows: list[int]  # indices of the sequence's tokens into the states, in order
    response: list[bool]  # which of them are response tokens


def up(x):
    return x if x.dtype == torch.float64 else x.float()


def split(hidden, sequence):
    states = up(hidden)[torch.tensor(sequence.rows)]
    return states, torch.tensor(sequence.response)


def mean_or_zero(states):
    return states.mean(dim=0) if len(states) else states.new_zeros(states.shape[1])


def stack(rows, width, like):
    return torch.stack(rows) if rows else up(like).new_zeros(0, *width)


def depth_gate(hidden, weight, bias, sequences):
    alphas, prompts = [], []
    for sequence in sequences:
        states, response = split(hidden, sequence)
        alphas.append(torch.softmax(up(weight) @ states.mean(dim=0) + up(bias), dim=0))
        prompts.append(mean_or_zero(states[~response]))
    return stack(alphas, weight.shape[:1], hidden), stack(prompts, hidden.shape[1:], hidden)


def attention_view(states, weight, bias):
    return torch.softmax(states @ up(weight) + up(bias), dim=0) @ states


def multi_view_pool(states, depth_weights, weight, bias, sequences, attention_tokens="all"):
    views = [[], [], []]
    for b, sequence in enumerate(sequences):
        _, response = split(states[0], sequence)
        refined = sum(up(depth_weights)[b, k] * split(h, sequence)[0] for k, h in enumerate(states))
        views[0].append(refined[response][-1])
        views[1].append(refined[response].mean(dim=0))
        attended = refined[response] if attention_tokens == "response" else refined
        views[2].append(attention_view(attended, weight, bias))
    return tuple(stack(view, states[0].shape[1:], states[0]) for view in views)


def masked_mean_pool(hidden, sequences, tokens="response"):
    rows = []
    for sequence in sequences:
        states, response = split(hidden, sequence)
        chosen = {"response": response, "prompt": ~response, "all": torch.ones_like(response)}[tokens]
        rows.append(mean_or_zero(states[chosen]))
    return stack(rows, hidden.shape[1:], hidden)


def attention_pool(hidden, weight, bias, sequences, tokens="all"):
    rows = []
    for sequence in sequences:
        states, response = split(hidden, sequence)
        rows.append(attention_view(states[response] if tokens == "response" else states, weight, bias))
    return stack(rows, hidden.shape[1:], hidden)


def mlp(x, in_weight, in_bias, out_weight, out_bias):
    return F.silu(x @ up(in_weight).mT + up(in_bias)) @ up(out_weight).mT + up(out_bias)


def gated_expert_combination(last, mean, attention, prompt, weights):
    w = weights
    views = [up(z) for z in (last, mean, attention, prompt)]
    scores = torch.stack(
        [
            mlp(z, w[0][v], w[1][v], w[2][v : v + 1], w[3][v : v + 1]).squeeze(1)
            for v, z in enumerate(views[:3])
        ],
        dim=1,
    )
    pi = torch.softmax(mlp(torch.cat(views, dim=1), *w[4:]), dim=1)
    return (pi * scores).sum(dim=1), scores, pi


def focal_bradley_terry_loss(chosen, rejected, pair_weight, view_weights, gamma, tau, floor, weight):
    p = torch.sigmoid((up(chosen) - up(rejected)) / tau)
    loss = -((1 - p) ** gamma) * torch.log(p)
    loss = (loss if pair_weight is None else up(pair_weight) * loss).mean()
    if view_weights is not None:
        pi = up(view_weights)
        entropy = -(pi * torch.log(pi)).sum(dim=1)
        loss = loss + weight * torch.relu(floor - entropy).square().mean()
    return loss


def sequence_attention(query, key, value, sequences, heads, causal=True, key_heads=1, scale=None):
    """One sequence after the other, in the states' own dtype, as PyTorch's attention does it."""
    outputs = []
    for sequence in sequences:
        rows = torch.tensor(sequence.rows)
        q, k, v = (
            x[rows].unflatten(1, (n, -1)).transpose(0, 1).repeat_interleave(heads // n, dim=0)
            for x, n in ((query, heads), (key, key_heads), (value, key_heads))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        outputs.append(mixed.transpose(0, 1))
    return torch.cat(outputs) if outputs else query.new_zeros(0, heads, query.shape[1] // heads)


def residual_rms_norm(x, update, weight, eps):
    """As transformers' decoders: the residual stream is rounded to its dtype, then normalised in fp32."""
    total = x + update
    u = up(total)
    return total, (u / torch.sqrt(u.square().mean(dim=-1, keepdim=True) + eps) * up(weight)).to(x.dtype)


def swiglu(gate_up):
    gate, linear = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * linear
