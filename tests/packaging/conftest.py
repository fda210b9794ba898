"""A source tree to build in, with kernels that compile in no time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Two sources as csrc/ has them: one knows Python, the other is compiled for every instruction set.
BINDINGS = """
#include <Python.h>
#include "tiny.h"
#ifdef ADAJUDGE_WITH_CUDA
extern "C" int launch(float*);
static PyObject* call(PyObject*, PyObject*) { return PyLong_FromLong(launch(nullptr)); }
#else
static PyObject* call(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
#endif
static PyMethodDef methods[] = {{"call", call, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, {}, {}, {}, {}};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
"""
LEVELS = '#include "../tiny.h"\nint answer() { return 42; }\n'
KERNEL = '#include "../tiny.h"\nnamespace ADAJUDGE_LEVEL { int one() { return 1; } }\n'


class Tree:
    """A copy of the package whose csrc/ is tiny, and what is run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("pyproject.toml", "setup.py", "native_build.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, root)
        shutil.copytree(
            ROOT / "adajudge_kernels",
            root / "adajudge_kernels",
            ignore=shutil.ignore_patterns("_native*", "__pycache__"),
        )
        (root / "python" / "adajudge").mkdir(parents=True)
        (root / "csrc" / "cpu").mkdir(parents=True)
        (root / "csrc" / "tiny.h").write_text("int answer();\n")
        (root / "csrc" / "bindings.cpp").write_text(BINDINGS)
        (root / "csrc" / "cpu" / "levels.cpp").write_text(LEVELS)
        (root / "csrc" / "cpu" / "kernel.cpp").write_text(KERNEL)

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python here; of the variables that a build reads, only these are set."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")}
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=kept | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def build(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """The module, in place."""
        return self.run("setup.py", "build_ext", "--inplace", **variables)

    def package(self, what: str, **variables: str) -> tuple[Path | None, str]:
        """A package as pip and build make it: `what` is build_wheel or build_sdist. Its file, if any, and the output."""
        code = f"from setuptools import build_meta; build_meta.{what}('dist')"
        result = self.run("-c", code, **variables)
        made = sorted((self.root / "dist").glob("*.whl" if what == "build_wheel" else "*.tar.gz"))
        return (made[0] if result.returncode == 0 else None), result.stdout

    def call(self) -> int:
        """What the built module's function gives."""
        module = next((self.root / "adajudge_kernels").glob("_native*.so"))
        load = (
            "from importlib.util import module_from_spec, spec_from_file_location;"
            f"spec = spec_from_file_location('_native', {str(module)!r}); native = module_from_spec(spec);"
            f"spec.loader.exec_module(native); print(native.call())"
        )
        result = self.run("-c", load)
        assert result.returncode == 0, result.stdout
        return int(result.stdout)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def path_without_compilers(tmp_path_factory) -> str:
    """A PATH on which there is Python's own folder at most, and no compiler there."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to(sys.executable)
    return str(folder)
