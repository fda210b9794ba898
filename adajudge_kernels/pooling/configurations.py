"""How the pooling kernels cut their work: tokens and features per step, warps, stages.

A configuration depends on the kernel, the row (d, dtype, K) and nothing else of the call: not on lengths or batch, so
that a sequence's bits never depend on them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

WIDEST_ROW = {"scan": 8192, "scan_backward": 4096}
"""Features that one program can hold whole, with the running sums beside them, in its registers: wider rows spill. The
other kernels need no whole row."""

COMBINED_CHUNKS = 16
"""Chunks that a combining program loads at once."""


class Tile(NamedTuple):
    """Tokens and features (a power of two) of one step, and what runs it."""

    tokens: int
    block: int
    warps: int
    stages: int = 1


def tile(kernel: str, d: int, depths: int, dtype: torch.dtype) -> Tile:
    """The configuration of `kernel` for rows of `d` features, K = `depths`, states of `dtype`."""
    row = max(16, 1 << (d - 1).bit_length())
    block = row if d <= WIDEST_ROW.get(kernel, 0) else min(row, 1024)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Tile(64, block, 4)  # the interpreter's cost is the number of steps
    if kernel == "scan_backward":
        tokens = max(1, 2048 // block)
    elif kernel == "scan":
        tokens = max(1, 8192 // block)
    else:
        tokens = max(1, 4096 // block)
    tokens = min(tokens, 16)
    per_thread = (
        8 if kernel == "scan_backward" and depths > 4 else 16
    )  # more states, more registers an element
    return Tile(tokens, block, min(16, max(4, tokens * block // (32 * per_thread))))
