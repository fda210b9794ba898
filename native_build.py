"""Compiles `csrc/` with ninja; setup.py makes a package of it, tests/cpp a test program.

`csrc/` knows nothing of torch, and neither does this: one module serves every version of torch from 2.10 on, and the build
needs pybind11 and ninja only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent

# In C++, multiplications and additions are fused where the source says so, and nowhere else.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Icsrc"),
    *("-Wall", "-Wextra", "-Wno-unused-function", "-Wno-psabi"),
]

# The instruction sets that every kernel source is compiled for. levels.cpp chooses one when the program runs.
LEVELS = {"x86_64": {"plain": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}}

CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")  # the last one as PTX too

WITHOUT = "ADAJUDGE_BUILD_EXT=0 installs the package without the compiled module"
HINT = (
    "the compiled module could not be built; what the compiler said is above (it takes g++ 11 or clang++ 14, or later, "
    "and for the CUDA kernels nvcc 12 or later: ADAJUDGE_BUILD_CUDA=0 leaves those out). " + WITHOUT
)


def stop(message: str) -> NoReturn:
    """End the build; pip shows the message."""
    raise SystemExit(f"error: {message}")


def switch(name: str) -> bool | None:
    """An environment variable that forces (1) or forbids (0) something, None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        stop(
            f"{name}={value}: expected 0 (leave it out) or 1 (stop where it cannot be built), or no such variable"
        )
    return None if value == "" else value == "1"


def reason_not_to_build() -> str | None:
    """Why the package is to be installed without the compiled module, or None; stops where it is forced and impossible."""
    wanted = switch("ADAJUDGE_BUILD_EXT")
    if switch("ADAJUDGE_BUILD_CUDA"):
        if wanted is False:
            stop(
                "ADAJUDGE_BUILD_CUDA=1 and ADAJUDGE_BUILD_EXT=0: the CUDA kernels are part of the compiled module"
            )
        wanted = True
    if wanted is False:
        return (
            "the compiled module was not built: ADAJUDGE_BUILD_EXT=0 was set when the package was installed"
        )
    if sys.platform != "linux":
        reason = f"it is for Linux only, and this is {sys.platform}"
    elif find_compiler() is None:
        reason = (
            "no C++ compiler was found when the package was installed (looked for $CXX, c++, g++, clang++); "
            "install one, then: pip install --force-reinstall --no-cache-dir"
        )
    else:
        return None
    if wanted:
        stop(
            f"the compiled module was asked for (ADAJUDGE_BUILD_EXT=1 or ADAJUDGE_BUILD_CUDA=1), but {reason}"
        )
    return f"the compiled module was not built: {reason}"


def words(name: str) -> list[str]:
    """An environment variable's words, split as a shell does."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        stop(f"{name}={os.environ[name]}: {error}; expected words as in a shell")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command; CXX may have several words (``ccache g++``)."""
    named = words("CXX")
    if named:
        if shutil.which(named[0]) is None:
            stop(
                f"CXX={os.environ['CXX']}: there is no program {named[0]!r}; name a C++ compiler, or unset CXX"
            )
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def is_clang(compiler: list[str]) -> bool:
    """Whether the compiler is clang, under whatever name."""
    return "clang" in output_of([*compiler, "--version"])


