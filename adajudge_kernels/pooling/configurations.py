"""How the pooling kernels cut their work: tokens and features per step, warps, stages.

A configuration depends on the kernel and the row (d, K, dtype) and on nothing else of the call: not on lengths or batch,
so that a sequence's bits never depend on them, and nothing is compiled or tuned anew when they change.

The table of defaults is small and the same for all architectures: what bounds a step is the register file, 64 Ki registers
an SM on all of them; the scans' next steps lie in shared memory, at most 64 KiB. Its figures come from compile reports: no
spills, 128 registers a thread and less where K allows it, sixteen warps an SM and more for usual rows, and as few instructions
a byte as that leaves (docs/triton-pooling.md).
``python -m adajudge_kernels.tune`` measures alternatives on the GPU at hand and keeps what is faster in a file of the user's
cache folder, which is read here.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from adajudge_kernels.layout import CHUNK_TOKENS
from adajudge_kernels.measurements import measured_file

logger = logging.getLogger("adajudge_kernels")


def widest_row(kernel: str, depths: int, dtype: torch.dtype) -> int:
    """Features that one program can hold whole, with the running sums beside them, in its registers: wider rows spill.
    The kernels that need no whole row have none."""
    if kernel == "scan_backward":
        return 2048 if depths > (4 if dtype.itemsize == 2 else 3) else 4096
    if kernel == "scan":
        return 4096 if dtype.itemsize > 2 and depths > 4 else 8192
    return 0


WIDEST_PART = 1024
"""Features of a step of the kernels that need no whole row."""

STAGED_BYTES = 64 << 10
"""Of states that a program has under way at most, in shared memory: every GPU has room for one such program an SM."""

COMBINED_CHUNKS = 16
"""Chunks that a combining program loads at once."""


class Tile(NamedTuple):
    """Tokens and features (powers of two) of one step, and what runs it."""

    tokens: int
    block: int
    warps: int
    stages: int = 1
    registers: int | None = None  # a thread may use; None leaves them to the compiler, which may spill some


class _Step(NamedTuple):
    """What a step may hold: numbers (tokens times features) and how many of them a thread."""

    numbers: int
    per_thread: int
    most_tokens: int = 16
    most_warps: int = 16
    registers: int | None = None
    stages: int = 1  # of the kernels that load steps ahead, at most
    in_threads: bool = False  # a thread has its features of all tokens: sums over tokens wait for no other


# By kernel, and for the scans by the bytes of K numbers: their registers grow with them.
_STEPS = {
    "scan": _Step(2048, 16, registers=128, stages=3, in_threads=True),
    "scan, more than 12 bytes": _Step(2048, 16, most_warps=8, registers=255, stages=2, in_threads=True),
    "scan_backward": _Step(1024, 8, registers=128, stages=2, in_threads=True),
    "scan_backward, more than 6 bytes": _Step(
        1024, 8, most_warps=8, registers=255, stages=2, in_threads=True
    ),
    "dots": _Step(2048, 16, registers=128),
    "sums": _Step(4096, 32, stages=3, in_threads=True),
    "spread_means": _Step(4096, 16),
    "spread_attention": _Step(2048, 8, 8),
}


_forced: dict[str, Tile] = {}


def tile(kernel: str, d: int, depths: int, dtype: torch.dtype) -> Tile:
    """The configuration of `kernel` for rows of `d` features, K = `depths`, states of `dtype`."""
    return _forced.get(kernel) or _chosen(kernel, d, depths, dtype)


@contextmanager
def forced_tile(kernel: str, forced: Tile) -> Iterator[None]:
    """Give one kernel a configuration in the block, for measuring."""
    _forced[kernel] = forced
    try:
        yield
    finally:
        del _forced[kernel]


@functools.cache
def _chosen(kernel: str, d: int, depths: int, dtype: torch.dtype) -> Tile:
    default = default_tile(kernel, d, depths, dtype)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Tile(CHUNK_TOKENS, default.block, 4)  # the interpreter's cost is the number of steps
    return measured_tiles().get(key(kernel, d, depths, dtype), default)


def default_tile(kernel: str, d: int, depths: int, dtype: torch.dtype) -> Tile:
    """What the table says, without a measurement."""
    row = max(16, 1 << (d - 1).bit_length())
    block = row if d <= widest_row(kernel, depths, dtype) else min(row, WIDEST_PART)
    step = _step(kernel, depths, dtype)
    tokens = min(step.most_tokens, max(1, step.numbers // block))
    warps = min(step.most_warps, max(4, tokens * block // (32 * step.per_thread)))
    if step.in_threads:
        warps = min(warps, max(1, block * dtype.itemsize // 512))  # a warp's threads load 16 bytes each
        tokens = min(tokens, max(1, warps * 32 * step.per_thread // block))
    stages = min(step.stages, 1 + STAGED_BYTES // (tokens * block * depths * dtype.itemsize))
    return Tile(tokens, block, warps, stages, step.registers)


def _step(kernel: str, depths: int, dtype: torch.dtype) -> _Step:
    heavy = {"scan": 12, "scan_backward": 6}.get(kernel)
    if heavy is not None and depths * dtype.itemsize > heavy:
        return _STEPS[f"{kernel}, more than {heavy} bytes"]
    return _STEPS[kernel]


def candidates(kernel: str, d: int, depths: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles that are worth a measurement, the default first; all of them compute the same, up to rounding."""
    default = default_tile(kernel, d, depths, dtype)
    row_bytes = default.block * depths * dtype.itemsize
    most = 3 if _step(kernel, depths, dtype).stages > 1 else 1
    found = [default]
    for tokens in (1, 2, 4, 8, 16, 32):
        for warps in (2, 4, 8, 16):
            per_thread = tokens * default.block // (32 * warps)
            if 4 <= per_thread <= 32:
                stages = [n for n in range(1, most + 1) if (n - 1) * tokens * row_bytes <= STAGED_BYTES]
                found += [default._replace(tokens=tokens, warps=warps, stages=n) for n in stages]
                found.append(default._replace(tokens=tokens, warps=warps, registers=None))
    return list(dict.fromkeys(found))


