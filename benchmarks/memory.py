"""Peak memory of one side of a case beyond its inputs.

On a GPU the allocator says it. On the CPU the kernel says it of a process that does nothing else: a child of a server that has
imported everything and computed nothing, so that no memory freed before is there to be used again.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.case import Case

PRELOADED = [
    "benchmarks.batches",
    "benchmarks.eager",
    "benchmarks.backbones",
    "adajudge.scoring",
    "transformers.models.qwen3.modeling_qwen3",
]


def peak_bytes(case: Case, build: Callable[[int], Case], side: str, backward: bool) -> int | None:
    """None where nobody can say it. A child builds the case anew."""
    if case.device.type == "cuda":
        return _peak_of_allocator(case, side, backward)
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_measure_process, args=(sender, build, side, backward, torch.get_num_threads())
    )
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"the process that measures the memory of {side} ended with {child.exitcode}"
        ) from None
    finally:
        child.join()


def _peak_of_allocator(case: Case, side: str, backward: bool) -> int:
    case.sides[side].outputs(0, backward)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.sides[side].outputs(0, backward)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _measure_process(sender, build, side, backward, threads) -> None:
    gc.freeze()  # nothing imported is garbage
    torch.set_num_threads(threads)
    libc, m_mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(m_mmap_threshold, 64 << 10)  # what is freed goes back to the system at once
    case = build(1)
    case.sides[side].outputs(0, backward)  # compiles, and takes what is taken once
    gc.collect()
    libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    case.sides[side].outputs(0, backward)
    sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
