"""Which backend serves a call, and why.

A backend is a name; the module that serves an operation family under that name is loaded on first use. A forced
backend is never silently replaced: where it cannot serve, the call raises and says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import NamedTuple

import torch

from adajudge_kernels import compiled
from adajudge_kernels.measurements import measured_names

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "SERVED",
    "Choice",
    "available_backends",
    "choose_backend",
    "unavailable_reason",
    "use_backend",
]

logger = logging.getLogger("adajudge_kernels")

BACKEND_VARIABLE = "ADAJUDGE_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")

FAMILIES = ("pooling", "refinement", "experts", "loss")

# The operation families that a backend serves, each by a module in the family's folder.
SERVED: dict[str, tuple[str, ...]] = {
    "reference": FAMILIES,
    "cpu": FAMILIES,
    "triton": FAMILIES,
    "cuda": ("pooling", "experts", "loss"),
}
_MODULES = {"reference": "reference", "cpu": "native", "triton": "triton", "cuda": "native"}

_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it when it is imported

# Forced backend by family. Process-wide on purpose: worker and autograd threads see it, and torch.compile guards on a
# module global (it cannot trace a ContextVar), so that a compiled function is recompiled when it changes.
_forced: dict[str, str] = {}


class Choice(NamedTuple):
    """A backend's name and the reason why it serves the call."""

    backend: str
    reason: str


