"""Which backend serves a call, and why.

A backend is a name; the module that serves an operation family under that name is loaded on first use. A forced
backend is never silently replaced: where it cannot serve, the call raises and says why.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

__all__ = ["BACKENDS", "Choice", "available_backends", "choose_backend", "unavailable_reason", "use_backend"]

logger = logging.getLogger("adajudge_kernels")

ENVIRONMENT_VARIABLE = "ADAJUDGE_BACKEND"
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Module inside each operation family (pooling/, experts/, loss/, refinement/) that serves a backend.
_MODULES = {"reference": "reference"}

# Process-wide on purpose: worker and autograd threads see it, and torch.compile guards on a module global (it
# cannot trace a ContextVar), so that a compiled function is recompiled when the forced backend changes.
_forced: str | None = None
_logged: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Choice:
    """A backend's name and the reason why it serves the call."""

    backend: str
    reason: str


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot be used in this process, or None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}"
    if backend not in _MODULES:
        return f"this version of adajudge_kernels has no {backend} kernels"
    return None


def available_backends() -> list[str]:
    """Names of the backends that can serve calls in this process, e.g. ``["reference"]``."""
    return [backend for backend in BACKENDS if unavailable_reason(backend) is None]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force `backend` for every operation in the block, in all threads of the process.

    It takes precedence over the environment variable ``ADAJUDGE_BACKEND``.

    Raises:
        ValueError: on entry, if `backend` is unknown or cannot be used here; the message says why.
    """
    global _forced
    reason = unavailable_reason(backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot be used: {reason}")
    before = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = before


def choose_backend(device: torch.device) -> Choice:
    """The backend that serves operations on tensors of `device`.

    Order: `use_backend`, the environment variable, the automatic choice.

    Raises:
        ValueError: a forced backend is unknown or cannot be used.
    """
    if _forced is not None:
        return Choice(_forced, "forced by use_backend")
    # A compiled function keeps what the variable said when it was traced.
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        reason = unavailable_reason(named)
        if reason is not None:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={named}: {reason}")
        return Choice(named, f"forced by {ENVIRONMENT_VARIABLE}")
    return Choice("reference", f"no faster backend is built for {device.type} tensors")


def load(family: str, backend: str) -> ModuleType:
    """The module that serves the operations of `family` (e.g. ``"pooling"``) under `backend`."""
    return importlib.import_module(f"adajudge_kernels.{family}.{_MODULES[backend]}")


def log_once(operation: str, backend: str) -> None:
    """Log at INFO, once per operation and backend, which backend serves it."""
    if (operation, backend) not in _logged:
        _logged.add((operation, backend))
        logger.info("%s: served by the %s backend", operation, backend)
