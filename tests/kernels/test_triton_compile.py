"""Every Triton kernel that the pooling operations launch compiles for every architecture, without spills."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tests.kernels.triton_compile import (
    AMD,
    NVIDIA,
    SHARED_MEMORY,
    TRITON_VERSION,
    compile_launch,
    pooling_launches,
    resource_table,
)
from tests.summary import note_compilation

EVERYWHERE = (4096, 3, torch.bfloat16)
# Every entry of the table of steps at its narrowest and widest, K from 1 to 8, both widths of a number.
ROWS = [
    EVERYWHERE,
    (64, 1, torch.float32),
    (256, 8, torch.bfloat16),
    (768, 4, torch.bfloat16),
    (1024, 2, torch.float32),
    (1536, 8, torch.bfloat16),
    (2560, 3, torch.bfloat16),
    (4096, 4, torch.float32),
    (4096, 8, torch.bfloat16),
    (8192, 3, torch.bfloat16),
    (16384, 8, torch.bfloat16),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "triton-pooling.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row[0]}-K{row[1]}-{str(row[2])[6:]}")
@pytest.mark.parametrize("arch", NVIDIA)
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(row, arch):
    for launch in pooling_launches(*row):
        compiled = compile_launch(launch, NVIDIA[arch])
        where = f"{launch.name} sm_{arch} {dict(launch.constants)}"
        assert compiled.stack == 0, f"{where}: {compiled.stack} bytes spilled, {compiled.registers} registers"
        assert compiled.shared <= SHARED_MEMORY[arch], where
        if launch.name in ("scan", "scan_backward"):
            assert compiled.sixteen_byte_loads >= dict(launch.constants)["K"], where
        note_compilation(f"sm_{arch}", where, compiled.registers)


@pytest.mark.parametrize("target", AMD.values(), ids=AMD)
def test_kernels_compile_for_amd(target):
    for launch in pooling_launches(*EVERYWHERE):
        assert compile_launch(launch, target).assembly, launch.name
        note_compilation(target.arch, f"{launch.name} {launch.constants}", 0)


def test_the_documented_resources_are_what_the_compiler_says():
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"triton {TRITON_VERSION}" not in text:
        pytest.skip("the document is of another version of triton")
    assert resource_table(*EVERYWHERE) in text
