"""``python -m benchmarks.check``: fails where our side has become slow beside plain PyTorch.

``floors.json`` has a floor for each case of a kind of device: well below the ratio that is usually measured, so that
a busy machine stays above it. The reference backend in place of the kernels, slower than eager by far, does not. Both sides run
in turns, so that noise meets both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adajudge_kernels.backends import FAMILIES, choose_backend
from benchmarks import sizes
from benchmarks import test_head as head
from benchmarks.allocator import keep_freed_memory
from benchmarks.case import OURS, PLACES, Case
from benchmarks.measuring import built, timed
from benchmarks.test_experts import experts_case
from benchmarks.test_pooling import case_of, ragged

FLOORS = Path(__file__).with_name("floors.json")
ROUNDS, SHORT_ROUNDS = 15, 7
OTHER = "eager"


@dataclasses.dataclass(frozen=True)
class Gate:
    """A case that must stay faster than the other side; its name is one of the floors'."""

    name: str
    build: Callable[[int], Case]
    backward: bool


def cpu_gates() -> list[Gate]:
    """What is checked on a CPU; the first is the short check."""
    device, chosen = torch.device("cpu"), sizes.CPU
    size = (chosen.usual_tokens,)
    pooling = case_of("pooling, packed", ragged, size, chosen.width, chosen.depths, torch.bfloat16, device)
    experts = functools.partial(experts_case, 16, 2048, torch.float32, device)
    return [
        Gate("pooling, packed, forward", pooling, False),
        Gate("pooling, packed, forward + backward", pooling, True),
        Gate("experts, B=16, forward", experts, False),
        Gate("whole head, forward", head.case_of("head", chosen.head_tokens[-1], chosen, device), False),
    ]


def speedup(gate: Gate, rounds: int) -> float:
    """The other side's time over ours: the median over rounds, in each of which both run, now one first and now the other.

    Raises DifferentResults where one of them computes something else.
    """
    case = built(gate.build, torch.device("cpu"))
    for side in (OURS, OTHER):
        case.check(side, gate.backward)
    ratios = []
    for turn in range(PLACES + rounds):
        order = (OURS, OTHER) if turn % 2 else (OTHER, OURS)
        seconds = {}
        for side in order:
            run = functools.partial(case.sides[side].outputs, turn, gate.backward)
            seconds[side] = timed(run, case.device)
        ratios.append(seconds[OTHER] / seconds[OURS])
    return statistics.median(ratios[PLACES:])  # the first ones warm up


def failure(name: str, floor: float, measure: Callable[[], float]) -> str | None:
    """What to say of a case whose ratio is below its floor, and is so again when it is measured once more; else None."""
    ratio = measure()
    if ratio < floor:
        print(f"{name}: {ratio:.2f}x is below {floor:.2f}x, measuring once more")
        ratio = measure()
    print(f"{name}: {ratio:.2f}x, floor {floor:.2f}x")
    if ratio >= floor:
        return None
    return f"{name}: {ratio:.2f}x the speed of {OTHER}, below the floor of {floor:.2f}x"


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 and names every case below its floor."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one case, a few seconds")
    short = parser.parse_args(arguments).short
    try:
        for family in FAMILIES:
            choose_backend(torch.device("cpu"), family)
    except ValueError as error:  # a forced one that cannot serve
        sys.exit(str(error))
    keep_freed_memory()
    floors = json.loads(FLOORS.read_text())["cpu"]
    rounds = SHORT_ROUNDS if short else ROUNDS
    gates = cpu_gates()[:1] if short else cpu_gates()
    found = [
        failure(gate.name, floors[gate.name], functools.partial(speedup, gate, rounds)) for gate in gates
    ]
    failures = [line for line in found if line is not None]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
