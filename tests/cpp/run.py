"""Builds and runs the C++ test of the kernels: ``python tests/cpp/run.py --sanitize address,undefined --places plain``.

CUDA kernels run too, emulated on the CPU (tests/cuda/emulation): for devices without and with a copy engine, in three
schedules of their threads.

CXX, CXXFLAGS and MAX_JOBS as for the module; a cross compiler's program runs under what ``--under`` names.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import native_build  # noqa: E402
from tests.cuda.emulated_module import emulated_objects  # noqa: E402


def build(folder: Path, sanitizers: str, places: list[str]) -> Path:
    """The test program, its objects in `folder`; of the CPU kernels only what `places` need, if any are named."""
    levels = [place for place in places if not place.startswith("cuda")] or (["plain"] if places else [])
    compiler = native_build.find_compiler() or native_build.stop("there is no C++ compiler")
    sanitized = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    ninja = native_build.Ninja(folder)
    native_build.cxx_rule(ninja, compiler, ["-g1", *(["-O1", *sanitized] if sanitizers else [])])
    kernels = native_build.kernel_objects(ninja, compiler, levels)
    # What is checked is the kernels: the loops that check them may run fast.
    options = ["-O2", "-fno-sanitize=all"]
    cases = [ninja.object("cxx", source, options) for source in sorted(ROOT.glob("tests/cpp/*.cpp"))]
    kernels += emulated_objects(ninja)
    # levels.cpp names the kernels of all instruction sets; those left out are never called.
    unresolved = ["-no-pie", "-Wl,--unresolved-symbols=ignore-all"] if levels else []
    options = [*sanitized, "-fopenmp", *unresolved]
    ninja.rule("link", [*compiler, *options, "$in", "-o", "$out"], depfile=False)
    program = ninja.step("link", folder.resolve() / "kernels_test", [*cases, *kernels])
    ninja.run()
    return program


def run(
    program: Path, chosen: list[str], features: list[str] | None = None, under: str = "", show: bool = False
) -> subprocess.CompletedProcess[str]:
    """The program's end: exit code 0 where every case agrees. `chosen`: places, dtypes and cases."""
    command = [*shlex.split(under), str(program), *(features or []), *chosen]
    return subprocess.run(command, capture_output=not show, text=True, check=False)


def main() -> int:
    """Exit code of the program: 0 where every case agrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", help="sanitizers, e.g. address,undefined")
    parser.add_argument(
        "--places",
        nargs="+",
        default=[],
        help="instruction sets, and cuda80 or cuda90 with -forward, -backward, -random; default all there are",
    )
    parser.add_argument("--features", nargs="+", default=[], help="widths of rows, default from 1 to 4100")
    parser.add_argument("--under", default="", help="an emulator's command")
    parser.add_argument("--folder", type=Path, default=None, help="where it is built, default in build/")
    arguments = parser.parse_args()
    folder = arguments.folder or ROOT / "build" / ("cpp-sanitized" if arguments.sanitize else "cpp")
    program = build(folder, arguments.sanitize, arguments.places)
    return run(program, arguments.places, arguments.features, arguments.under, show=True).returncode


if __name__ == "__main__":
    sys.exit(main())
