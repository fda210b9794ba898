"""What every call into the compiled module (`csrc/`) needs: the module or the reason why it is not there, where a call
runs.

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
from torch.nn import Parameter

SIMD_VARIABLE = "ADAJUDGE_SIMD"

module: Any = None
"""The compiled module, or None."""

missing: str | None = None
"""Why there is no compiled module, or None."""


def _load() -> ModuleType:
    _native = importlib.import_module("adajudge_kernels._native")
    try:
        _native.show_tensors(Tensor.__dlpack_c_exchange_api__, [Tensor, Parameter])
    except (AttributeError, ValueError, RuntimeError) as error:
        raise ImportError(f"it cannot read the tensors of torch {torch.__version__}: {error}") from error
    named = os.environ.get(SIMD_VARIABLE)
    if named and not _native.emulated:
        if named not in _native.levels():
            raise ValueError(
                f"{SIMD_VARIABLE}={named}: this processor has none of that name, only "
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
        _reason.read_text().strip() if _reason.exists() else f"the compiled module cannot be used ({error})"
    )


def run(operation: str, x: Tensor, *arguments: Any) -> None:
    """Call `operation` of the module where `x` is: on torch's threads, or on its CUDA device's current stream.

    Tensors that are read may lie as they like, the module copies them where it must; those that are written are contiguous.
    """
    call = getattr(module, operation)
    if not (x.is_cuda or module.emulated):  # tests put something in a CUDA device's place
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
