"""gated_expert_combination on the CPU against the same four MLPs in eager PyTorch, from one sequence to many.

fp32 views, as pooling gives them; eager rounds them to the weights' dtype, as people do. The limit is reading the weights
once.
"""

import statistics
import types

import pytest
import torch

import adajudge_kernels as ak
from benchmarks.eager import eager_experts

WIDTH, HIDDEN = 2048, 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draw(rows, dtype):
    """Four views and the experts' weights by their names."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(rows, WIDTH, generator=generator) for _ in range(4)]
    shapes = (
        *((3, HIDDEN, WIDTH), (3, HIDDEN), (3, HIDDEN), (3,)),
        *((HIDDEN, 4 * WIDTH), (HIDDEN,), (3, HIDDEN), (3,)),
    )
    drawn = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    weights = [x.to(dtype).requires_grad_() for x in drawn]
    return [x.requires_grad_() for x in views], ak.ExpertWeights(*weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
@pytest.mark.parametrize("side", ["adajudge_kernels", "eager"])
def test_cpu_experts(benchmark, rows, dtype, backward, side, device, timed_reading):
    if device.type != "cpu":
        pytest.skip("a case of CPUs")
    views, weights = draw(rows, dtype)
    experts = types.SimpleNamespace(**weights._asdict())

    def run():
        with torch.set_grad_enabled(backward):
            if side == "eager":
                rounded = [x.to(dtype) for x in views]
                reward = eager_experts(experts, rounded[:3], rounded[3])
            else:
                reward = ak.gated_expert_combination(*views, weights).reward
        gradients = torch.autograd.grad(reward.float().sum(), [*views, *weights]) if backward else []
        return reward, gradients

    exact = ak.ExpertWeights(*(x.detach().double() for x in weights))
    doubles = [x.detach().double() for x in views]
    truth = eager_experts(types.SimpleNamespace(**exact._asdict()), doubles[:3], doubles[3])
    assert float((run()[0] - truth).detach().abs().max()) <= TOLERANCE[dtype], side
    large, readings = [weights.view_in_weight, weights.router_in_weight], []
    benchmark.group = f"experts {'forward + backward' if backward else 'forward'}, B={rows}"
    benchmark.pedantic(run, setup=lambda: readings.append(timed_reading(large)), rounds=21, warmup_rounds=3)
    moved = sum(x.nbytes for x in large)
    seconds, bandwidth = benchmark.stats.stats.median, moved / statistics.median(readings[3:])
    benchmark.extra_info.update(
        device=str(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype),
        shape=f"d={WIDTH} h={HIDDEN}",
        backend=ak.backends.choose_backend(device, "experts").backend,
        bytes_that_must_move=moved * (3 if backward else 1),
        read_bandwidth=bandwidth,
    )
    if rows == 1 and not backward:
        benchmark.extra_info["share_of_read_bandwidth"] = moved / seconds / bandwidth
