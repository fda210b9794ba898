"""The emulator would notice: each test breaks a copy of the CUDA sources and sees the C++ test fail."""

import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

import native_build
from tests.cpp import test_kernels
from tests.cpp.run import ROOT, run
from tests.cuda.emulated_module import EMULATED_OPTIONS

PLACES = [
    f"{device}-{schedule}"
    for device in ("cuda90", "cuda80")
    for schedule in ("forward", "backward", "random")
]
# What is run: one dtype is enough to show a broken kernel, and of the cases those of the broken source.
DTYPE = "float32"
CASES = {
    "pooling": ["means", "depth_weights", "views", "attention_pool"],
    "pooling_backward": ["spread_means", "views_backward", "attention_pool_backward"],
    "experts": ["experts"],
    "experts_backward": ["experts_backward"],
    "loss": ["loss"],
}


class Mutation(NamedTuple):
    """A text of a file in csrc/, and what stands there instead."""

    file: str
    text: str
    instead: str
    source: str = "pooling"  # that is compiled with it
    width: str = "33"  # of rows that show it
    beyond: bool = False  # a buffer's end, which AddressSanitizer sees


def without(file: str, text: str, **others) -> Mutation:
    return Mutation(file, text, "", **others)


def asked_before(file: str, barrier: str, source: str, width: str = "264") -> Mutation:
    """The next rows are asked for before the barrier that tells that those in their place have been read."""
    ask = "if constexpr (RING) ask(step + call.stages * TOKENS);\n"
    indent = " " * (len(barrier) - len(barrier.lstrip()))
    return Mutation(file, barrier + indent + ask, indent + ask + barrier, source, width)


MUTATIONS = {
    "no barrier in a block's sum": without("block.cuh", "        __syncthreads();\n", width="264"),
    "one buffer for two turns": Mutation("block.cuh", "parts[turn % 2]", "parts[0]", width="264"),
    "a warp too few in a block's sum": Mutation(
        "block.cuh", "if (other < warps)", "if (other + 1 < warps)", width="264"
    ),
    "a block's first sum taken for all": Mutation("block.cuh", "i * LANES", "0", width="264"),
    "a lane too few in a warp's sum": Mutation(
        "block.cuh",
        "distance = WARP / 2; distance; distance /= 2) x +=",
        "distance = WARP / 4; distance; distance /= 2) x +=",
    ),
    "no barrier between sums of rows": without(
        "pooling.cuh", "    __syncthreads();  // `parts` may still be read from the sum before\n"
    ),
    "a depth too many in the softmax": Mutation(
        "pooling.cuh", "logits[k] = k < call.depths ?", "logits[k] = k <= call.depths ?", beyond=True
    ),
    "no guard at a row's end, loading": Mutation(
        "vectors.cuh", "            if (inside(v)) {\n", "            if (true) {\n", beyond=True
    ),
    "no guard at a row's end, storing": Mutation(
        "vectors.cuh", "            if (inside(v)) cuda::store", "            cuda::store", beyond=True
    ),
    "no mask at a chunk's end": Mutation(
        "pooling.cuh", "token < chunk.count && (is_response", "(is_response", beyond=True
    ),
    "no mask at a chunk's end, backward": Mutation(
        "pooling_backward.cuh",
        "valid[t] = TOKENS == 1 || step + t < chunk.count;",
        "valid[t] = true;",
        source="pooling_backward",
        beyond=True,
    ),
    "prompt tokens in the response mean": Mutation(
        "pooling.cuh", "A sum = response[0] == to_responses ? h[0][c] : A(0);", "A sum = h[0][c];"
    ),
    "prompt tokens of a later token in the response mean": Mutation(
        "pooling.cuh", "sum += response[t] == to_responses ? h[t][c] : A(0);", "sum += h[t][c];"
    ),
    "a thread's first features of the gate only": Mutation(
        "pooling.cuh", "j += GATE_THREADS * W", "j += d", width="601"
    ),
    "a prompt token too many": Mutation(
        "pooling_backward.cuh",
        "if (first + t < piece.count && (K",
        "if ((K",
        source="pooling_backward",
        width="600",
    ),
    "a response's first token without a gradient": Mutation(
        "pooling_backward.cuh",
        "chunk.begin + step + t >= s.first()",
        "chunk.begin + step + t > s.first()",
        source="pooling_backward",
    ),
    "rows read before they arrive": without(
        "row_ring.cuh",
        "        while (!::cuda::ptx::mbarrier_try_wait_parity(arrivals_ + read_, phase_)) {\n        }\n",
        width="264",
    ),
    "a ring's second round taken for its first": without("row_ring.cuh", "phase_ ^= 1;", width="264"),
    "a row too few expected": Mutation("row_ring.cuh", "int count = 0;", "int count = -1;", width="264"),
    "a stage refilled while it is read": asked_before(
        "pooling.cuh", "                shared.logits.sum(logits, step / TOKENS);\n", "pooling"
    ),
    "a stage refilled while it is read, means": Mutation(
        "pooling.cuh",
        "            __syncthreads();\n            ask(step",
        "            ask(step",
        width="264",
    ),
    "a stage refilled while it is read, backward": asked_before(
        "pooling_backward.cuh",
        "            shared.dots.sum(dots, step / TOKENS);\n",
        "pooling_backward",
    ),
    "a stage refilled while it is read, backward, long rows": asked_before(
        "pooling_backward.cuh",
        "            shared.dots.sum(dots, step / TOKENS);\n",
        "pooling_backward",
        "4104",
    ),
    "no barrier before warps' shares are added": Mutation(
        "experts.cuh",
        "parts[warp][r][unit] = sums[0];\n    }\n    __syncthreads();\n",
        "parts[warp][r][unit] = sums[0];\n    }\n",
        source="experts",
        width="600",
    ),
    "units beyond a tile's end": Mutation(
        "experts.cuh",
        "if (tile.first + u < tile.units) out[",
        "out[",
        source="experts",
        width="16",
        beyond=True,
    ),
    "no barrier between steps of units": without(
        "experts_backward.cuh",
        "            __syncthreads();  // the step before may still be read\n#pragma unroll 4\n",
        source="experts_backward",
        width="16",
    ),
    "no barrier between steps of rows": without(
        "experts_backward.cuh",
        "            __syncthreads();  // the step before may still be read\n#pragma unroll 2\n",
        source="experts_backward",
        width="16",
    ),
    "rows beyond the batch": Mutation(
        "experts_backward.cuh",
        "u < count && r < rows",
        "u < count",
        source="experts_backward",
        width="16",
        beyond=True,
    ),
    "a pair too many": Mutation(
        "loss.cuh", "i < call.pairs;", "i <= call.pairs;", source="loss", beyond=True
    ),
}


