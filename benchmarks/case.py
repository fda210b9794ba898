"""What a benchmark case is: several sides that compute the same, and what the work needs at least.

A case is built by a function that a fresh process can call too, so that peak memory can be measured there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OURS = "adajudge_kernels"
FLOOR = "backbone alone"  # the side that does a part of a whole judge's work
PLACES = 3  # in memory, that the rounds of a case go through: which pages a tensor lies in changes a figure by a third
SMALL = 1e-2  # beside the case's largest gradient: smaller ones are compared as if they were of this size
ZERO = 1e-6  # beside it: zero but for rounding, as the gradient of a bias that a softmax does not see


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def root_mean_square(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How large an error may be beside the exact numbers, sized alike; a part of the work left out is an error of 1."""

    share: float
    size: Callable[[Tensor], float] = largest


OPERATION = {torch.float32: Tolerance(1e-5), torch.bfloat16: Tolerance(3e-2)}
# Of bf16 through a chain of layers: Qwen3-0.6B's gradients are off by up to 5 % in the mean, the reward by 1 %.
DEEP_OUTPUT = OPERATION | {torch.bfloat16: Tolerance(6e-2)}
DEEP_GRADIENT = OPERATION | {torch.bfloat16: Tolerance(0.2, root_mean_square)}


class DifferentResults(AssertionError):  # noqa: N818 (it is no error of the program)
    """A side of a case computes something else."""


def widened(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_it_is(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass
class Side:
    """One way to compute a case.

    Attributes:
        run: of the leaves: the outputs.
        places: the leaves, which gradients are wanted of: the same numbers in several places of memory.
        real: a leaf's gradient as `Case.exact` has it, without padding.
        shown: an output likewise.
    """

    run: Callable[..., Sequence[Tensor]]
    places: list[list[Tensor]]
    real: Callable[[Tensor], Tensor] = as_it_is
    shown: Callable[[Tensor], Tensor] = as_it_is

    def outputs(self, place: int, backward: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and if wanted the leaves' gradients of the sum of the outputs' squares."""
        leaves = self.places[place % len(self.places)]
        with torch.set_grad_enabled(backward):
            outputs = list(self.run(*leaves))
            if not backward:
                return outputs, []
            total = sum(widened(output).square().sum() for output in outputs)
        return [output.detach() for output in outputs], list(torch.autograd.grad(total, leaves))


@dataclasses.dataclass
class Case:
    """Sides that do the same work on the same numbers; `floors` are sides that do a part of it: nobody can be faster.

    `exact(backward)`: outputs and gradients in fp64, with which every side is compared before it is timed. Bytes and
    multiply-adds are the least that the forward needs, whoever computes it.
    """

    group: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    sides: dict[str, Side]
    exact: Callable[[bool], tuple[list[Tensor], list[Tensor]]]
    tokens: int  # useful ones: no padding
    forward_bytes: int
    backward_bytes: int  # forward and backward together
    multiply_adds: int = 0  # of the forward's matrix products
    floors: frozenset[str] = frozenset()
    deep: bool = False  # a chain of layers, through which roundings grow
    notes: dict[str, float] = dataclasses.field(default_factory=dict)  # more for ``extra_info``
    _exact: dict[bool, tuple[list[Tensor], list[Tensor]]] = dataclasses.field(default_factory=dict)

    def check(self, name: str, backward: bool) -> None:
        """Compare a side with the exact results.

        Raises:
            DifferentResults: an output or a gradient is off by more than the dtype explains; it names the first.
        """
        if name in self.floors:
            return
        side = self.sides[name]
        if backward not in self._exact:
            self._exact[backward] = self.exact(backward)
        found, expected = side.outputs(0, backward), self._exact[backward]
        outputs, gradients = [side.shown(x) for x in found[0]], [side.real(x) for x in found[1]]
        tolerance = (DEEP_OUTPUT if self.deep else OPERATION)[self.dtype]
        self._compare(name, "output", outputs, expected[0], tolerance, [1.0] * len(expected[0]))
        tolerance = (DEEP_GRADIENT if self.deep else OPERATION)[self.dtype]
        sizes = [tolerance.size(y) if y.numel() else 0.0 for y in expected[1]]
        most = max(sizes, default=0.0)
        least = [SMALL * most if size > ZERO * most else most for size in sizes]
        self._compare(name, "gradient", gradients, expected[1], tolerance, least)

    def _compare(
        self,
        name: str,
        what: str,
        found: Sequence[Tensor],
        expected: Sequence[Tensor],
        tolerance: Tolerance,
        least: Sequence[float],
    ) -> None:
        """Of each its size counts, or what is the `least` for it."""
        for index, (x, y) in enumerate(zip(found, expected, strict=True)):
            if not y.numel():
                continue
            error = tolerance.size(x.reshape(y.shape).double() - y)
            bound = tolerance.share * max(least[index], tolerance.size(y))
            if not error <= bound:
                raise DifferentResults(
                    f"{self.group}, {name}: {what} {index} is off by {error:.2g}, allowed {bound:.2g}"
                )

    def input_bytes(self, name: str) -> int:
        """Of the leaves that bandwidth is measured on."""
        return sum(x.nbytes for x in self.sides[name].places[0])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile for the shapes of its first call, compiled then."""
    made: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not made:
            torch._dynamo.reset()  # else a second case's shapes would be compiled as symbols
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args)

    return call


def copies(tensors: Sequence[Tensor], places: int) -> list[list[Tensor]]:
    """Leaves in several places of memory."""
    return [[x.detach().clone().requires_grad_() for x in tensors] for _ in range(places)]


def exact_by_parts(
    run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], sequences: int, backward: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in fp64, sixteen sequences at a time: fp64 of a whole large case would not fit.

    Args:
        run: of a slice of the sequences, and the leaves in fp64: their outputs, a row for each.
        leaves, sequences: the leaves, and of how many sequences.
    """
    doubles = [x.detach().double().requires_grad_(backward) for x in leaves]
    parts = []
    for start in range(0, sequences, 16):
        outputs = run(slice(start, start + 16), *doubles)
        if backward:
            sum(output.square().sum() for output in outputs).backward()
        parts.append([output.detach() for output in outputs])
    return [torch.cat(rows) for rows in zip(*parts, strict=True)], [
        x.grad for x in doubles
    ] if backward else []
