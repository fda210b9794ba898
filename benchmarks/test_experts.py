"""gated_expert_combination against the same four MLPs in plain PyTorch, from one sequence to many.

fp32 views, as pooling gives them; the others round them to the weights' dtype, as people do. The least is reading the
weights once; with many rows it is their multiply-adds.
"""

import functools
import types

import pytest
import torch

import adajudge_kernels as ak
from benchmarks.case import OURS, Case, Side, compiled, copies
from benchmarks.eager import eager_experts

COMPILED_ROWS = (16, 512)
HIDDEN = 256


def experts_case(rows, width, dtype, device, places):
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    views = [drawn(rows, width) for _ in range(4)]
    shapes = (
        *((3, HIDDEN, width), (3, HIDDEN), (3, HIDDEN), (3,)),
        *((HIDDEN, 4 * width), (HIDDEN,), (3, HIDDEN), (3,)),
    )
    weights = [(drawn(*shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]

    def eager(*leaves):
        rounded = [view.to(dtype) for view in leaves[:4]]
        named = types.SimpleNamespace(**ak.ExpertWeights(*leaves[4:])._asdict())
        return [eager_experts(named, rounded[:3], rounded[3])]

    def ours(*leaves):
        return [ak.gated_expert_combination(*leaves[:4], ak.ExpertWeights(*leaves[4:])).reward]

    def exact(backward):
        leaves = [x.double().requires_grad_() for x in (*views, *weights)]
        named = types.SimpleNamespace(**ak.ExpertWeights(*leaves[4:])._asdict())
        side = Side(lambda *x: [eager_experts(named, list(x[:3]), x[3])], [leaves])
        return side.outputs(0, backward)

    leaves = [*views, *weights]
    placed = copies(leaves, places)
    moved = sum(x.nbytes for x in weights)
    return Case(
        group=f"experts, B={rows}",
        shape=f"B={rows} d={width} h={HIDDEN}",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(ours, placed),
            "eager": Side(eager, placed),
            "torch.compile": Side(compiled(eager), placed),
        },
        exact=exact,
        tokens=rows,  # sequences
        forward_bytes=moved,
        backward_bytes=3 * moved,
        multiply_adds=rows * 7 * HIDDEN * width,
    )


@pytest.mark.parametrize("side", [OURS, "eager", "torch.compile"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts(measured, rows, dtype, backward, side, device):
    if side == "torch.compile" and device.type == "cpu":
        pytest.skip("on a CPU it is eager's matrix products")
    if side == "torch.compile" and rows not in COMPILED_ROWS:
        pytest.skip("compiling takes longer than all the rest")
    build = functools.partial(experts_case, rows, 2048 if device.type == "cpu" else 4096, dtype, device)
    measured(build, side, backward, family="experts")
