"""Fixtures of all tests."""

import pytest
import torch

from tests.summary import (  # noqa: F401 (hooks of pytest)
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

# Test workers run side by side and their tensors are small: waiting for threads would be most of the time. What
# must not depend on the number of threads is tested with several (test_contract.py).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