def output_of(command: list[str]) -> str:
    """What a tool of the build prints."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        stop(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}\n{HINT}")
    return result.stdout


# -- CUDA ------------------------------------------------------------------------------------------------------------


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or None, and where it was looked for."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            path = Path(os.environ[name], "bin", "nvcc")
            return str(path) if path.is_file() else None, f"{name} is set: {path}"
    return shutil.which("nvcc"), "CUDA_HOME and CUDA_PATH are not set: nvcc on PATH"


def nvcc_to_use(sources: Collection[Path]) -> str | None:
    """nvcc, or None where the module is to be built without CUDA; stops where it is forced and impossible."""
    wanted = switch("ADAJUDGE_BUILD_CUDA")
    if wanted is False:
        return None
    nvcc, looked = find_nvcc()
    missing = []
    if not sources:
        missing.append("there is no .cu source in csrc/")
    if nvcc is None:
        missing.append(f"there is no nvcc ({looked})")
    if not missing:
        return nvcc
    if wanted:
        stop(f"ADAJUDGE_BUILD_CUDA=1, but {' and '.join(missing)}")
    print(f"building without CUDA kernels: {' and '.join(missing)}")
    return None


def architecture_flags(named: str, supported: Collection[str]) -> list[str]:
    """nvcc's ``-gencode`` flags.

    Args:
        named: TORCH_CUDA_ARCH_LIST in torch's format, e.g. ``"8.0;9.0a 10.0+PTX"``; empty for the default.
        supported: what ``nvcc --list-gpu-arch`` prints, e.g. ``compute_90``.
    """
    entries = re.split(r"[;\s]+", named.strip("; \t\n"))
    if entries == [""]:
        entries = [name for name in CUDA_ARCHITECTURES if f"compute_{name.replace('.', '')}" in supported]
        entries[-1:] = [f"{name}+PTX" for name in entries[-1:]]  # for GPUs that come later
    flags = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST={named}: {entry!r} came, expected entries like 8.0, 9.0a or 12.0+PTX")
        major, minor, variant, ptx = match.groups()
        if f"compute_{major}{minor}" not in supported:
            stop(
                f"TORCH_CUDA_ARCH_LIST={named}: this nvcc has no {entry}, only {', '.join(sorted(supported))}"
            )
        number = f"{major}{minor}{variant}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        stop(
            f"this nvcc supports none of {', '.join(CUDA_ARCHITECTURES)}; name others in TORCH_CUDA_ARCH_LIST"
        )
    return list(dict.fromkeys(flags))


def static_runtime(nvcc: str) -> list[str]:
    """What links the CUDA runtime statically, so that any driver of its major version serves the module."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    # nvcc on PATH may be a script that stands elsewhere: nvcc itself says where its toolkit is.
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    folders = [Path(name) for name in re.findall(r'"-L([^"]+)"', plan.stderr)]
    if top:
        folders += [Path(top[1].strip(), name) for name in ("lib64", "lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return [
                str(folder.resolve() / "libcudart_static.a"),
                "-Wl,--exclude-libs,ALL",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]
    stop(f"libcudart_static.a is not in the toolkit of {nvcc} (looked in {', '.join(map(str, folders))})")


# -- ninja -----------------------------------------------------------------------------------------------------------


class Ninja:
    """A ninja file and its outputs, in `folder`. Commands run in the root of the source tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.lines = [f"builddir = {_escaped(self.folder)}"]

    def rule(self, name: str, command: list[str], depfile: bool = True, log: bool = False) -> None:
        """A rule; `command` may hold ninja's $in, $out and $flags. `log`: what it says goes to ``$out.log``."""
        words = " ".join(
            word if word.startswith("$") else shlex.quote(word.replace("$", "$$")) for word in command
        )
        if log:
            words += " > $out.log 2>&1 || (cat $out.log; false)"
        self.lines += [f"rule {name}", f"  command = {words}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def step(self, rule: str, output: Path, inputs: Iterable[Path], flags: Iterable[str] = ()) -> Path:
        """One output of a rule."""
        sources = " ".join(map(_escaped, inputs))
        self.lines += [f"build {_escaped(output)}: {rule} {sources}"]
        self.lines += [f"  flags = {shlex.join(flags).replace('$', '$$')}"]
        return output

    def object(self, rule: str, source: Path, flags: Iterable[str] = (), level: str = "") -> Path:
        """The object of one source."""
        name = source.relative_to(ROOT).with_suffix(
            f".{level}{source.suffix}.o" if level else f"{source.suffix}.o"
        )
        return self.step(rule, self.folder / name, [source.relative_to(ROOT)], flags)

    def run(self) -> None:
        """Make what is missing or out of date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not re.fullmatch("[1-9][0-9]*", jobs):
            stop(f"MAX_JOBS={jobs}: expected a number of compilations to run at a time")
        command = [_ninja(), "-f", str(file), *([f"-j{jobs}"] if jobs else [])]
        sys.stdout.flush()
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            stop(HINT)


def _escaped(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja() -> str:
    """The ninja of the environment that builds: on PATH in pip's isolation, else perhaps only beside its package."""
    folders = os.environ.get("PATH", os.defpath)
    try:
        import ninja
    except ImportError:
        pass
    else:
        folders = os.pathsep.join([ninja.BIN_DIR, folders])
    return shutil.which("ninja", path=folders) or stop(
        "there is no ninja; with --no-build-isolation, install what [build-system] of pyproject.toml names"
    )


def cxx_rule(build: Ninja, compiler: list[str], extra: Iterable[str] = ()) -> None:
    """How C++ is compiled. $flags come last: an -march of CXXFLAGS must not replace that of an instruction set."""
    flags = [*CXX_FLAGS, *extra, *words("CXXFLAGS")]
    build.rule("cxx", [*compiler, *flags, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"])


def kernel_objects(build: Ninja, compiler: list[str], only: Collection[str] = ()) -> list[Path]:
    """The CPU kernels, once per instruction set (all of them, or `only` those named), and their dispatch."""
    machine = output_of([*compiler, "-dumpmachine"]).split("-")[
        0
    ]  # of the target: it may be a cross compiler
    dispatch = ROOT / "csrc/cpu/levels.cpp"
    objects = [build.object("cxx", dispatch)]
    for source in sorted(set(ROOT.glob("csrc/cpu/*.cpp")) - {dispatch}):
        for level, architecture in LEVELS.get(machine, {"plain": None}).items():
            if only and level not in only:
                continue
            flags = [f"-DADAJUDGE_LEVEL={level}", *([f"-march={architecture}"] if architecture else [])]
            objects.append(build.object("cxx", source, flags, level))
    return objects


def build_module(folder: Path, module: Path) -> None:
    """Build the extension `module`, objects in `folder`."""
    try:
        import pybind11
    except ImportError:
        stop(
            "there is no pybind11; with --no-build-isolation, install what [build-system] of pyproject.toml names"
        )
    compiler = find_compiler()
    if compiler is None:
        stop("there is no C++ compiler")
    cuda_sources = sorted(ROOT.glob("csrc/*.cu"))
    nvcc = nvcc_to_use(cuda_sources)
    build = Ninja(folder)
    cxx_rule(build, compiler)
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        stop(f"there is no Python.h in {headers}: install Python's headers (Debian: python3-dev). {WITHOUT}")
    options = ["-O1", f"-I{headers}", f"-I{pybind11.get_include()}"]
    architectures: list[str] = []
    if nvcc:
        supported = output_of([nvcc, "--list-gpu-arch"]).split()
        architectures = architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), supported)
        codes = ";".join(flag.rpartition("code=")[2] for flag in architectures)
        options.append(f'-DADAJUDGE_WITH_CUDA="{codes}"')
    # First, for it takes the longest; nothing in it is worth optimising.
    objects = [
        build.object("cxx", ROOT / "csrc/bindings.cpp", options),
        *kernel_objects(build, compiler),
    ]
    libraries = []
    if nvcc:
        host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
        # Three times smaller; loading is once per process. Of nvcc 12 it would ask for a newer driver than its runtime does.
        release = re.search(r"release (\d+)", output_of([nvcc, "--version"]))
        packed = ["--compress-mode=size"] if release and int(release[1]) >= 13 else []
        options = [
            *("-std=c++20", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"),
            "-Xptxas=-v",  # registers and spills of every kernel, for tests/cuda/test_compiled.py
            *packed,
            *host,
            *architectures,
        ]
        command = [nvcc, *options, "$flags", "-MMD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
        build.rule("nvcc", command, log=True)
        objects += [build.object("nvcc", source) for source in cuda_sources]
        libraries = static_runtime(nvcc)
    # g++'s OpenMP is left out of the link: torch has loaded its own copy of it, for the whole process, before the
    # module, and one process should have one pool of threads. With -z now a process without it fails at the import,
    # not at the first call. clang++ calls another runtime, which torch does not bring.
    openmp = ["-fopenmp"] if is_clang(compiler) else []
    options = ["-shared", "-s", "-Wl,-z,now", *openmp]
    build.rule("link", [*compiler, *options, "$in", "-o", "$out", *libraries], depfile=False)
    build.step("link", module.resolve(), objects)
    build.run()
    print(f"built {module.name}, {'with' if nvcc else 'without'} CUDA kernels")
