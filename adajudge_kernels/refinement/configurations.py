"""How the refinement kernels cut their work. By the row (head size, d, dtype) alone, never by lengths or batch: a
token's bits do not depend on them, and nothing is compiled anew when they change. Chosen by compile reports: no spills on
any architecture, and shared memory within the 99 KiB of the smallest."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from adajudge_kernels.launches import power_of_2
from adajudge_kernels.tables import CHUNK_TOKENS


class AttentionStep(NamedTuple):
    """Queries and keys of one step (powers of two), and what runs it: warps, stages, and how many registers a thread may
    use (None leaves that to the compiler, which may spill to use fewer)."""

    queries: int
    keys: int
    warps: int
    stages: int = 1
    registers: int | None = None


# By kernel, and the widest head that the step is for.
_HALF = {
    "forward": {
        64: AttentionStep(128, 32, 4, 3),
        128: AttentionStep(128, 32, 8, 3),
        256: AttentionStep(64, 64, 8),
    },
    "backward_queries": {
        64: AttentionStep(64, 64, 4, 2),
        128: AttentionStep(64, 32, 4, 2),
        256: AttentionStep(32, 32, 4, 2),
    },
    "backward_keys": {
        64: AttentionStep(32, 64, 8, 2),
        128: AttentionStep(32, 64, 8, 2),
        256: AttentionStep(32, 32, 8),
    },
}
# fp32 products go without tensor cores: exactly, and slowly.
_SINGLE = {
    "forward": {
        64: AttentionStep(32, 32, 4),
        128: AttentionStep(32, 16, 8, registers=255),
        256: AttentionStep(16, 32, 8),
    },
    "backward_queries": {
        64: AttentionStep(32, 32, 8),
        128: AttentionStep(16, 16, 8, registers=255),
        256: AttentionStep(16, 16, 8, registers=255),
    },
    "backward_keys": {
        64: AttentionStep(32, 32, 8, registers=255),
        128: AttentionStep(16, 32, 8, registers=255),
        256: AttentionStep(16, 16, 8, registers=255),
    },
}


def attention_step(kernel: str, head_size: int, dtype: torch.dtype) -> AttentionStep:
    """The step of `kernel` (``"forward"``, ``"backward_queries"`` or ``"backward_keys"``)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return AttentionStep(CHUNK_TOKENS, CHUNK_TOKENS, 4)  # the interpreter's cost is the number of steps
    table = (_HALF if dtype.itemsize == 2 else _SINGLE)[kernel]
    return next(step for widest, step in table.items() if head_size <= widest)


class RowStep(NamedTuple):
    """Rows and features of one step (powers of two), and the warps that hold them."""

    tokens: int
    block: int
    warps: int


WIDEST_NORM = 8192
"""Features of a row that the norm's backward holds whole."""

WIDE_NORM_STEP = RowStep(2, 2048, 8)


def norm_step(d: int) -> RowStep:
    """Whole rows of the norm: 16 numbers a thread and tensor, rows of more than 8192 features 32."""
    row = power_of_2(d)
    tokens = max(1, min(16, 2048 // row))
    return RowStep(tokens, row, max(1, min(16, tokens * row // 512)))


def swiglu_block(width: int) -> tuple[int, int]:
    """Features of a program of the SwiGLU, and its warps: 8 numbers a thread."""
    block = max(16, min(1024, power_of_2(width)))
    return block, max(1, block // 256)
