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
    attention_launches,
    compile_launch,
    pooling_launches,
    resource_table,
    row_launches,
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


# Head size, dtype, heads of keys (of 8), which queries, causal.
ATTENTIONS = [
    (64, torch.bfloat16, 8, "all", True),
    (64, torch.bfloat16, 2, "response", True),
    (128, torch.bfloat16, 8, "all", True),
    (128, torch.float16, 8, "all", False),
    (128, torch.bfloat16, 4, "response", True),
    (80, torch.bfloat16, 1, "all", True),
    (256, torch.bfloat16, 8, "all", True),
    (256, torch.bfloat16, 2, "response", True),
    (16, torch.bfloat16, 8, "all", True),
    (64, torch.float32, 2, "all", True),
    (128, torch.float32, 8, "response", True),
    (256, torch.float32, 4, "all", True),
]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize("arch", NVIDIA)
def test_attention_compiles_without_spills_onto_tensor_cores(attention, arch):
    head_size, dtype = attention[:2]
    launches = attention_launches(*attention)
    assert len(launches) == 3
    for launch in launches:
        compiled = compile_launch(launch, NVIDIA[arch])
        where = f"{launch.name} sm_{arch} {attention}"
        assert compiled.stack == 0, f"{where}: {compiled.stack} bytes spilled, {compiled.registers} registers"
        assert compiled.shared <= SHARED_MEMORY[arch], where
        assert head_size < 64 or compiled.sixteen_byte_loads + compiled.sixteen_byte_copies >= 2, where
        assert (compiled.tensor_core_products > 0) == (dtype != torch.float32), where
        note_compilation(f"sm_{arch}", where, compiled.registers)


@pytest.mark.parametrize("d", [64, 1000, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", NVIDIA)
def test_norm_and_swiglu_compile_without_spills(d, dtype, arch):
    for launch in row_launches(d, dtype):
        compiled = compile_launch(launch, NVIDIA[arch])
        where = f"{launch.name} sm_{arch} d={d} {dtype}"
        assert compiled.stack == 0, f"{where}: {compiled.stack} bytes spilled, {compiled.registers} registers"
        assert compiled.shared <= SHARED_MEMORY[arch], where
        assert d < 4096 or compiled.sixteen_byte_loads >= 1, where
        note_compilation(f"sm_{arch}", where, compiled.registers)


@pytest.mark.parametrize("target", AMD.values(), ids=AMD)
def test_refinement_compiles_for_amd(target):
    for launch in [*attention_launches(*ATTENTIONS[2]), *row_launches(4096, torch.bfloat16)]:
        assert compile_launch(launch, target).assembly, launch.name
        note_compilation(target.arch, f"{launch.name} {launch.constants}", 0)


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
