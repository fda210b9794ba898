"""What a call costs the CPU in eager mode beyond the kernels: launches are left out, all else is as on a GPU.

Needs no GPU: nothing that is left out would wait for one. The other side is the same call through its torch.library
operator.
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


@pytest.mark.parametrize("side", ["adajudge_kernels", "torch.library operator"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", calls(False))
@pytest.mark.usefixtures("without_launches")
def test_eager_cost(benchmark, name, gradients, side, monkeypatch):
    if side != "adajudge_kernels":
        monkeypatch.setattr(Operation, "__call__", lambda self, *args: self._opaque(*args))
    call = calls(gradients)[name]
    benchmark.group = f"eager cost of {name}, {'training' if gradients else 'inference'}"
    benchmark.pedantic(call, rounds=50, iterations=40, warmup_rounds=5)
