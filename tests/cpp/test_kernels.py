"""The C++ test of the kernels, as far as it takes seconds; all of it: ``make test-sanitizers``.

Without the checks for undefined behaviour: they take minutes together.
"""

import pytest

from tests.cpp.run import ROOT, build, run
from tests.once import locked

FOLDER = ROOT / "build/cpp-test"
PLACES = ["plain", "cuda80-random", "cuda90-random"]


def built():
    """The test program; one worker builds it."""
    with locked(FOLDER):
        return build(FOLDER, "address", PLACES)


@pytest.fixture(scope="module")
def program():
    return built()


def test_cpu_kernels_agree_with_doubles_and_stay_within_their_buffers(program):
    """On one instruction set."""
    result = run(program, ["plain"])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("place", "features"),
    [("cuda80-forward", ["264"]), ("cuda90-backward", ["16", "264"]), ("cuda80-random", ["33", "2049"])],
)
def test_cuda_kernels_agree_with_doubles_and_stay_within_their_buffers(program, place, features):
    """Emulated: one warp, several, rows by the copy engine, and rows that no block holds whole."""
    result = run(program, [place], features)
    assert result.returncode == 0, result.stdout + result.stderr
