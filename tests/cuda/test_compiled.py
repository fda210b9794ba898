"""What nvcc made of the CUDA kernels, from the build's own report: registers and spills for every architecture, and how they
load. Without nvcc nothing was compiled, and there is nothing to look at."""

import re
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from adajudge_kernels import compiled
from tests.summary import note_compilation

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
SOURCES = sorted(ROOT.glob("csrc/*.cu"))

if compiled.module is None or not compiled.module.with_cuda or compiled.module.emulated:
    pytest.skip("the compiled module holds no CUDA kernels", allow_module_level=True)


class Kernel(NamedTuple):
    """One kernel for one architecture, as ptxas describes it."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int


@cache
def kernels():
    found = []
    for source in SOURCES:
        log = BUILD / f"csrc/{source.name}.o.log"
        assert log.stat().st_mtime >= source.stat().st_mtime, (
            "the report is older than the source: make setup"
        )
        report = re.findall(
            r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n"
            r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
            log.read_text(),
        )
        found += [
            Kernel(name, arch, int(r), int(frame), int(a) + int(b)) for name, arch, frame, a, b, r in report
        ]
    return found


@cache
def sass():
    """The machine code of the module for sm_90, by kernel."""
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", "sm_90", compiled.module.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = text.split("Function : ")[1:]
    return {function.split("\n", 1)[0].strip(): function for function in functions}


def named(names, kernel):
    """Of mangled names, those of a kernel: ``scan`` but not ``scan_backward``."""
    return [name for name in names if re.search(rf"cuda{len(kernel)}{kernel}[IE]", name)]


def test_no_kernel_spills_a_register():
    assert kernels(), "the report of the build names no kernel"
    for kernel in kernels():
        assert kernel.spilled == kernel.stack == 0, kernel
        note_compilation(f"cuda {kernel.arch}", kernel.name, kernel.registers)


def test_every_architecture_has_every_kernel():
    by_arch = {}
    for kernel in kernels():
        by_arch.setdefault(kernel.arch, set()).add(kernel.name)
    assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(by_arch)
    assert len({frozenset(names) for names in by_arch.values()}) == 1


def test_module_holds_the_architectures_and_stays_small():
    triton = pytest.importorskip("triton")
    dump = triton.knobs.nvidia.cuobjdump.path
    module = Path(compiled.module.__file__)
    for option, expected in (
        ("--list-elf", {"sm_80", "sm_90", "sm_100", "sm_120"}),
        ("--list-ptx", {"sm_120"}),
    ):
        text = subprocess.run([dump, option, module], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"sm_\d+", text)) == expected
    assert module.stat().st_size < 20e6


@pytest.mark.parametrize(
    "kernel", ["scan", "scan_backward", "dots", "spread_means", "spread_attention", "zero_padding"]
)
def test_pooling_moves_sixteen_bytes_at_a_time(kernel):
    """Every variant for whole sixteen bytes (8 numbers of two bytes, 4 of four); those for odd widths cannot."""
    fast = [
        name
        for name in named(sass(), kernel)
        if re.search(rf"{kernel}I(6__half|13__nv_bfloat16|f)Li[48]E", name)
    ]
    assert len(fast) >= 3
    for name in fast:
        if kernel in ("scan", "scan_backward", "dots"):
            assert "LDG.E.128" in sass()[name], name
        if kernel not in ("scan", "dots"):
            assert "STG.E.128" in sass()[name], name
