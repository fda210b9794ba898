"""depth_gate - depth weights and prompt mean - against the same in plain PyTorch on padded states."""

import functools

import pytest
import torch
import torch.nn.functional as F

import adajudge_kernels as ak
from benchmarks import lengths
from benchmarks.batches import Batch
from benchmarks.case import OURS, Case, Side, compiled, copies, exact_by_parts
from benchmarks.eager import masked_means


def eager_gate(hidden, weight, bias, attention, response):
    """Depth weights ``[B, K]`` and prompt mean ``[B, d]`` of padded states ``[B, L, d]``."""
    context, prompt_mean = masked_means(hidden, attention, attention & ~response)
    return torch.softmax(F.linear(context.to(weight.dtype), weight, bias), dim=1), prompt_mean


def gate_case(tokens, width, depths, dtype, device, places):
    batch = Batch.packed(*lengths.sequences(tokens), device)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(batch.rows, width, generator=generator, device=device).to(dtype)
    weight = torch.randn(depths, width, generator=generator, device=device) / width**0.5
    bias = torch.zeros(depths, device=device)
    masks = batch.masks
    flat, padded = copies([hidden], places), copies([batch.pad(hidden)], places)

    fused = compiled(eager_gate)

    def exact(backward):
        wide = weight.double(), bias.double()

        def some_sequences(some, states):
            return eager_gate(batch.pad(states, some), *wide, *(mask[some] for mask in masks))

        return exact_by_parts(some_sequences, [hidden], len(batch.index), backward)

    return Case(
        group="depth gate",
        shape=f"T={batch.rows} B={len(batch.index)} d={width} K={depths}",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(lambda x: ak.depth_gate(x, weight, bias, batch.layout), flat),
            "eager": Side(lambda x: eager_gate(x, weight, bias, *masks), padded, batch.flat),
            "torch.compile": Side(lambda x: fused(x, weight, bias, *masks), padded, batch.flat),
        },
        exact=exact,
        tokens=batch.rows,
        forward_bytes=hidden.nbytes,
        backward_bytes=2 * hidden.nbytes,
    )


@pytest.mark.parametrize("side", [OURS, "eager", "torch.compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
def test_depth_gate(measured, backward, side, chosen, device):
    build = functools.partial(
        gate_case, chosen.usual_tokens, chosen.width, chosen.depths, chosen.dtypes[-1], device
    )
    measured(build, side, backward)
