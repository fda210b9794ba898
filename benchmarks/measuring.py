"""How a side of a case is timed, and what is said of it.

Memory's speed changes within seconds and from page to page, so the limit and our own side are timed beside every round of
another side, on the same numbers, and rounds go through several places in memory. How many times our time another side takes
is asked in every round, and the median of that is told. On a CPU a sum comes right before either of them, and leaves both the
same caches: with nothing of the program in them, as after a backbone.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import adajudge_kernels as ak
from benchmarks.case import OURS, PLACES, Case
from benchmarks.memory import peak_bytes

SECONDS = 1.0  # of rounds, that a side gets at most
ROUNDS = range(3, 51)  # so many at least, and at most
LEAST_BYTES = 32 << 20  # of leaves, to measure memory's bandwidth on them; smaller ones lie in caches
CACHE_BYTES = 128 << 20  # more than a GPU's caches hold: what rounds go through there
MOST_PLACES = 16
QUEUED_CYCLES = 2_000_000  # that a GPU waits, a millisecond, while the CPU launches what is timed

_kept: dict[Any, Case] = {}  # the last case, for its other sides


def built(build: Callable[[int], Case], device: torch.device) -> Case:
    key = build.func, build.args, tuple(build.keywords.items())  # type: ignore[attr-defined]
    if key not in _kept:
        _kept.clear()
        case = build(PLACES if device.type == "cpu" else 1)  # on a GPU more are for its caches only
        own = case.input_bytes(OURS)  # 0 of a whole judge, whose weights are not its leaves
        if device.type == "cuda" and 0 < own < CACHE_BYTES:
            case = build(min(MOST_PLACES, 1 + CACHE_BYTES // own))
        _kept[key] = case
    return _kept[key]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def transfer(tensors: Sequence[Tensor], device: torch.device) -> float:
    """Bytes per second: of a sum over all numbers on a CPU, on a GPU of a copy, both its ways counted; small tensors are
    left out."""
    large = [x for x in tensors if x.nbytes % 4 == 0 and x.nbytes >= LEAST_BYTES / len(tensors) / 4]
    words = [x.detach().flatten().view(torch.int32).view(torch.float32) for x in large]
    moved = sum(x.nbytes for x in words)
    if device.type == "cpu":
        return moved / timed(lambda: [x.sum() for x in words], device)
    copies = [torch.empty_like(x) for x in words]
    return 2 * moved / gpu_seconds(lambda: [to.copy_(x) for to, x in zip(copies, words, strict=True)])


@functools.cache
def spare(device: torch.device) -> list[Tensor]:
    """Numbers to measure memory's bandwidth on, where a case has too few."""
    return [torch.zeros(64 << 20, dtype=torch.float32, device=device)]


def gpu_seconds(call: Callable[[], Any]) -> float:
    """Seconds between two CUDA events around a call whose launches are waiting when the first one comes, as in a program that
    runs ahead of its GPU; of a call that waits itself, all its time."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUED_CYCLES)
    started.record()
    call()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


def event_median(run: Callable[[int], Any], rounds: int) -> float:
    return statistics.median(gpu_seconds(functools.partial(run, place)) for place in range(rounds))


def measure(
    benchmark: Any,
    build: Callable[[int], Case],
    side: str,
    backward: bool,
    device: torch.device,
    family: str = "pooling",
) -> None:
    """Check a side, time it, and write what a reader needs to judge the figure into the benchmark's ``extra_info``.

    Args:
        build: a `functools.partial` that gives the case with its leaves in so many places.
        family: whose backend is named.
    """
    case = built(build, device)
    case.check(side, backward)
    places = itertools.count()
    bandwidths: list[float] = []
    ours: list[float] = []

    def transfer_beside(name: str, place: int) -> float:
        leaves = case.sides[name].places
        in_memory = case.input_bytes(name) >= LEAST_BYTES
        return transfer(leaves[place % len(leaves)] if in_memory else spare(device), device)

    def run(place: int, name: str = side) -> None:
        case.sides[name].outputs(place, backward)
        synchronise(device)

    def between_rounds() -> tuple[tuple[int], dict[str, Any]]:
        place = next(places)
        if side != OURS and device.type == "cpu":
            transfer_beside(OURS, place)
            ours.append(timed(lambda: case.sides[OURS].outputs(place, backward), device))
        bandwidths.append(transfer_beside(side, place))
        return (place,), {}

    rounds = rounds_within(timed(lambda: run(0), device))
    work = "forward + backward" if backward else "forward"
    dtype = str(case.dtype).removeprefix("torch.")
    benchmark.group = f"{case.group}, {case.shape}, {dtype}, {work}"
    warmup = PLACES if rounds > ROUNDS[0] else 0  # it has run twice by now
    benchmark.pedantic(run, setup=between_rounds, rounds=rounds, warmup_rounds=warmup)
    if benchmark.disabled:  # it ran once, and was not timed
        return
    seconds = benchmark.stats.stats.median
    if device.type == "cuda":
        seconds = event_median(lambda place: case.sides[side].outputs(place, backward), rounds)
        benchmark.extra_info["cuda_event_seconds"] = seconds
        if side != OURS:
            own = event_median(lambda place: case.sides[OURS].outputs(place, backward), rounds)
            benchmark.extra_info["times_adajudge_kernels"] = seconds / own
    elif ours:
        rounds_of_both = zip(benchmark.stats.stats.data, ours[warmup:], strict=True)
        times = statistics.median(theirs / own for theirs, own in rounds_of_both)
        benchmark.extra_info["times_adajudge_kernels"] = times
    moved = case.backward_bytes if backward else case.forward_bytes
    bandwidth = statistics.median(bandwidths[warmup:])
    benchmark.extra_info.update(
        case=case.group,
        work=work,
        device=str(device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        shape=case.shape,
        backend=ak.backends.choose_backend(device, family).backend,
        useful_tokens=case.tokens,
        useful_tokens_per_second=case.tokens / seconds,
        bytes_that_must_move=moved,
        multiply_adds=case.multiply_adds * (3 if backward else 1),
        gigabytes_per_second=moved / seconds / 1e9,
        bandwidth=bandwidth,
        share_of_bandwidth=moved / seconds / bandwidth,
        peak_bytes=peak_bytes(case, build, side, backward),
        **case.notes,
    )


def rounds_within(seconds: float) -> int:
    """As many as the time allows."""
    return min(ROUNDS[-1], max(ROUNDS[0], int(SECONDS / max(seconds, 1e-6))))
