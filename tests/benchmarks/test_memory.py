"""Peak memory, of cases whose need is known."""

import functools

import pytest
import torch

from benchmarks.case import OURS, Case, Side
from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")


def allocating_case(temporary, places):
    """Its side takes a temporary of so many bytes."""

    def run(x):
        torch.ones(temporary // 4).add_(1)
        return [x.sum()]

    return Case(
        group="allocating",
        shape="",
        dtype=torch.float32,
        device=CPU,
        sides={OURS: Side(run, [[torch.ones(4, requires_grad=True)] for _ in range(places)])},
        exact=lambda backward: ([], []),
        tokens=0,
        forward_bytes=0,
        backward_bytes=0,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("temporary", "error"), [(64 << 20, 6.4 * 2**20), (0, 4 << 20)])
def test_the_peak_is_what_is_allocated(temporary, error, backward):
    build = functools.partial(allocating_case, temporary)
    assert peak_bytes(build(1), build, OURS, backward) == pytest.approx(temporary, abs=error)
