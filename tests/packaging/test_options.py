"""What decides what is built: compilers, variables, and what is said where something cannot be."""

import sys
import types
import zipfile

import pytest

import native_build
from native_build import architecture_flags

CUDA_13 = [f"compute_{number}" for number in (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)]


def numbers(named, supported=CUDA_13):
    return [
        flag.removeprefix("-gencode=arch=compute_").split(",code=")[1]
        for flag in architecture_flags(named, supported)
    ]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("", ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ("9.0", ["sm_90"]),
        ("8.0;9.0a 10.0+PTX", ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        (" 9.0 ; 9.0; ", ["sm_90"]),
        ("12.0a+PTX", ["sm_120a", "compute_120a"]),
    ],
)
def test_architectures_are_named_as_torch_names_them(named, expected):
    assert numbers(named) == expected


def test_default_architectures_are_those_that_nvcc_has():
    assert numbers("", ["compute_75", "compute_80", "compute_90"]) == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("named", "supported", "message"),
    [
        ("Hopper", CUDA_13, "'Hopper' came, expected entries like 8.0"),
        ("90", CUDA_13, "'90' came"),
        ("8.0,9.0", CUDA_13, "'8.0,9.0' came"),
        ("7.0", CUDA_13, "this nvcc has no 7.0, only compute_100"),
        ("", ["compute_50"], "supports none of 8.0, 9.0, 10.0, 12.0"),
    ],
)
def test_architectures_that_cannot_be_are_refused(named, supported, message):
    with pytest.raises(SystemExit, match=message):
        architecture_flags(named, supported)


@pytest.mark.parametrize("name", ["ADAJUDGE_BUILD_EXT", "ADAJUDGE_BUILD_CUDA"])
def test_a_switch_is_0_or_1(name, monkeypatch):
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name}=yes: expected 0 .* or 1"):
        native_build.reason_not_to_build()


def test_cuda_without_the_module_is_a_contradiction(monkeypatch):
    monkeypatch.setenv("ADAJUDGE_BUILD_EXT", "0")
    monkeypatch.setenv("ADAJUDGE_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="the CUDA kernels are part of the compiled module"):
        native_build.reason_not_to_build()


def test_jobs_are_a_number(tmp_path, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS=many: expected a number"):
        native_build.Ninja(tmp_path).run()


def test_forced_cuda_says_what_is_missing_and_where_it_looked(tree, tmp_path):
    result = tree.build(ADAJUDGE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "ADAJUDGE_BUILD_CUDA=1, but there is no .cu source in csrc/ and there is no nvcc" in result.stdout
    assert f"CUDA_HOME is set: {tmp_path}/bin/nvcc" in result.stdout


def test_without_the_module_the_package_is_pure_python(tree):
    wheel, output = tree.package("build_wheel", ADAJUDGE_BUILD_EXT="0")
    assert wheel is not None, output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "without its compiled kernels: the compiled module was not built: ADAJUDGE_BUILD_EXT=0" in output


def test_without_a_compiler_the_package_works_and_says_what_is_lost(tree, tmp_path, path_without_compilers):
    wheel, output = tree.package("build_wheel", PATH=path_without_compilers)
    assert wheel is not None, output
    reason = "no C++ compiler was found when the package was installed (looked for $CXX, c++, g++, clang++)"
    assert reason in output
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # Without the finder of the installation in place that the tests run in: it would find that one's module.
    code = (
        "import sys; sys.path.insert(0, 'site');"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()];"
        "from adajudge_kernels import backends, env; print(backends.__file__, backends.unavailable_reason('cpu'));"
        "env.main()"
    )
    said, *report = tree.run("-c", code).stdout.splitlines()
    assert str(tmp_path / "site") in said
    assert reason in said
    assert reason in "".join(report)


def test_a_forced_module_needs_a_compiler(tree, path_without_compilers):
    result = tree.build(ADAJUDGE_BUILD_EXT="1", PATH=path_without_compilers)
    assert result.returncode == 1
    assert (
        "asked for (ADAJUDGE_BUILD_EXT=1 or ADAJUDGE_BUILD_CUDA=1), but no C++ compiler was found"
        in result.stdout
    )


def test_a_compiler_that_is_named_is_not_replaced(tree):
    result = tree.build(CXX="no-such-compiler -O1")
    assert result.returncode == 1
    assert "CXX=no-such-compiler -O1: there is no program 'no-such-compiler'" in result.stdout


def test_a_compiler_that_fails_stops_the_installation(tree):
    (tree.root / "csrc" / "cpu" / "kernel.cpp").write_text("#error not this one\n")
    wheel, output = tree.package("build_wheel")
    assert wheel is None
    assert "not this one" in output
    assert "ADAJUDGE_BUILD_EXT=0 installs the package without the compiled module" in output


def test_ninja_is_found_on_path_where_its_package_does_not_know_its_place(monkeypatch, tmp_path):
    """As in pip's isolation: the package is importable, and its program is in a folder that only PATH names."""
    program = tmp_path / "ninja"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace(BIN_DIR=str(tmp_path / "elsewhere")))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native_build._ninja() == str(program)
    program.unlink()
    with pytest.raises(SystemExit, match="there is no ninja; with --no-build-isolation"):
        native_build._ninja()
