"""What every launch of a Triton kernel needs: aligned arguments, the right device, sizes, a deterministic sum of rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from adajudge_kernels.tables import CHUNK_TOKENS

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
ON_AMD = torch.version.hip is not None  # whose compiler has no limit on registers to set
FUSED = {"enable_fp_fusion": True}
"""Of a launch: a multiplication and an addition may be one instruction. Said each time, as triton's default is to change."""

_ROWS = 16  # that `sum_rows` loads at once


def aligned(x: Tensor) -> Tensor:
    """`x` with contiguous rows, from a 16-byte boundary on: where it lies must not change how a kernel is compiled,
    or a sum's order, and with it the result's bits, would depend on it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def power_of_2(n: int) -> int:
    """The next power of two (triton's own function costs microseconds a call, as does its cdiv)."""
    return 1 << (n - 1).bit_length()


def parts(n: int, size: int) -> int:
    """How many parts of `size` hold `n`."""
    return -(-n // size)


def narrow_block(d: int) -> int:
    """Features of a program that sums few rows: many programs, little in each."""
    return max(16, min(128, power_of_2(d)))


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it that of `x`."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def sum_rows(rows: Tensor) -> Tensor:
    """``[N, d] -> [d]`` in a fixed order, in steps of a factor of `CHUNK_TOKENS`."""
    d = rows.shape[1]
    block = narrow_block(d)
    while True:
        groups = parts(rows.shape[0], CHUNK_TOKENS)
        out = rows.new_empty(groups, d)
        _sum_rows[(groups, parts(d, block))](
            rows,
            out,
            rows.shape[0],
            D=d,
            ROWS=_ROWS,
            GROUP=CHUNK_TOKENS,
            BLOCK=block,
            ACC=TRITON_DTYPES[rows.dtype],
            num_warps=4,
            **FUSED,
        )
        if groups == 1:
            return out[0]
        rows = out


@triton.jit(do_not_specialize=["count"])
def _sum_rows(  # type: ignore[no-untyped-def]
    rows,
    out,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of GROUP consecutive rows of ``[count, D]``, in order. Grid (groups, blocks of D)."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), ACC)
    for step in range(0, GROUP, ROWS):
        row = group * GROUP + step + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.sum(tl.load(rows + row[:, None] * D + columns[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + group * D + columns, total, mask=inside)
