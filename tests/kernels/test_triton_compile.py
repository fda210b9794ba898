"""Every Triton kernel that the operations launch compiles for every architecture, without spills."""

import math
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
    PASSES,
    SHARED_MEMORY,
    TRITON_VERSION,
    attention_launches,
    compile_launch,
    experts_launches,
    experts_table,
    instructions_table,
    loss_launches,
    loss_table,
    pass_over_states,
    pooling_launches,
    pooling_table,
    refinement_table,
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
EXPERTS = [(4096, 256, 256), (1024, 64, 64), (100, 30, 30), (16384, 256, 256)]  # d, h, h_r
DTYPES = [  # of views and weights
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]
DOCUMENTS = Path(__file__).parents[2] / "docs"
architectures = pytest.mark.parametrize("arch", NVIDIA)


def compile_within_limits(launch, arch):
    """The compilation, which spills nothing, needs no more shared memory than there is and divides as IEEE does."""
    compiled = compile_launch(launch, NVIDIA[arch])
    where = f"{launch.name} sm_{arch} {dict(launch.constants)} {launch.signature}"
    assert compiled.stack == 0, f"{where}: {compiled.stack} bytes spilled, {compiled.registers} registers"
    assert compiled.shared <= SHARED_MEMORY[arch], where
    assert "div.full" not in compiled.assembly, f"{where}: a division that is not rounded to nearest"
    assert "enable_fp_fusion" in dict(launch.options), f"{where}: left to triton's default, which changes"
    note_compilation(f"sm_{arch}", where, compiled.registers)
    return compiled


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"d{row[0]}-K{row[1]}-{str(row[2])[6:]}")
@architectures
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(row, arch):
    for launch in pooling_launches(*row):
        compiled = compile_within_limits(launch, arch)
        if launch.name in ("scan", "scan_backward"):
            assert compiled.sixteen_byte_loads >= dict(launch.constants)["K"], launch


@pytest.mark.parametrize("operation", PASSES)
@pytest.mark.parametrize("d", [1024, 2560, 4096])
def test_passes_over_states_leave_an_h200_to_its_memory(d, operation):
    """Their instructions take less time to issue than their bytes to move, and threads seldom wait for one another."""
    compiled, share = pass_over_states(d, operation)
    assert share < 0.8
    barriers = sum(name.startswith("BAR") for name in compiled.loop)
    assert barriers <= (7 if operation == "multi_view_pool" else 3)  # four at a sequence's last token alone


@pytest.mark.parametrize("size", EXPERTS, ids=lambda size: f"d{size[0]}-h{size[1]}")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x)[6:] for x in dtypes))
@architectures
def test_experts_compile_without_spills_and_read_weights_sixteen_bytes_at_once(size, dtypes, arch):
    for launch in experts_launches(*size, *dtypes):
        compiled = compile_within_limits(launch, arch)
        if launch.name == "hidden_parts" and size[0] >= 1024:
            tile = math.prod(dict(launch.constants)[name] for name in ("UNITS", "PIECES", "WIDTH"))
            loads = tile * dtypes[1].itemsize // 16 // (32 * dict(launch.options)["num_warps"])
            assert compiled.sixteen_byte_loads >= 2 * loads  # of the view MLPs' weights, or of the router's
        if launch.name == "view_gradients" and size[0] % 8 == 0:
            assert compiled.sixteen_byte_loads >= 2


def test_the_number_of_rows_compiles_nothing_anew():
    """And chooses no other arithmetic: a row's bits must not depend on it."""
    few, many = (experts_launches(100, 30, 30, *DTYPES[0], rows=rows) for rows in (1, 400))
    assert few == many


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(x)[6:] for x in dtypes))
@architectures
def test_the_loss_compiles_without_spills(dtypes, arch):
    for launch in loss_launches(*dtypes):
        compile_within_limits(launch, arch)


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
@architectures
def test_attention_compiles_without_spills_onto_tensor_cores(attention, arch):
    head_size, dtype = attention[:2]
    launches = attention_launches(*attention)
    assert len(launches) == 3
    for launch in launches:
        compiled = compile_within_limits(launch, arch)
        assert head_size < 64 or compiled.sixteen_byte_loads >= 2, launch
        assert (compiled.tensor_core_products > 0) == (dtype != torch.float32), launch


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@architectures
def test_a_mask_changes_no_rounding_of_attention(attention, arch):
    """Whether a step has a mask depends on the tile that a query is in, so on layout and batch. Its bits must not."""
    forward = attention_launches(*attention)[0]
    assert forward.name == "attention_forward"
    constants, threads = dict(forward.constants), 32 * dict(forward.options)["num_warps"]
    scores = constants["M"] * constants["N"] // threads  # a thread and step
    assert compile_launch(forward, NVIDIA[arch]).fused_exponents >= 2 * scores  # with a mask and without


@pytest.mark.parametrize("d", [64, 1000, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@architectures
def test_norm_and_swiglu_compile_without_spills(d, dtype, arch):
    for launch in row_launches(d, dtype):
        compiled = compile_within_limits(launch, arch)
        assert d < 4096 or compiled.sixteen_byte_loads >= 1, launch


@pytest.mark.parametrize("target", AMD.values(), ids=AMD)
def test_kernels_compile_for_amd(target):
    experts = experts_launches(*EXPERTS[0], *DTYPES[0])
    refinement = [*attention_launches(*ATTENTIONS[2]), *row_launches(4096, torch.bfloat16)]
    for launch in (*pooling_launches(*EVERYWHERE), *refinement, *experts, *loss_launches()):
        assert compile_launch(launch, target).assembly, launch.name
        note_compilation(target.arch, f"{launch.name} {launch.constants}", 0)


TABLES = {
    "triton-pooling.md": [pooling_table, instructions_table],
    "head.md": [refinement_table],
    "triton-experts.md": [
        lambda: experts_table(torch.float32),
        lambda: experts_table(torch.bfloat16),
        loss_table,
    ],
}


@pytest.mark.parametrize("document", TABLES)
def test_the_documented_resources_are_what_the_compiler_says(document):
    text = (DOCUMENTS / document).read_text(encoding="utf-8")
    if f"triton {TRITON_VERSION}" not in text:
        pytest.skip("the document is of another version of triton")
    for table in TABLES[document]:
        assert table() in text
