"""multi_view_pool against the same pooling in plain PyTorch on padded states, eager and compiled.

``pooling``: ragged lengths, on either device. ``cpu_pooling``: equal lengths and no padding, which is eager's best case,
against the read bandwidth that a CPU has for these very states. ``gpu_pooling``: ragged lengths, states far larger than a
GPU's caches, and our backends for GPUs side by side. All sides do the same work on the same numbers; a case
fails if one differs from the pooling in fp64 by more than its dtype explains.
"""

import dataclasses
import functools
import itertools
import statistics
import time

import pytest
import torch

import adajudge_kernels as ak
from benchmarks.eager import eager_pooling

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
PLACES = 3  # in memory, that the rounds of a case go through: which pages a tensor lies in changes a figure by a third


@dataclasses.dataclass
class Case:
    """States ``[B, L, d]`` with their masks, the same in every place, and what pools them."""

    places: list
    alpha: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    masks: tuple

    @classmethod
    def draw(cls, batch, length, width, depths, dtype, device, ragged):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.full((batch,), length)
        if ragged:
            lengths[1:] = torch.randint(length // 4, length + 1, (batch - 1,), generator=generator)
        position = torch.arange(length)
        attention_mask = position < lengths[:, None]
        response_mask = attention_mask & (position >= lengths[:, None] // 3)
        drawn = torch.randn(depths, batch, length, width, generator=generator).to(device, dtype)
        return cls(
            [[x.clone().requires_grad_() for x in drawn] for _ in range(PLACES)],
            torch.softmax(torch.randn(batch, depths, generator=generator), dim=1).to(device, dtype),
            (torch.randn(width, generator=generator) / width**0.5).to(device, dtype),
            torch.zeros(1, device=device, dtype=dtype),
            (attention_mask.to(device), response_mask.to(device)),
        )

    @property
    def states(self):
        return self.places[0]

    @property
    def tokens(self):
        return int(self.masks[0].sum())

    @property
    def useful_bytes(self):
        """Of the states' tokens: what a forward must read."""
        first = self.states[0]
        return len(self.states) * self.tokens * first.shape[-1] * first.element_size()

    def sides(self):
        """What each side computes of states, and the states in each place; ours take the same memory as ``[T, d]``."""
        layout = ak.SequenceLayout.padded(*self.masks)
        others = self.alpha, self.weight, self.bias

        def ours(states):
            return ak.multi_view_pool(states, *others, layout)

        def forced(backend, states):
            with ak.use_backend(backend, families=("pooling",)):
                return ours(states)

        flat = [[x.detach().flatten(0, 1).requires_grad_() for x in states] for states in self.places]
        torch._dynamo.reset()  # else the second case's shapes would be compiled as symbols
        compiled = torch.compile(eager_pooling, dynamic=False)
        return {
            "adajudge_kernels": (ours, flat),
            **{backend: (functools.partial(forced, backend), flat) for backend in GPU_BACKENDS},
            "eager": (lambda states: eager_pooling(states, *others, *self.masks), self.places),
            "torch.compile": (lambda states: compiled(states, *others, *self.masks), self.places),
        }

    def exact(self, gradients):
        """The views, and if wanted the states' gradients, in fp64."""
        states = [x.detach().double().requires_grad_() for x in self.states]
        others = (x.double() for x in (self.alpha, self.weight, self.bias))
        views = eager_pooling(states, *others, *self.masks)
        return (views, state_gradients(states, views)) if gradients else (views, [])


def state_gradients(states, views):
    return torch.autograd.grad(sum(view.float().square().sum() for view in views), states)


GPU_BACKENDS = ("triton", "cuda")
SIDES = ("adajudge_kernels", "eager", "torch.compile")
sides = pytest.mark.parametrize("side", SIDES)
backwards = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
# A module's cases by what draws them; the last one is kept.
_DRAWN = {}


def drawn(*key):
    if key not in _DRAWN:
        _DRAWN.clear()
        case = Case.draw(*key)
        _DRAWN[key] = case, case.sides()
    return _DRAWN[key]


def measure(benchmark, group, key, side, backward, synchronise, timed_reading):
    case, sides_of_case = drawn(*key)
    dtype, places = case.states[0].dtype, itertools.cycle(range(PLACES))

    def run(place, side=side):
        pool, states = sides_of_case[side]
        with torch.set_grad_enabled(backward):
            views = pool(states[place])
        gradients = state_gradients(states[place], views) if backward else []
        synchronise()
        return views, gradients

    def between_rounds():
        """Memory's speed changes within seconds: the limit and our side are timed beside every round of another."""
        place = next(places)
        readings.append(timed_reading(case.places[place]))
        if side != "adajudge_kernels":
            started = time.perf_counter()
            run(place, "adajudge_kernels")
            ours.append(time.perf_counter() - started)
        return (place,), {}

    for found, expected in zip(run(0), case.exact(backward), strict=True):
        for x, y in zip(found, expected, strict=True):
            bound = TOLERANCE[dtype] * max(1.0, float(y.detach().abs().max()))
            assert float((x - y.view_as(x)).detach().abs().max()) <= bound, side
    benchmark.group = group + (" forward + backward" if backward else " forward")
    readings, ours = [], []
    benchmark.pedantic(run, setup=between_rounds, rounds=12 if backward else 18, warmup_rounds=PLACES)
    if ours:
        benchmark.extra_info["adajudge_kernels_seconds"] = statistics.median(ours[PLACES:])
    bandwidth = sum(x.nbytes for x in case.states) / statistics.median(readings[PLACES:])
    seconds, moved = benchmark.stats.stats.median, case.useful_bytes * (3 if backward else 1)
    batch, length, width = case.states[0].shape
    chosen = ak.backends.choose_backend(case.states[0].device, "pooling").backend
    benchmark.extra_info.update(
        device=str(case.states[0].device),
        threads=torch.get_num_threads(),
        dtype=str(dtype),
        shape=f"B={batch} L={length} d={width} K={len(case.states)}",
        backend=side if side in GPU_BACKENDS else chosen,
        useful_tokens_per_second=case.tokens / seconds,
        bytes_that_must_move=moved,
        read_bandwidth=bandwidth,
        share_of_read_bandwidth=moved / seconds / bandwidth,
    )


@sides
@backwards
def test_pooling(benchmark, backward, side, device, synchronise, timed_reading):
    key = 8, 512, 1024, 3, torch.float32, device, True
    measure(benchmark, "ragged pooling", key, side, backward, synchronise, timed_reading)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@sides
@backwards
def test_cpu_pooling(benchmark, dtype, backward, side, device, synchronise, timed_reading):
    if device.type != "cpu":
        pytest.skip("a case of CPUs")
    key = 8, 1024, 2048, 3, dtype, device, False
    measure(benchmark, "pooling", key, side, backward, synchronise, timed_reading)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", [*SIDES, *GPU_BACKENDS])
@backwards
def test_gpu_pooling(benchmark, dtype, backward, side, device, synchronise, timed_reading):
    if device.type != "cuda":
        pytest.skip("a case of GPUs")
    reason = ak.backends.unavailable_reason(side, "pooling") if side in GPU_BACKENDS else None
    if reason is not None:
        pytest.skip(f"{side}: {reason}")
    key = 32, 2048, 4096, 3, dtype, device, True
    measure(benchmark, "pooling", key, side, backward, synchronise, timed_reading)
