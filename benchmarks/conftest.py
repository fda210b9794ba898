"""Options, and how the read bandwidth that cases are measured against is found."""

import ctypes
import importlib.metadata
import importlib.util
import platform
import time

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda")


@pytest.fixture(scope="session", autouse=True)
def memory_is_kept():
    """Freed memory stays with the process, as it does in one that has run for a while. Else glibc gives large blocks
    back to the system and takes them anew, page by page, until its own threshold has grown: whoever runs first pays."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def synchronise(device):
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@pytest.fixture(scope="session")
def timed_reading(synchronise):
    """Seconds that a sum over all numbers of some tensors takes: to be measured between the rounds of a case, on its own
    tensors, as what memory gives changes with the pages they lie in and with the machine's other work."""

    def read(tensors):
        words = [x.detach().flatten().view(torch.int32).view(torch.float32) for x in tensors]
        synchronise()
        started = time.perf_counter()
        for x in words:
            x.sum()
        synchronise()
        return time.perf_counter() - started

    return read


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
