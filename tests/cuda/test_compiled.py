"""What nvcc made of the CUDA kernels, from the build's own report: registers and spills for every architecture, and how they
load. Without nvcc nothing was compiled, and there is nothing to look at."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import native_build
from adajudge_kernels import compiled
from tests import machine_code
from tests.cuda.compile_report import (
    ARCHITECTURES,
    ROOT,
    kernels,
    others_table,
    rings_table,
    sass,
    scans_table,
)
from tests.summary import note_compilation

if compiled.module is None or not compiled.module.with_cuda or compiled.module.emulated:
    pytest.skip("the compiled module holds no CUDA kernels", allow_module_level=True)
reads_machine_code = pytest.mark.skipif(
    find_spec("triton") is None, reason="it is read with triton's cuobjdump"
)


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
    assert set(ARCHITECTURES) <= set(by_arch)
    assert len({frozenset(names) for names in by_arch.values()}) == 1


@reads_machine_code
def test_module_holds_the_architectures_and_stays_small():
    module = Path(compiled.module.__file__)
    for option, expected in (
        ("--list-elf", set(ARCHITECTURES)),
        ("--list-ptx", {"sm_120"}),
    ):
        assert set(re.findall(r"sm_\d+", machine_code.dump(module, option))) == expected
    assert module.stat().st_size < 20e6


@reads_machine_code
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


def loads_under_way(code):
    """Of sixteen bytes, at most, before an instruction waits for one of them."""
    waiting, most = set(), 0
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code):
        if waiting & set(re.findall(r"\bR\d+\b", instruction)):
            waiting.clear()
        if load := re.match(r"(?:@!?U?P\w+ )?LDG?\.E\S*\.128\S* R(\d+)", instruction):
            waiting |= {f"R{int(load[1]) + i}" for i in range(4)}
        most = max(most, len(waiting) // 4)
    return most


@reads_machine_code
@pytest.mark.parametrize(
    ("kernel", "variant", "loads"),
    [
        ("scan", "13__nv_bfloat16Li8ELi8ELi3E", 12),  # four tokens of three states
        ("scan", "13__nv_bfloat16Li8ELi8ELi1ELNS0_4PassE1E", 4),  # of one, in `attention_pool`
        ("dots", "13__nv_bfloat16Li8E", 8),  # the states of a token
        ("combine", "fLi4E", 4),
        ("add_rows", "fLi4E", 4),
        ("form_shares", "13__nv_bfloat16Li8E", 16),  # two of each of eight units
        ("form_shares", "fLi4E", 32),
    ],
)
def test_loads_do_not_wait_for_one_another(kernel, variant, loads):
    """A branch around a load and its first use, which costs no instruction in the source, would make the next one wait."""
    (name,) = (name for name in named(sass(), kernel) if f"{kernel}I{variant}" in name)
    assert loads_under_way(sass()[name]) >= loads


@reads_machine_code
@pytest.mark.parametrize("kernel", ["ring_scan", "ring_scan_backward"])
def test_rings_are_filled_by_the_copy_engine(kernel):
    """A bulk copy for each of a step's rows, and sixteen bytes at a time from shared memory."""
    found = named(sass(), kernel)
    assert len(found) >= 12
    for name in found:
        assert "UBLKCP" in sass()[name], name
        assert "LDS.128" in sass()[name], name


@reads_machine_code
def test_the_document_says_what_the_compiler_says():
    nvcc, _ = native_build.find_nvcc()
    if nvcc is None or "release 13.0" not in native_build.output_of([nvcc, "--version"]):
        pytest.skip("the document's table is of nvcc 13.0")
    text = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    for table in (scans_table(), rings_table(), others_table()):
        assert table in text, table
