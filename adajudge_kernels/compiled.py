"""What every call into the compiled module (`csrc/`) needs: the module or the reason why it is not there, dtypes,
addresses, threads, a layout's tables.

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
    if named:
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


def address(x: Tensor | None) -> int:
    """Where a contiguous tensor's numbers begin; 0 for none."""
    return 0 if x is None else x.data_ptr()


def as_arithmetic(x: Tensor, acc: torch.dtype) -> Tensor:
    """A small argument as the kernels want it: in the precision of their arithmetic, contiguous."""
    x = x if x.dtype == acc else x.to(acc)
    return x if x.is_contiguous() else x.contiguous()


def layout_of(tables: LayoutTables) -> Any:
    """The module's view of the tables; they must outlive it."""
    return module.Layout(
        *(x.data_ptr() for x in tables),
        *(x.shape[0] for x in tables),
    )
