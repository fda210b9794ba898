"""The sdist, the wheel that is built from it, and the module as it is installed: what is in them, and what is not."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.once import once
from tests.packaging.conftest import ROOT


def build(what, source, to):
    code = f"from setuptools import build_meta; print(build_meta.{what}({str(to)!r}))"
    env = os.environ | {"ADAJUDGE_BUILD_CUDA": "0", "CXXFLAGS": "-O0"}  # else it takes minutes
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return to / result.stdout.splitlines()[-1]


def tool(*command):
    """Output of binutils; a missing tool is an error that says so."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    def make(folder):
        with tarfile.open(build("build_sdist", ROOT, folder)) as archive:
            archive.extractall(folder, filter="data")
        return next(path for path in folder.iterdir() if path.is_dir())

    return once(tmp_path_factory, "sdist", make)


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    return once(tmp_path_factory, "wheel", lambda folder: build("build_wheel", sdist, folder))


@pytest.fixture
def module():
    """As `make setup` builds it."""
    (path,) = ROOT.glob("adajudge_kernels/_native*.so")
    return path


def test_the_sdist_holds_every_source(sdist):
    for source in [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py", ROOT / "LICENSE", ROOT / "README.md"]:
        assert (sdist / source.relative_to(ROOT)).read_bytes() == source.read_bytes()


def test_the_wheel_holds_the_module_and_no_source(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [Path(name).name.split(".")[0] for name in names if name.endswith(".so")] == ["_native"]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [
        name for name in names if "csrc" in name or "_native_missing" in name or name.startswith("tests")
    ]
    assert "-py3-none-any" not in wheel.name


def test_the_module_knows_no_torch_and_brings_no_runtime_of_threads(module):
    needed = tool("readelf", "-d", module)
    assert "NEEDED" in needed
    assert not [name for name in ("torch", "c10", "gomp", "libomp", "cudart") if name in needed]
    symbols = tool("nm", "-D", module)
    assert not [name for name in ("at6Tensor", "c10", "torch") if name in symbols]
    exported = [line for line in tool("nm", "-D", "--defined-only", module).splitlines() if " T " in line]
    assert [line.split()[-1] for line in exported] == ["PyInit__native"]


def test_the_module_holds_no_debug_information(module):
    assert ".debug_" not in tool("readelf", "-S", "-W", module)


def test_instruction_sets_share_no_function():
    """A weak symbol may be resolved to the copy of a larger instruction set, which a smaller machine cannot run."""
    objects = [*ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}/csrc/cpu/*.avx*.o")]
    sources = {path.name.split(".")[0] for path in ROOT.glob("csrc/cpu/*.cpp")} - {"levels"}
    if native_levels():
        assert {path.name.split(".")[0] for path in objects} == sources
    for path in objects:
        lines = [line.split() for line in tool("nm", "--defined-only", path).splitlines()]
        weak = {line[-1] for line in lines if line[-2] in "WVu"}
        assert weak <= {"DW.ref.__gxx_personality_v0"}, path.name


def native_levels():
    import platform

    return platform.machine() == "x86_64"
