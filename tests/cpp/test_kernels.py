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
    """On one instruction set; the widest rows, which take longest, in two dtypes."""
    for widths, dtypes in ((["1", "7", "16", "33"], []), (["600"], ["float32", "bfloat16"])):
        result = run(program, ["plain", *dtypes], widths)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("place", "widths", "dtypes"),
    [
        ("cuda80-forward", ["264"], ["float32", "bfloat16"]),
        ("cuda90-backward", ["16", "264"], ["float32", "float16"]),
        ("cuda80-random", ["33", "2049"], ["float64"]),
        ("cuda90-random", ["4104"], ["bfloat16"]),
    ],
)
def test_cuda_kernels_agree_with_doubles_and_stay_within_their_buffers(program, place, widths, dtypes):
    """Emulated: one warp, several, rows by the copy engine, also with twice the columns a thread, and rows that no block holds
    whole; every dtype once."""
    result = run(program, [place, *dtypes], widths)
    assert result.returncode == 0, result.stdout + result.stderr
