"""What can be said without a GPU of the tests that need one: they are collected on a machine that has one, every backend's."""

import re
import subprocess
import sys
from pathlib import Path

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


def test_the_gpus_benchmarks_come_in_the_order_that_the_makefile_names():
    """Of what has not begun in time nothing is measured. One file is left out: what a call costs the CPU."""
    root = Path(__file__).parents[1]
    stems = re.search(r"^GPU_BENCHES := .*,([\w ]+)\)$", (root / "Makefile").read_text(), re.MULTILINE)[
        1
    ].split()
    files = [f"benchmarks/test_{stem}.py" for stem in stems]
    there = {f"benchmarks/{path.name}" for path in (root / "benchmarks").glob("test_*.py")}
    assert there - set(files) == {"benchmarks/test_eager_cost.py"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", *files]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    collected = [line.split("::")[0] for line in result.stdout.splitlines() if line.startswith("benchmarks/")]
    assert list(dict.fromkeys(collected)) == files
