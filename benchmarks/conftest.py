"""Options, what is measured on which device, and what is said of the machine."""

import functools
import importlib.metadata
import importlib.util
import platform
import sys
import time
import traceback

import pytest
import torch

from benchmarks import measuring, sizes
from benchmarks.allocator import keep_freed_memory

STARTED = pytest.StashKey[float]()
SIZED = {"tokens", "pooled", "rows", "pairs", "head_tokens", "backbones", "trained"}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--within", type=float, help="seconds; a case that has not begun by then is skipped")


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()
    name = config.getoption("--device")
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: {name!r} came, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: cuda came, and torch finds no GPU")


def pytest_runtest_setup(item):
    within = item.config.getoption("--within")
    if within is not None and time.monotonic() - item.config.stash[STARTED] > within:
        pytest.skip(f"the {within:g} seconds are over")


def pytest_runtest_teardown():
    """A case that failed lets go of its tensors: pytest keeps the last traceback, whose frames hold them."""
    last = getattr(sys, "last_value", None)
    if last is not None:
        traceback.clear_frames(last.__traceback__)


@pytest.fixture(scope="session", autouse=True)
def memory_is_kept():
    keep_freed_memory()


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


def pytest_generate_tests(metafunc):
    """Arguments that name a field of `sizes.Sizes` take its values for the device."""
    found = sizes.of(torch.device(metafunc.config.getoption("--device")))
    for name in SIZED & set(metafunc.fixturenames):
        metafunc.parametrize(name, getattr(found, name), ids=str)


@pytest.fixture
def measured(benchmark, device):
    """`measuring.measure` for this benchmark and device."""
    return functools.partial(measuring.measure, benchmark, device=device)


@pytest.fixture(scope="session")
def chosen(device):
    """`sizes.Sizes` of the device."""
    return sizes.of(device)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a reader needs to judge the figures, and nothing else of the machine."""
    cpu = machine_info.get("cpu", {})
    kept = {"processor": cpu.get("brand_raw", "unknown"), "cores": cpu.get("count")}
    machine_info.clear()
    machine_info.update(kept, python=platform.python_version(), torch=torch.__version__)
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda
    if importlib.util.find_spec("triton"):
        machine_info["triton"] = importlib.metadata.version("triton")
