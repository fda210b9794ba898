"""A build in place: what is compiled again, and what a module of CUDA and C++ sources holds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = """
#include <cuda_runtime.h>
namespace tiny { __global__ void twice(float* x) { x[threadIdx.x] *= 2; } }
extern "C" int launch(float* x) { tiny::twice<<<1, 32>>>(x); return int(cudaGetLastError()); }
"""


def compiled(output):
    return {Path(name).name for name in re.findall(r"-c (\S+)", output)}


def test_only_what_changed_is_compiled_again(tree):
    first = tree.build()
    assert first.returncode == 0, first.stdout
    assert compiled(first.stdout) == {"bindings.cpp", "levels.cpp", "kernel.cpp"}
    assert tree.call() == 42
    assert compiled(tree.build().stdout) == set()

    (tree.root / "csrc" / "cpu" / "levels.cpp").write_text(
        '#include "../tiny.h"\nint answer() { return 43; }\n'
    )
    assert compiled(tree.build().stdout) == {"levels.cpp"}
    assert tree.call() == 43

    (tree.root / "csrc" / "tiny.h").write_text("int answer();  // said again\n")
    assert compiled(tree.build().stdout) == {"bindings.cpp", "levels.cpp", "kernel.cpp"}


def test_building_forgets_that_an_earlier_installation_did_not(tree):
    reason = tree.root / "adajudge_kernels" / "_native_missing.txt"
    reason.write_text("an earlier installation")
    assert tree.build().returncode == 0
    assert not reason.exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: nothing compiles CUDA here")
def test_cuda_sources_are_compiled_for_the_architectures_and_hold_their_runtime(tree):
    """Needs no GPU: the launch finds the runtime inside the module, and the runtime finds no device or no driver."""
    (tree.root / "csrc" / "tiny.cu").write_text(CUDA)
    result = tree.build(TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", ADAJUDGE_BUILD_CUDA="1")
    assert result.returncode == 0, result.stdout
    assert tree.call() != 0
    (module,) = (tree.root / "adajudge_kernels").glob("_native*.so")
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed
    listing = subprocess.run(
        [cuobjdump(), "-lelf", "-lptx", module], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"\.(sm_\d+)\.cubin", listing)) == {"sm_80", "sm_90"}
    assert set(re.findall(r"\.(sm_\d+)\.ptx", listing)) == {"sm_90"}


def cuobjdump():
    import triton

    return triton.knobs.nvidia.cuobjdump.path


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: nothing compiles CUDA here")
def test_cuda_can_be_forbidden(tree):
    (tree.root / "csrc" / "tiny.cu").write_text(CUDA)
    result = tree.build(ADAJUDGE_BUILD_CUDA="0")
    assert result.returncode == 0
    assert compiled(result.stdout) == {"bindings.cpp", "levels.cpp", "kernel.cpp"}
