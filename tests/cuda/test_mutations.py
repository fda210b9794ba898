"""The emulator would notice: each test breaks a copy of the CUDA sources and sees the C++ test fail."""

import shutil
import subprocess

import pytest

import native_build
from tests.cpp import test_kernels
from tests.cpp.run import ROOT, run
from tests.cuda.emulated_module import EMULATION

SCHEDULES = ("forward", "backward", "random")

# What is broken: file, text, what stands there instead; the sources that include it; widths that show it.
MUTATIONS = {
    "no barrier in a block's sum": ("block.cuh", "        __syncthreads();\n", "", "pooling", "264"),
    "one buffer for two turns": ("block.cuh", "parts[turn % 2]", "parts[0]", "pooling", "264"),
    "no barrier between sums of rows": (
        "pooling.cuh",
        "    __syncthreads();  // `parts` may still be read from the sum before\n",
        "",
        "pooling",
        "33",
    ),
    "no barrier before the softmax of depths": (
        "pooling.cuh",
        "    }\n    __syncthreads();\n    A top = logits[0]",
        "    }\n    A top = logits[0]",
        "pooling",
        "33",
    ),
    "no guard at a row's end, loading": (
        "vectors.cuh",
        "            if (inside(v)) {\n",
        "            if (true) {\n",
        "pooling",
        "33",
    ),
    "no guard at a row's end, storing": (
        "vectors.cuh",
        "            if (inside(v)) cuda::store",
        "            cuda::store",
        "pooling",
        "33",
    ),
    "no mask at a chunk's end": (
        "pooling.cuh",
        "return token < chunk.count && (is_response(token)",
        "return (is_response(token)",
        "pooling",
        "33",
    ),
    "no mask at a chunk's end, backward": (
        "pooling_backward.cuh",
        "valid[t] = step + t < chunk.count;",
        "valid[t] = true;",
        "pooling_backward",
        "33",
    ),
    "prompt tokens in the response mean": (
        "pooling.cuh",
        "response_sum += response[t] ? h[t][c] : A(0);",
        "response_sum += h[t][c];",
        "pooling",
        "33",
    ),
    "a response's first token without a gradient": (
        "pooling_backward.cuh",
        "chunk.begin + step + t >= s.first()",
        "chunk.begin + step + t > s.first()",
        "pooling_backward",
        "33",
    ),
    "a lane too few in a warp's sum": (
        "block.cuh",
        "distance = WARP / 2; distance; distance /= 2) x +=",
        "distance = WARP / 4; distance; distance /= 2) x +=",
        "pooling",
        "33",
    ),
    "rows read before they arrive": (
        "row_ring.cuh",
        "        while (!::cuda::ptx::mbarrier_try_wait_parity(arrivals_ + read_, phase_)) {\n        }\n",
        "",
        "pooling",
        "264",
    ),
    "a ring's second round taken for its first": ("row_ring.cuh", "phase_ ^= 1;", "", "pooling", "264"),
    "a row too few expected": ("row_ring.cuh", "int count = 0;", "int count = -1;", "pooling", "264"),
    "a stage refilled while it is read": (
        "pooling.cuh",
        "                shared.logits.sum(logits, step / TOKENS);\n"
        "                if constexpr (RING) ask(step + call.stages * TOKENS);\n",
        "                if constexpr (RING) ask(step + call.stages * TOKENS);\n"
        "                shared.logits.sum(logits, step / TOKENS);\n",
        "pooling",
        "264",
    ),
    "a stage refilled while it is read, means": (
        "pooling.cuh",
        "            __syncthreads();\n            ask(step",
        "            ask(step",
        "pooling",
        "264",
    ),
    "a stage refilled while it is read, backward": (
        "pooling_backward.cuh",
        "            shared.dots.sum(dots, step / TOKENS);\n"
        "            if constexpr (RING) ask(step + call.stages * TOKENS);\n",
        "            if constexpr (RING) ask(step + call.stages * TOKENS);\n"
        "            shared.dots.sum(dots, step / TOKENS);\n",
        "pooling_backward",
        "264",
    ),
}


@pytest.fixture(scope="module")
def objects():
    """Everything that the test program consists of, and the command that links it."""
    test_kernels.built()
    return sorted(test_kernels.FOLDER.rglob("*.o"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, objects, tmp_path):
    file, text, instead, broken, width = MUTATIONS[name]
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    original = (sources / file).read_text()
    assert original.count(text) == 1, f"{file} does not hold this once: {text!r}"
    (sources / file).write_text(original.replace(text, instead))
    compiler = native_build.find_compiler()
    flags = [
        "-std=c++20",
        "-O0",
        "-fsanitize=address",
        "-Wno-unknown-pragmas",
        f"-I{sources}",
        f"-I{EMULATION}",
        "-D__CUDA_ARCH_LIST__=800,900",
    ]
    mutant = tmp_path / "mutant.o"
    source = ["-x", "c++", "-c", sources / f"{broken}.cu", "-o", mutant]
    subprocess.run([*compiler, *flags, *source], check=True)
    others = [x for x in objects if x.name != f"{broken}.cu.o"]
    assert len(others) == len(objects) - 1
    program = tmp_path / "mutant"
    options = ["-fsanitize=address", "-fopenmp", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([*compiler, *options, mutant, *others, "-o", program], check=True)
    places = (f"{device}-{schedule}" for device in ("cuda90", "cuda80") for schedule in SCHEDULES)
    assert any(run(program, ["--stop", place], [width]).returncode for place in places), "it went unnoticed"