def key(kernel: str, d: int, depths: int, dtype: torch.dtype) -> str:
    """The name of a configuration in the file of measured ones."""
    return f"{kernel} d={d} K={depths} {str(dtype).removeprefix('torch.')}"


@functools.cache
def measured_tiles() -> dict[str, Tile]:
    """The configurations of the measured file; none, and a warning, if it cannot be used."""
    path = measured_file("tiles")
    if path is None or not path.is_file():
        return {}
    try:
        tiles = {name: _checked(name, entry) for name, entry in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        logger.warning("%s is not used: %s; python -m adajudge_kernels.tune writes a new one", path, error)
        return {}
    logger.info("%d measured configurations from %s", len(tiles), path)
    return tiles


def _checked(name: str, entry: object) -> Tile:
    """A tile of the file; one that the kernels cannot run, or that would cut a chunk apart, is an error."""
    if not isinstance(entry, dict) or set(entry) != set(Tile._fields):
        raise ValueError(f"{name}: {entry!r} came, expected {', '.join(Tile._fields)}")
    found = Tile(**entry)
    named = re.fullmatch(r"(\w+) d=(\d+) K=(\d) (\w+)", name)
    if named is None:
        raise ValueError(f"{name!r} names no configuration")
    kernel, d, depths, dtype = named.groups()
    powers = all(isinstance(x, int) and x > 0 and x & (x - 1) == 0 for x in found[:3])
    fits = powers and found.tokens <= CHUNK_TOKENS and found.warps <= 32 and found.stages in range(1, 9)
    fits = fits and (found.registers is None or found.registers in range(16, 256))
    default = default_tile(kernel, int(d), int(depths), getattr(torch, dtype))
    if not fits or found.block != default.block:
        raise ValueError(f"{name}: {entry!r} is no configuration of this kernel")
    return found


def forget() -> None:
    """Read the file anew at the next call."""
    _chosen.cache_clear()
    measured_tiles.cache_clear()