@pytest.fixture(scope="module")
def objects():
    """Everything that the test program consists of, and the command that links it."""
    test_kernels.built()
    return sorted(test_kernels.FOLDER.rglob("*.o"))


def build(mutation, objects, folder):
    """The test program with a mutation; its source serves one dtype."""
    sources = shutil.copytree(ROOT / "csrc", folder / "csrc")
    original = (sources / mutation.file).read_text()
    assert original.count(mutation.text) == 1, f"{mutation.file} does not hold this once: {mutation.text!r}"
    (sources / mutation.file).write_text(original.replace(mutation.text, mutation.instead))
    dispatch = (sources / "launch.cuh").read_text()
    (sources / "launch.cuh").write_text(re.sub(r"body\((double|bf16|fp16)\{\}\)", "body(float{})", dispatch))
    compiler = native_build.find_compiler()
    sanitizer = ["-fsanitize=address"] if mutation.beyond else []  # twice the time
    flags = ["-std=c++20", "-O0", *sanitizer, *EMULATED_OPTIONS, f"-I{sources}"]
    mutant = folder / "mutant.o"
    source = sources / f"{mutation.source}.cu"
    subprocess.run([*compiler, *flags, "-c", source, "-o", mutant], check=True)
    others = [x for x in objects if x.name != f"{source.name}.o"]
    assert len(others) == len(objects) - 1
    options = ["-fsanitize=address", "-fopenmp", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run([*compiler, *options, mutant, *others, "-o", folder / "mutant"], check=True)
    return folder / "mutant"


def is_noticed(mutation, program):
    """By any schedule."""
    chosen = ["--stop", DTYPE, *CASES[mutation.source]]
    return any(run(program, [*chosen, place], [mutation.width]).returncode for place in PLACES)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, objects, tmp_path):
    assert is_noticed(MUTATIONS[name], build(MUTATIONS[name], objects, tmp_path)), "it went unnoticed"


@pytest.mark.parametrize("source", CASES)
def test_built_so_an_unbroken_kernel_passes(source, objects, tmp_path):
    mutation = Mutation(f"{source}.cu", "namespace adajudge::cuda {", "namespace adajudge::cuda {", source)
    assert not is_noticed(mutation, build(mutation, objects, tmp_path))
