"""The refinement stage, and the whole head, against the same in plain PyTorch on padded states; the refinement stage also on
packed states, in plain PyTorch and with other libraries' kernels."""

import copy
import functools

import pytest
import torch

import adajudge_kernels as ak
from benchmarks import lengths
from benchmarks.backbones import draw_head
from benchmarks.batches import Batch
from benchmarks.case import OURS, Case, Side, compiled
from benchmarks.eager import eager_head, eager_refinement
from benchmarks.packed import LIBRARIES, packed_refinement, plain, usable_libraries

ON_PADDED = [OURS, "eager", "torch.compile"]
ON_PACKED = ["eager packed", "eager packed, torch.compile", *LIBRARIES]


def head_case(part, tokens, scale, width, depths, dtype, device, places):
    """`part`: "refinement" or "head". Leaves are the states and the parameters."""
    batch = Batch.packed(*lengths.sequences(tokens, scale), device)
    masks = batch.masks
    torch.manual_seed(0)
    head = ak.AdaJudgeHead(width, depths).to(device)
    draw_head(head)
    head = head.to(dtype)
    hidden = torch.randn(batch.rows, width, device=device).to(dtype)
    module = head if part == "head" else head.refinement
    parameters = [p for name, p in module.named_parameters() if part == "head" or not name.startswith("gate")]
    exact_head = copy.deepcopy(head).double()
    exact_module = exact_head if part == "head" else exact_head.refinement
    exact_parameters = [
        p for name, p in exact_module.named_parameters() if part == "head" or not name.startswith("gate")
    ]

    def leaves(states):
        return [[states.detach().clone().requires_grad_(), *parameters] for _ in range(places)]

    def ours(states, *_):
        if part == "head":
            return [head(states, batch.layout).reward]
        return head.refinement(states, batch.layout)[0]

    def eager(of, states, some=slice(None)):
        real, response = (mask[some] for mask in masks)
        if part == "head":
            return [eager_head(of, states, real, response)]
        refined, _, _ = eager_refinement(of.refinement, states, real, response)
        return [state * real[..., None] for state in refined]

    def exact(backward):
        """Two sequences at a time: fp64 states and attention of all of them would not fit."""
        leaves = [hidden.double().requires_grad_(), *exact_parameters]
        parts, gradients = [], []
        for start in range(0, len(batch.index), 2):
            some = slice(start, start + 2)
            side = Side(lambda x, *_, some=some: eager(exact_head, batch.pad(x, some), some), [leaves])
            outputs, of_some = side.outputs(0, backward)
            parts.append(outputs if part == "head" else [batch.flat(x, some) for x in outputs])
            gradients = [x + y for x, y in zip(gradients, of_some, strict=True)] if gradients else of_some
        together = torch.cat if part == "head" else sum
        return [together(rows) for rows in zip(*parts, strict=True)], gradients

    def flat(x):
        return batch.flat(x) if x.shape[:2] == batch.index.shape else x

    fused = compiled(eager)
    padded = leaves(batch.pad(hidden))

    def packed(operations, compiling=False):
        def refined(states):
            return packed_refinement(head.refinement, operations, states, batch.layout)

        run = compiled(refined) if compiling else refined
        return Side(lambda states, *_: run(states), leaves(hidden))

    of_stage = {
        "eager packed": packed(plain()),
        "eager packed, torch.compile": packed(plain(), compiling=True),
        **{name: packed(make()) for name, make in usable_libraries(device).items()},
    }
    squares = int(batch.attention.sum(dim=1).square().sum())
    states_bytes, weights = hidden.nbytes, sum(p.nbytes for p in parameters)
    return Case(
        group="refinement stage" if part == "refinement" else "whole head",
        shape=f"T={batch.rows} B={len(batch.index)} d={width} K={depths}",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(ours, leaves(hidden)),
            "eager": Side(lambda x, *_: eager(head, x), padded, flat, flat),
            "torch.compile": Side(lambda x, *_: fused(head, x), padded, flat, flat),
            **(of_stage if part == "refinement" else {}),
        },
        exact=exact,
        tokens=batch.rows,
        forward_bytes=(1 + depths) * states_bytes + weights,
        backward_bytes=3 * ((1 + depths) * states_bytes + weights),
        multiply_adds=depths
        * (7 * batch.rows * width**2 + squares * width),  # causal: half of the squares, twice
        deep=True,
    )


def case_of(part, tokens, chosen, device):
    return functools.partial(
        head_case,
        part,
        tokens,
        chosen.length_scale,
        chosen.head_width,
        chosen.depths,
        chosen.dtypes[0],
        device,
    )


backwards = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])


def skip_unless_here(side, device):
    if "torch.compile" in side and device.type == "cpu":
        pytest.skip("on a CPU it is eager's matrix products")
    if side in LIBRARIES and side not in usable_libraries(device):
        pytest.skip(f"{side}'s kernels need a GPU, and the library installed")


@pytest.mark.parametrize("side", ON_PADDED + ON_PACKED)
@backwards
def test_refinement(measured, backward, side, chosen, device):
    skip_unless_here(side, device)
    measured(
        case_of("refinement", chosen.head_tokens[1], chosen, device), side, backward, family="refinement"
    )


@pytest.mark.parametrize("side", ON_PADDED)
@backwards
def test_head(measured, head_tokens, backward, side, chosen, device):
    skip_unless_here(side, device)
    measured(case_of("head", head_tokens, chosen, device), side, backward, family="refinement")
