"""The compiled module with its CUDA kernels emulated on the CPU: ``python tests/cuda/emulated_module.py`` builds it and prints
where it is. With ``ADAJUDGE_TEST_MODULE`` naming it, tests run on it (tests/conftest.py) and backend `cuda` serves CPU tensors.
"""

import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import native_build  # noqa: E402

EMULATION = ROOT / "tests/cuda/emulation"
# Of a CUDA source that is compiled as C++.
EMULATED_OPTIONS = [
    *("-x", "c++", f"-I{EMULATION}", "-Wno-unknown-pragmas"),
    # gcc 12 loses track of arrays that an unrolled loop fills.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    "-D__CUDA_ARCH_LIST__=800,900",  # nvcc's, of what it compiles for
]


def emulated_objects(ninja: native_build.Ninja) -> list[Path]:
    """The CUDA kernels and their launches as C++ for the CPU."""
    return [
        ninja.object("cxx", EMULATION / "emulation.cpp"),
        *(ninja.object("cxx", source, EMULATED_OPTIONS) for source in sorted(ROOT.glob("csrc/*.cu"))),
    ]


def build(folder: Path) -> Path:
    """The module, its objects in `folder`. It has no CPU kernels."""
    import pybind11

    compiler = native_build.find_compiler() or native_build.stop("there is no C++ compiler")
    ninja = native_build.Ninja(folder)
    native_build.cxx_rule(ninja, compiler)
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    options = ["-O1", '-DADAJUDGE_WITH_CUDA=""', "-DADAJUDGE_EMULATED", *includes]
    objects = [ninja.object("cxx", ROOT / "csrc/bindings.cpp", options), *emulated_objects(ninja)]
    ninja.rule("link", [*compiler, "-shared", "-Wl,-z,now", "$in", "-o", "$out"], depfile=False)
    module = ninja.step("link", folder.resolve() / "_native.so", objects)
    ninja.run()
    return module


if __name__ == "__main__":
    print(build(ROOT / "build/emulated"))
