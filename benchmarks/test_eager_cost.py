"""What a call costs the CPU in eager mode: launches are left out, all else is as on a GPU.

Needs no GPU: nothing that is left out would wait for one. The other sides are the same call through its torch.library
operator, and what prepares the launches alone (outputs, scratch memory, grids): no checks, no operator, no autograd.
"""

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels import backends
from adajudge_kernels.registration import Operation

pytest.importorskip("triton")

LAYOUT = ak.SequenceLayout.packed([5] * 8, [7] * 8)
D, DEPTHS = 64, 3


@pytest.fixture
def without_launches(monkeypatch):
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: lambda *args, **constants: None)
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", True)  # let CPU tensors through
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ak.use_backend("triton", families=("pooling",)):
        yield
    torch.set_num_threads(threads)


def preparations():
    """What each call asks of the Triton backend."""
    from adajudge_kernels.pooling import triton

    states = [torch.randn(LAYOUT.num_tokens, D) for _ in range(DEPTHS)]
    alpha, weight, bias = torch.full((8, DEPTHS), 1 / DEPTHS), torch.zeros(D), torch.zeros(1)
    gate_weight, gate_bias = torch.zeros(DEPTHS, D), torch.zeros(DEPTHS)
    where = LAYOUT.tables, LAYOUT.max_length
    return {
        "depth_gate": lambda: triton.depth_gate_forward(states[0], gate_weight, gate_bias, *where),
        "multi_view_pool": lambda: triton.multi_view_pool_forward(states, alpha, weight, bias, *where, False),
        "masked_mean_pool": lambda: triton.masked_mean_pool_forward(states[0], *where, "response"),
        "attention_pool": lambda: triton.attention_pool_forward(states[0], weight, bias, *where, False),
    }


def calls(gradients):
    states = [torch.randn(LAYOUT.num_tokens, D, requires_grad=gradients) for _ in range(DEPTHS)]
    alpha = torch.full((8, DEPTHS), 1 / DEPTHS, requires_grad=gradients)
    weight, bias = (torch.zeros(n, requires_grad=gradients) for n in (D, 1))
    gate_weight, gate_bias = torch.zeros(DEPTHS, D), torch.zeros(DEPTHS)
    return {
        "depth_gate": lambda: ak.depth_gate(states[0], gate_weight, gate_bias, LAYOUT),
        "multi_view_pool": lambda: ak.multi_view_pool(states, alpha, weight, bias, LAYOUT),
        "masked_mean_pool": lambda: ak.masked_mean_pool(states[0], LAYOUT),
        "attention_pool": lambda: ak.attention_pool(states[0], weight, bias, LAYOUT),
    }


@pytest.mark.parametrize("side", ["adajudge_kernels", "torch.library operator", "launches prepared"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", calls(False))
@pytest.mark.usefixtures("without_launches")
def test_eager_cost(benchmark, name, gradients, side, monkeypatch):
    if side == "torch.library operator":
        monkeypatch.setattr(Operation, "__call__", lambda self, *args: self._opaque(*args))
    call = (preparations() if side == "launches prepared" else calls(gradients))[name]
    benchmark.group = f"eager cost of {name}, {'training' if gradients else 'inference'}"
    benchmark.pedantic(call, rounds=50, iterations=40, warmup_rounds=5)
