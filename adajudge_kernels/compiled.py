"""What every call into the compiled module (`csrc/`) needs: the module or the reason why it is not there, where a call
runs, dtypes, addresses, a layout's tables.

The module holds no OpenMP runtime of its own: it uses torch's, which must be loaded first, so that the process has one
pool of threads. ``ADAJUDGE_SIMD`` (``avx512``, ``avx2`` or ``plain``) chooses the instruction set of its CPU kernels;
results have the same bits on all that fuse multiplications and additions (avx512, avx2).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adajudge_kernels.tables import LayoutTables

ENVIRONMENT_VARIABLE = "ADAJUDGE_SIMD"

module: Any = None
"""The compiled module, or None."""

missing: str | None = None
"""Why there is no compiled module, or None."""


def _load() -> ModuleType:
    _native = importlib.import_module("adajudge_kernels._native")
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named and not _native.emulated:
        if named not in _native.levels():
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={named}: this processor has none of that name, only "
                f"{', '.join(_native.levels())}"
            )
        _native.use_level(named)
    return _native


try:
    module = _load()
except ImportError as error:
    # An installation that did not build the module has written why.
    _reason = Path(__file__).with_name("_native_missing.txt")
    missing = (
        _reason.read_text().strip() if _reason.exists() else f"the compiled module is not there ({error})"
    )

_DTYPES = {getattr(torch, name): code for name, code in (module.Dtype.__members__.items() if module else ())}


def dtype_code(dtype: torch.dtype) -> Any:
    """The module's name of a dtype."""
    return _DTYPES[dtype]


def run(operation: str, x: Tensor, *arguments: Any) -> None:
    """Call `operation` of the module where `x` is: on torch's threads, or on its CUDA device's current stream."""
    call = getattr(module, operation)
    if not on_cuda(x):
        call(torch.get_num_threads(), *arguments)
        return
    held = []  # a piece of memory is reused only after what is in the stream's queue by then

    def memory(size: int) -> int:
        held.append(x.new_empty(size, dtype=torch.uint8))
        return held[-1].data_ptr()

    if not x.is_cuda:
        call(module.Stream(0, memory), *arguments)
        return
    with torch.cuda.device_of(x):
        call(module.Stream(torch.cuda.current_stream(x.device).cuda_stream, memory), *arguments)


def on_cuda(x: Tensor) -> bool:
    """Whether calls with `x` run on a CUDA device, or on what the tests have in its place."""
    return x.is_cuda or module.emulated


def address(x: Tensor | None) -> int:
    """Where a contiguous tensor's numbers begin; 0 for none."""
    return 0 if x is None else x.data_ptr()


def contiguous(x: Tensor) -> Tensor:
    """`x` as the kernels read it: contiguous, and on CUDA from a multiple of sixteen bytes on."""
    x = x.contiguous()
    return x.clone() if on_cuda(x) and x.data_ptr() % 16 else x


def as_arithmetic(x: Tensor, acc: torch.dtype) -> Tensor:
    """An argument as the kernels want it: in the precision of their arithmetic."""
    return contiguous(x if x.dtype == acc else x.to(acc))


def small(x: Tensor, acc: torch.dtype) -> Tensor:
    """A small argument as the module takes it, `stored`: where it runs on a CPU, it widens numbers itself."""
    return as_arithmetic(x, acc) if on_cuda(x) else x.contiguous()


def stored(x: Tensor | None) -> tuple[Any, int, int] | None:
    """A small argument for the module: dtype, address and how many numbers."""
    return None if x is None else (dtype_code(x.dtype), address(x), x.numel())


def layout_of(tables: LayoutTables) -> Any:
    """The module's view of the tables; they must outlive it. Made once: between other work, to ask every table where it lies
    takes longer than some kernels."""
    begin = tables.roles.data_ptr()
    known = tables.__dict__.get("native")
    if known is not None and known[0] == begin:  # else they have been moved to shared memory
        return known[1]
    layout = module.Layout(*(x.data_ptr() for x in tables), *(x.shape[0] for x in tables))
    if begin:  # a table of nothing never moves
        tables.__dict__["native"] = begin, layout
    return layout
