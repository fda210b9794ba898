"""Checks of the operations' arguments: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from adajudge_kernels import compiled
from adajudge_kernels.layout import LayoutTables, SequenceLayout

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_DEPTHS = 8
MAX_FEATURES = 16384
MAX_WIDTH = 1 << 20  # of hidden layers


def fit(layout: object, form: str, *arguments: object) -> bool:
    """Whether a layout and the arguments beside it would pass these checks, in one look of the compiled module.

    `form` has a word for each argument and a letter for each of its dimensions, ``"Td Kd K"``: T and B are the layout's, any
    other letter is one size wherever it stands, 1 is 1; ``"K*Td"`` is a list of K tensors of one dtype. False is no verdict:
    then the checks say what is wrong, if anything.
    """
    if is_dynamo_compiling() or compiled.module is None:
        return False
    if type(layout) is not SequenceLayout or type(layout.tables) is not LayoutTables:
        return False
    return compiled.module.fit(layout.tables.native, form, *arguments)


def check_layout(layout: object) -> None:
    """`layout` is a `SequenceLayout`."""
    if not isinstance(layout, SequenceLayout):
        raise ValueError(f"layout: {type(layout).__name__} came, expected a SequenceLayout")
    if layout.tables is None:
        raise ValueError("layout: it has no tables; build it with padded, packed or shared_prompts")


def check_float(name: str, x: object, dims: int, form: str | tuple[int, ...]) -> None:
    """`x` is a floating point tensor of `dims` dimensions; `form` is what they should be, e.g. ``[T, d]``."""
    if isinstance(x, Tensor) and x.dim() == dims and x.dtype in FLOAT_DTYPES:
        return
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: {type(x).__name__} came, expected a tensor {_written(form)}")
    if x.dim() != dims:
        raise ValueError(f"{name}: shape {tuple(x.shape)} came, expected {_written(form)}")
    raise ValueError(
        f"{name}: dtype {x.dtype} came, expected float32, bfloat16 or float16 (float64 for checking)"
    )


def _written(form: str | tuple[int, ...]) -> str:
    return form if isinstance(form, str) else str(list(form))


def check_states(name: str, hidden: object, layout: SequenceLayout) -> None:
    """`hidden` is ``[T, d]`` over the layout's T tokens, on its device."""
    check_float(name, hidden, 2, "[T, d]")
    assert isinstance(hidden, Tensor)
    tokens, features = hidden.shape
    if tokens != layout.num_tokens:
        raise ValueError(
            f"{name}: shape {tuple(hidden.shape)} came, expected [{layout.num_tokens}, d] for this layout"
        )
    if not 1 <= features <= MAX_FEATURES:
        raise ValueError(f"{name}: {features} features came, expected 1 to {MAX_FEATURES}")
    if hidden.device != layout.device:
        raise ValueError(
            f"{name}: on {hidden.device}, but the layout is on {layout.device}; use layout.to(..)"
        )


def check_shape(name: str, x: object, shape: tuple[int, ...]) -> None:
    """`x` is floating point of exactly `shape`."""
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype not in FLOAT_DTYPES:
        check_float(name, x, len(shape), shape)
        assert isinstance(x, Tensor)
        raise ValueError(f"{name}: shape {tuple(x.shape)} came, expected {_written(shape)}")


def check_like(name: str, x: object, shape: tuple[int, ...], other: Tensor, other_name: str) -> None:
    """`x` is floating point of exactly `shape`, on the device of `other`, and fp64 only if `other` is."""
    check_shape(name, x, shape)
    assert isinstance(x, Tensor)
    if x.device != other.device:
        raise ValueError(f"{name}: on {x.device}, but {other_name} is on {other.device}")
    if (x.dtype == torch.float64) != (other.dtype == torch.float64):
        raise ValueError(
            f"{name}: dtype {x.dtype} came with {other_name} of {other.dtype}; "
            "float64 is for checking and goes with float64 only"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} came, expected one of {', '.join(map(repr, choices))}")


def check_depths(name: str, depths: int) -> None:
    """The number of refinement blocks is 1 to 8."""
    if not 1 <= depths <= MAX_DEPTHS:
        raise ValueError(f"{name}: {depths} depths came, expected 1 to {MAX_DEPTHS}")


def check_size(name: str, value: object, most: int) -> None:
    """`value` is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name}: {value!r} came, expected an integer from 1 to {most}")


def check_number(name: str, value: object, low: float, inclusive: bool = True) -> None:
    """`value` is a finite number, at least (or above) `low`."""
    expected = f"a finite number {'at least' if inclusive else 'above'} {low}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: {value!r} came, expected {expected}")
    number = float(value)
    # Compared rather than math.isfinite: torch.compile traces this.
    if not low <= number < math.inf or (number == low and not inclusive):
        raise ValueError(f"{name}: {value!r} came, expected {expected}")
