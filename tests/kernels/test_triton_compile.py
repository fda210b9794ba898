"""Every Triton kernel that the operations launch compiles for every architecture, without spills."""

import math
import os
from collections import Counter
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

USUAL = (4096, 3, torch.bfloat16)
WIDE, MANY_STATES = (4096, 4, torch.float32), (1536, 8, torch.bfloat16)  # with little room in registers
# Every entry of the table of steps at its narrowest and widest, K from 1 to 8, both widths of a number.
ROWS = [
    USUAL,
    (64, 1, torch.float32),
    (256, 8, torch.bfloat16),
    (768, 4, torch.bfloat16),
    (1024, 2, torch.float32),
    MANY_STATES,
    (2560, 3, torch.bfloat16),
    WIDE,
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


def everywhere(names, cases, usual):
    """Cases of a test for every architecture. In each run: all for sm_90, on which the limits are asked, and for the others
    the `usual` ones and those with the least room; the rest in ``make test-triton``."""
    found = []
    for case in cases:
        text = "-".join(str(x).removeprefix("torch.") for x in case)
        for arch in NVIDIA:
            marks = () if arch == 90 or case in usual else pytest.mark.exhaustive
            found.append(pytest.param(*case, arch, marks=marks, id=f"{text}-sm_{arch}"))
    return pytest.mark.parametrize((*names, "arch"), found)


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


@everywhere(("d", "depths", "dtype"), ROWS, [USUAL, WIDE, MANY_STATES])
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(d, depths, dtype, arch):
    for launch in pooling_launches(d, depths, dtype):
        compiled = compile_within_limits(launch, arch)
        if launch.name in ("scan", "scan_backward"):
            assert compiled.sixteen_byte_loads >= dict(launch.constants)["K"], launch


@pytest.mark.parametrize("operation", PASSES)
@pytest.mark.parametrize("d", [1024, 2560, 4096])
def test_passes_over_states_leave_an_h200_to_its_memory(d, operation):
    """Their instructions take less time to issue than their bytes to move, and threads seldom wait for one another."""
    compiled, share = pass_over_states(d, operation)
    assert share < 0.8
    allowed = 7 if operation == "multi_view_pool" else 3  # four of them at a sequence's last token alone
    assert compiled.loop.count("BAR") <= allowed


@everywhere(
    ("d", "h", "h_r", "dtype", "weight_dtype"),
    [(*EXPERTS[0], *dtypes) for dtypes in DTYPES]
    + [(*size, *dtypes) for size in EXPERTS[1:] for dtypes in DTYPES[1:3]],
    [(*EXPERTS[0], *dtypes) for dtypes in DTYPES[:2]],
)
def test_experts_compile_without_spills_and_read_weights_sixteen_bytes_at_once(
    d, h, h_r, dtype, weight_dtype, arch
):
    for launch in experts_launches(d, h, h_r, dtype, weight_dtype):
        compiled = compile_within_limits(launch, arch)
        if launch.name == "hidden_parts" and d >= 1024:
            tile = math.prod(dict(launch.constants)[name] for name in ("UNITS", "PIECES", "WIDTH"))
            loads = tile * weight_dtype.itemsize // 16 // (32 * dict(launch.options)["num_warps"])
            assert compiled.sixteen_byte_loads >= 2 * loads  # of the view MLPs' weights, or of the router's
        if launch.name == "view_gradients" and d % 8 == 0:
            assert compiled.sixteen_byte_loads >= 2


def test_the_number_of_rows_compiles_nothing_anew():
    """And chooses no other arithmetic: a row's bits must not depend on it."""
    few, many = (experts_launches(100, 30, 30, *DTYPES[0], rows=rows) for rows in (1, 400))
    assert few == many


@everywhere(("dtype", "others"), DTYPES, DTYPES)
def test_the_loss_compiles_without_spills(dtype, others, arch):
    for launch in loss_launches(dtype, others):
        compile_within_limits(launch, arch)


# Head size, dtype, heads of keys (of 8), which queries, causal.
ATTENTION_NAMES = ("head_size", "dtype", "key_heads", "queries", "causal")
USUAL_ATTENTION = (128, torch.bfloat16, 8, "all", True)
TIGHT_ATTENTIONS = [  # in registers
    (64, torch.bfloat16, 2, "response", True),
    (80, torch.bfloat16, 1, "all", True),
    (128, torch.float32, 8, "response", True),
]
ATTENTIONS = [
    USUAL_ATTENTION,
    *TIGHT_ATTENTIONS,
    (128, torch.float16, 8, "all", False),
    (128, torch.bfloat16, 4, "response", True),
    (256, torch.bfloat16, 2, "response", True),
    (16, torch.bfloat16, 8, "all", True),
    (64, torch.float32, 2, "all", True),
    (256, torch.float32, 4, "all", True),
]


@everywhere(ATTENTION_NAMES, ATTENTIONS, [USUAL_ATTENTION, *TIGHT_ATTENTIONS])
def test_attention_compiles_without_spills_onto_tensor_cores(
    head_size, dtype, key_heads, queries, causal, arch
):
    launches = attention_launches(head_size, dtype, key_heads, queries, causal)
    assert len(launches) == 3
    for launch in launches:
        compiled = compile_within_limits(launch, arch)
        assert head_size < 64 or compiled.sixteen_byte_loads >= 2, launch
        assert (compiled.tensor_core_products > 0) == (dtype != torch.float32), launch


@everywhere(ATTENTION_NAMES, ATTENTIONS, [USUAL_ATTENTION, *TIGHT_ATTENTIONS])
def test_a_mask_changes_no_rounding_of_attention(head_size, dtype, key_heads, queries, causal, arch):
    """Whether a step has a mask depends on the tile that a query is in, so on layout and batch. Its bits must not."""
    forward = attention_launches(head_size, dtype, key_heads, queries, causal)[0]
    assert forward.name == "attention_forward"
    constants, threads = dict(forward.constants), 32 * dict(forward.options)["num_warps"]
    scores = constants["M"] * constants["N"] // threads  # a thread and step
    compiled = compile_launch(forward, NVIDIA[arch])
    assert compiled.fused_exponents >= 2 * scores  # with a mask and without
    if arch != 100:  # whose compiler unrolls the loops
        without, with_mask = (Counter(loop) for loop in compiled.loops if loop.count("MUFU") > 1)
        assert all(without[name] == with_mask[name] for name in ("FFMA", "FADD", "HMMA", "HGMMA"))


@everywhere(
    ("d", "dtype"),
    [(d, dtype) for d in (64, 1000, 4096, 16384) for dtype in (torch.bfloat16, torch.float32)],
    [(4096, torch.bfloat16), (16384, torch.float32)],
)
def test_norm_and_swiglu_compile_without_spills(d, dtype, arch):
    for launch in row_launches(d, dtype):
        compiled = compile_within_limits(launch, arch)
        assert d < 4096 or compiled.sixteen_byte_loads >= 1, launch


@pytest.mark.parametrize("target", AMD.values(), ids=AMD)
def test_kernels_compile_for_amd(target):
    experts = experts_launches(*EXPERTS[0], *DTYPES[0])
    refinement = [*attention_launches(*USUAL_ATTENTION), *row_launches(4096, torch.bfloat16)]
    for launch in (*pooling_launches(*USUAL), *refinement, *experts, *loss_launches()):
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
