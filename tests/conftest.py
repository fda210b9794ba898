"""Fixtures of all tests."""

import importlib.util
import os
import sys

import pytest
import torch

from tests.summary import (  # noqa: F401 (hooks of pytest)
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# The compiled module to test instead of the package's own (tests/cuda/emulated_module.py).
if os.environ.get("ADAJUDGE_TEST_MODULE"):
    _spec = importlib.util.spec_from_file_location(
        "adajudge_kernels._native", os.environ["ADAJUDGE_TEST_MODULE"]
    )
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.change()

# Test workers run side by side and their tensors are small: waiting for threads would be most of the time. What
# must not depend on the number of threads is tested with several (test_contract.py, test_native.py).
torch.set_num_threads(1)


# As torch asks of who wants deterministic matrix products on a GPU (test_contract.py); cuBLAS reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
