"""Every operation of the contract as data: how to draw its inputs, call it, and what the truth is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import adajudge_kernels as ak
from adajudge_kernels.refinement.ops import residual_rms_norm, sequence_attention, swiglu
from tests.kernels import naive


@dataclass(frozen=True)
class Operation:
    """An operation over token states.

    `draw(batch, d, depths)` gives fp64 inputs by name; inputs named ``states*`` or ``hidden`` are over the batch's
    tokens. `call(inputs, layout)` and `truth(inputs, sequences)` return a tuple of outputs.
    """

    name: str
    draw: Callable[..., dict[str, torch.Tensor]]
    call: Callable[..., tuple[Any, ...]]
    truth: Callable[..., tuple[Any, ...]]


def over_tokens(name):
    return name in ("hidden", "query", "key", "value") or name.startswith("states")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def draw_gate(batch, d, depths):
    return {"hidden": normal(batch.num_tokens, d), "weight": normal(depths, d), "bias": normal(depths)}


def draw_views(batch, d, depths):
    states = {f"states{k}": normal(batch.num_tokens, d) for k in range(depths)}
    alpha = torch.softmax(normal(len(batch.sequences), depths), dim=1)
    return states | {"alpha": alpha, "weight": normal(d) / d**0.5, "bias": normal(1)}


def draw_mean(batch, d, depths):
    return {"hidden": normal(batch.num_tokens, d)}


def draw_attention(batch, d, depths):
    return {"hidden": normal(batch.num_tokens, d), "weight": normal(d) / d**0.5, "bias": normal(1)}


def states_of(x):
    return [value for name, value in x.items() if name.startswith("states")]


def views(tokens):
    return Operation(
        f"multi_view_pool[{tokens}]",
        draw_views,
        lambda x, layout: tuple(
            ak.multi_view_pool(states_of(x), x["alpha"], x["weight"], x["bias"], layout, tokens)
        ),
        lambda x, s: naive.multi_view_pool(states_of(x), x["alpha"], x["weight"], x["bias"], s, tokens),
    )


def mean(tokens):
    return Operation(
        f"masked_mean_pool[{tokens}]",
        draw_mean,
        lambda x, layout: (ak.masked_mean_pool(x["hidden"], layout, tokens),),
        lambda x, s: (naive.masked_mean_pool(x["hidden"], s, tokens),),
    )


def attention(tokens):
    return Operation(
        f"attention_pool[{tokens}]",
        draw_attention,
        lambda x, layout: (ak.attention_pool(x["hidden"], x["weight"], x["bias"], layout, tokens),),
        lambda x, s: (naive.attention_pool(x["hidden"], x["weight"], x["bias"], s, tokens),),
    )


POOLING = [
    Operation(
        "depth_gate",
        draw_gate,
        lambda x, layout: ak.depth_gate(x["hidden"], x["weight"], x["bias"], layout),
        lambda x, s: naive.depth_gate(x["hidden"], x["weight"], x["bias"], s),
    ),
    views("all"),
    views("response"),
    mean("response"),
    mean("prompt"),
    mean("all"),
    attention("all"),
    attention("response"),
]


def sequence_slots(layout):
    """The token slots of one sequence after the other: what a layout has once for several sequences comes several times."""
    slots = [
        slot
        for start0, stop0, start1, stop1 in layout.ranges.tolist()
        for slot in (*range(start0, stop0), *range(start1, stop1))
    ]
    return torch.tensor(slots, dtype=torch.long, device=layout.device)


def attend(merged=False, heads=2, key_heads=1, causal=True, scale=None):
    """Attention as an operation of the contract; `merged`: keys and values come as one tensor. d is of a head."""

    def draw(batch, d, depths):
        tokens = batch.num_tokens
        return {
            "query": normal(tokens, heads * d),
            "key": normal(tokens, key_heads * d),
            "value": normal(tokens, key_heads * d),
        }

    def call(x, layout):
        query = x["query"].unflatten(1, (heads, -1))
        key, value = (x[name].unflatten(1, (key_heads, -1)) for name in ("key", "value"))
        projections = [query, torch.stack([key, value], dim=1)] if merged else [query, key, value]
        return (sequence_attention(projections, layout, causal, scale)[sequence_slots(layout)],)

    def truth(x, s):
        projections = x["query"], x["key"], x["value"]
        return (naive.sequence_attention(*projections, s, heads, causal, key_heads, scale),)

    return Operation(f"sequence_attention[{'merged' if merged else 'apart'}]", draw, call, truth)


ATTENTION = [attend(), attend(merged=True)]

VIEW_NAMES = ("last", "mean", "attention", "prompt")


def draw_experts(rows, d=24, h=16, h_r=20):
    drawn = {name: normal(rows, d) for name in VIEW_NAMES}
    shapes = ((3, h, d), (3, h), (3, h), (3,), (h_r, 4 * d), (h_r,), (3, h_r), (3,))
    for name, shape in zip(ak.ExpertWeights._fields, shapes, strict=True):
        drawn[name] = normal(*shape) / shape[-1] ** 0.5
    return drawn


def call_experts(x):
    weights = ak.ExpertWeights(*(x[name] for name in ak.ExpertWeights._fields))
    return tuple(ak.gated_expert_combination(*(x[name] for name in VIEW_NAMES), weights))


def true_experts(x):
    weights = [x[name] for name in ak.ExpertWeights._fields]
    return naive.gated_expert_combination(*(x[name] for name in VIEW_NAMES), weights)


def draw_loss(pairs):
    return {
        "chosen": normal(pairs),
        "rejected": normal(pairs),
        "pair_weight": torch.rand(pairs, dtype=torch.float64) + 0.5,
        "view_weights": torch.softmax(3 * normal(2 * pairs, 3), dim=1),
    }


def call_loss(x, gamma=2.0, temperature=0.7, floor=0.9, weight=0.3):
    loss = ak.focal_bradley_terry_loss(
        x["chosen"],
        x["rejected"],
        gamma,
        temperature,
        x.get("pair_weight"),
        x.get("view_weights"),
        floor,
        weight,
    )
    return (loss,)


def true_loss(x, gamma=2.0, temperature=0.7, floor=0.9, weight=0.3):
    optional = (x.get("pair_weight"), x.get("view_weights"))
    return (
        naive.focal_bradley_terry_loss(
            x["chosen"], x["rejected"], *optional, gamma, temperature, floor, weight
        ),
    )


def draw_norm(rows, d=33):
    return {"x": normal(rows, d), "update": normal(rows, d), "weight": normal(d)}


def call_norm(x):
    return residual_rms_norm(x["x"], x["update"], x["weight"], 1e-5)


def call_plain_norm(x):
    total, normed = residual_rms_norm(x["x"], None, x["weight"], 1e-5)
    return total * 2, normed + 0 * x["update"]


def true_plain_norm(x):
    total, normed = naive.residual_rms_norm(x["x"], torch.zeros_like(x["x"]), x["weight"], 1e-5)
    return total * 2, normed + 0 * x["update"]


def draw_swiglu(rows, width=21):
    return {"gate_up": 3 * normal(rows, 2 * width)}


# Operations without tokens: (name, draw(rows), call, truth).
ROWWISE = [
    ("gated_expert_combination", draw_experts, call_experts, true_experts),
    ("focal_bradley_terry_loss", draw_loss, call_loss, true_loss),
    (
        "residual_rms_norm",
        draw_norm,
        call_norm,
        lambda x: naive.residual_rms_norm(x["x"], x["update"], x["weight"], 1e-5),
    ),
    ("rms_norm", draw_norm, call_plain_norm, true_plain_norm),
    ("swiglu", draw_swiglu, lambda x: (swiglu(x["gate_up"]),), lambda x: (naive.swiglu(x["gate_up"]),)),
]
