"""Every Triton kernel that the pooling operations launch compiles for every architecture, without spills."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import adajudge_kernels as ak
from adajudge_kernels.pooling import triton as pooling
from tests.kernels.triton_compile import AMD, NVIDIA, SHARED_MEMORY, compile_launch, recorded_launches

ROWS = [
    (4096, 3, torch.bfloat16),
    (1024, 2, torch.float32),
    (8192, 3, torch.bfloat16),
    (16384, 8, torch.bfloat16),
]
EVERYWHERE = ROWS[0]


def launches(d, depths, dtype):
    """The distinct launches of all pooling operations, forward and backward, on a packed and a shared layout."""
    layouts = (
        ak.SequenceLayout.packed([3, 2], [4, 70]),
        ak.SequenceLayout.shared_prompts([3], [[2, 4]]),
    )
    with recorded_launches() as found:
        for layout in layouts:
            batch, tables, length = layout.num_sequences, layout.tables, layout.max_length
            states = [torch.zeros(layout.num_tokens, d, dtype=dtype) for _ in range(depths)]
            hidden, w, b = states[0], torch.zeros(d, dtype=dtype), torch.zeros(1, dtype=dtype)
            gate = torch.zeros(depths, d, dtype=dtype), torch.zeros(depths, dtype=dtype)
            alpha, grad, lse = torch.zeros(batch, depths), torch.zeros(batch, d), torch.zeros(batch)
            rest = (w, b, grad, lse, tables, length, False)
            pooling.multi_view_pool_forward(states, alpha, w, b, tables, length, False)
            pooling.multi_view_pool_backward(grad, grad, grad, states, alpha, *rest)
            pooling.attention_pool_forward(hidden, w, b, tables, length, False)
            pooling.attention_pool_backward(grad, hidden, *rest)
            pooling.depth_gate_forward(hidden, *gate, tables, length)
            pooling.depth_gate_backward(alpha, grad, alpha, grad, gate[0], tables, length, dtype)
            for which in ("response", "prompt", "all"):
                pooling.masked_mean_pool_forward(hidden, tables, length, which)
                pooling.masked_mean_pool_backward(grad, tables, length, which, dtype)
    return list(found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row[0]}-K{row[1]}-{str(row[2])[6:]}")
@pytest.mark.parametrize("arch", NVIDIA)
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(row, arch):
    if arch != 90 and row != EVERYWHERE:
        pytest.skip("other rows are compiled for sm_90 only")
    for launch in launches(*row):
        compiled = compile_launch(launch, NVIDIA[arch])
        where = f"{launch.name} sm_{arch} {dict(launch.constants)}"
        assert compiled.stack == 0, f"{where}: {compiled.stack} bytes spilled, {compiled.registers} registers"
        assert compiled.shared <= SHARED_MEMORY[arch], where
        if launch.name in ("scan", "scan_backward"):
            assert compiled.sixteen_byte_loads >= dict(launch.constants)["K"], where


@pytest.mark.parametrize("target", AMD.values(), ids=AMD)
def test_kernels_compile_for_amd(target):
    for launch in launches(*EVERYWHERE):
        assert compile_launch(launch, target).assembly, launch.name
