"""What every launch of a Triton kernel needs: aligned arguments, the right device, sizes. Only `triton.py` files import it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

ON_AMD = torch.version.hip is not None  # whose compiler has no limit on registers to set
TRITON_DTYPES = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


def aligned(x: Tensor) -> Tensor:
    """`x` with contiguous rows, from a 16-byte boundary on: where it lies must not change how a kernel is compiled,
    or a sum's order, and with it the result's bits, would depend on it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def power_of_2(n: int) -> int:
    """The next power of two (triton's own function costs microseconds a call, as does its cdiv)."""
    return 1 << (n - 1).bit_length()


def parts(n: int, size: int) -> int:
    """How many parts of `size` make up `n`."""
    return -(-n // size)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it that of `x`."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
