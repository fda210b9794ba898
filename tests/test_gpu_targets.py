"""What can be said without a GPU of the tests that need one: they are collected on a machine that has one, every backend's."""

import subprocess
import sys

import pytest
import torch

from adajudge_kernels import backends, compiled

STAND_IN = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_name = lambda *_: "stand-in"
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
with_cuda_kernels = pytest.mark.skipif(
    compiled.module is None or not compiled.module.with_cuda or compiled.module.emulated,
    reason="the compiled module holds no CUDA kernels",
)


@with_cuda_kernels
def test_the_module_serves_the_gpus_that_it_was_compiled_for():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)):  # the last by PTX
        assert backends.serves_capability(compiled.module.cuda_code, capability)
    assert not backends.serves_capability(compiled.module.cuda_code, (7, 5))


@with_cuda_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="here they are collected and run")
def test_every_backends_gpu_tests_are_collected_where_there_is_a_gpu():
    result = subprocess.run(
        [sys.executable, "-c", STAND_IN, "tests"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    for backend in ("reference-cuda", "triton-cuda", "cuda-cuda"):
        assert result.stdout.count(backend) > 100, backend
