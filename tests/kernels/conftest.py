"""The contract runs once per backend and device: a new backend joins by its name in `BACKENDS`."""

import os
import platform

import pytest
import torch

from adajudge_kernels import available_backends, compiled, use_backend
from adajudge_kernels.backends import BACKENDS, SERVED

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # `make test` runs the triton backend so, in its own process
EMULATED = (
    compiled.module is not None and compiled.module.emulated
)  # CUDA kernels on the CPU, in a process of their own too
SERVES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cpu",) if INTERPRETED else ("cuda",),
    "cuda": ("cpu",) if EMULATED else ("cuda",),
}


def contract_targets():
    for backend in BACKENDS:
        if backend in available_backends():
            for device in SERVES[backend]:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                yield pytest.param((backend, device), id=f"{backend}-{device}", marks=marks)


@pytest.fixture(params=list(contract_targets()))
def device(request):
    """The device to test on, with the backend under test forced."""
    backend, name = request.param
    with use_backend(backend, families=SERVED[backend]):
        yield torch.device(name)


@pytest.fixture
def levels():
    """Every instruction set of this processor; the one in use comes back after the test."""
    used = compiled.module.level()
    yield compiled.module.levels()
    compiled.module.use_level(used)


@pytest.fixture
def fusing_levels(levels):
    """Those with fused multiply-adds: all but the plain one of x86-64."""
    fusing = [level for level in levels if level != "plain" or platform.machine() != "x86_64"]
    if len(fusing) < 2:
        pytest.skip("this processor has one such set: there is nothing to compare")
    return fusing