def unavailable_reason(backend: str, family: str | None = None) -> str | None:
    """Why `backend` cannot be used in this process (for operations of `family`), or None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}"
    if backend in ("cpu", "cuda") and compiled.missing is not None:
        return compiled.missing
    if backend == "cpu" and compiled.module.emulated:
        return "the compiled module emulates a CUDA device on the CPU, and serves nothing else"
    if backend == "cuda" and not compiled.module.with_cuda:
        return "the compiled module was built without CUDA kernels: no nvcc was found, or ADAJUDGE_BUILD_CUDA=0 was set"
    if backend == "cuda" and not compiled.module.emulated:
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        capability = _gpu_capability()
        if not serves_capability(compiled.module.cuda_code, capability):
            return (
                f"the compiled module holds CUDA kernels for {compiled.module.cuda_code}, and the GPU is of "
                f"{capability[0]}.{capability[1]}: install it anew with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
            )
    if backend == "triton":
        if not _TRITON_FOUND:
            return "triton is not installed"
        if not _TRITON_INTERPRETED and not torch.cuda.is_available():
            return "torch finds no GPU (with TRITON_INTERPRET=1 triton kernels run on the CPU, slowly)"
    if family is not None and family not in SERVED[backend]:
        served = SERVED[backend]
        return (
            f"it has no kernels for {family}, only for {', '.join(served)}; force it for those alone: "
            f"use_backend({backend!r}, families={served!r})"
        )
    return None


def available_backends() -> list[str]:
    """Names of the backends that can serve calls in this process, e.g. ``["reference"]``."""
    return [backend for backend in BACKENDS if unavailable_reason(backend) is None]


def use_backend(backend: str, families: Collection[str] = FAMILIES) -> AbstractContextManager[None]:
    """Force `backend` for the operations of `families` in the block, in all threads of the process.

    Blocks must nest, those of several threads too. It takes precedence over the environment variable
    ``ADAJUDGE_BACKEND`` (which a compiled function reads when it is compiled, not again). A call that the forced backend
    cannot serve raises a ValueError.

    Args:
        backend: one of `available_backends`.
        families: which operations: ``"pooling"``, ``"refinement"``, ``"experts"``, ``"loss"``; default all.

    Raises:
        ValueError: `backend` is unknown or cannot be used here; the message says why.
    """
    reason = unavailable_reason(backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot be used: {reason}")
    unknown = set(families) - set(FAMILIES)
    if unknown or isinstance(families, str):
        raise ValueError(f"families: {families!r} came, expected some of {', '.join(FAMILIES)}")
    return _forcing(dict.fromkeys(families, backend))


@contextmanager
def _forcing(backend_of: dict[str, str]) -> Iterator[None]:
    global _forced
    before = _forced
    _forced = before | backend_of
    try:
        yield
    finally:
        _forced = before


def choose_backend(device: torch.device, family: str) -> Choice:
    """The backend that serves operations of `family` on tensors of `device`.

    Order: `use_backend`, the environment variable, the `fastest`.

    Raises:
        ValueError: a forced backend is unknown or cannot serve the call.
    """
    forced = _forced.get(family)
    if forced is not None:
        return Choice(_servable("backend " + repr(forced), forced, device, family), "forced by use_backend")
    named = _named_backend()
    if named:
        source = f"{BACKEND_VARIABLE}={named}"
        return Choice(_servable(source, named, device, family), f"forced by {BACKEND_VARIABLE}")
    return _traceable_fastest(device, family)


@torch.compiler.assume_constant_result  # a compiled function keeps what the variable said when it was traced
def _named_backend() -> str | None:
    """What the environment variable says. The C library is asked: ``os.environ`` raises and catches where nothing is set."""
    if compiled.module is None:
        return os.environ.get(BACKEND_VARIABLE)
    return compiled.module.environment(BACKEND_VARIABLE)


@functools.cache
def fastest(device: torch.device, family: str) -> Choice:
    """The backend that serves `family` on a device if none is forced.

    On CUDA it is what ``python -m adajudge_kernels.tune`` measured to be the faster of Triton and the CUDA C++ kernels on
    this GPU; where nothing was measured, Triton; without Triton the CUDA C++ kernels. On the CPU it is the compiled
    kernels. Where those are not here, and elsewhere, it is the reference.
    """
    if device.type == "cuda":
        measured = measured_names("backends", ("triton", "cuda")).get(family)
        if measured and unavailable_reason(measured, family) is None:
            return Choice(measured, "measured to be the fastest on this GPU")
        if _TRITON_FOUND and family in SERVED["triton"]:
            return Choice("triton", "the usual one on GPUs")
        if unavailable_reason("cuda", family) is None:
            return Choice("cuda", "triton is not installed")
    if device.type == "cpu" and unavailable_reason("cpu", family) is None:
        return Choice("cpu", "the fastest for cpu tensors")
    return Choice("reference", f"no faster {family} kernels are here for {device.type} tensors")


@torch.compiler.assume_constant_result  # a trace reads no files
def _traceable_fastest(device: torch.device, family: str) -> Choice:
    return fastest(device, family)


@torch.compiler.assume_constant_result
def _gpu_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@functools.cache  # asked at every call that forces the backend
def serves_capability(code: str, capability: tuple[int, int]) -> bool:
    """Whether compiled `code` (``"sm_80;sm_90a;compute_120"``) runs on a GPU of a compute capability.

    Machine code (sm) serves its own major capability from its minor one on, PTX (compute) all later ones too; with the
    suffix ``a`` both serve their own alone.
    """
    for kind, name in (entry.split("_") for entry in code.split(";")):
        compiled_for = divmod(int(name.rstrip("af")), 10)
        if compiled_for == capability:
            return True
        later = compiled_for < capability and not name.endswith("a")
        if later and (kind == "compute" or compiled_for[0] == capability[0]):
            return True
    return False


def _servable(source: str, backend: str, device: torch.device, family: str) -> str:
    """`backend`, or a ValueError in the name of who forced it."""
    reason = unavailable_reason(backend, family)
    if reason is None and backend == "triton" and device.type != "cuda" and not _TRITON_INTERPRETED:
        reason = f"it serves cuda tensors, and these are on {device.type}"
    if reason is None and backend == "cuda" and device.type != "cuda" and not compiled.module.emulated:
        reason = f"it serves cuda tensors, and these are on {device.type}"
    if reason is None and backend == "cpu" and device.type != "cpu":
        reason = f"it serves cpu tensors, and these are on {device.type}"
    if reason is not None:
        raise ValueError(f"{source}: {reason}")
    return backend


@functools.cache
def load(family: str, backend: str) -> ModuleType:
    """The module that serves the operations of `family` (e.g. ``"pooling"``) under `backend`."""
    return importlib.import_module(f"adajudge_kernels.{family}.{_MODULES[backend]}")


@functools.cache
def log_once(operation: str, backend: str) -> None:
    """Log at INFO, once per operation and backend, which backend serves it."""
    logger.info("%s: served by the %s backend", operation, backend)
