"""The options of the benchmark suite, as pytest takes them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def suite(*options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-k",
        "cpu_pooling",
        "-rs",
        "-n",
        "0",
        "--no-header",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_what_has_not_begun_within_the_seconds_is_skipped():
    run = suite("--within", "0")
    assert run.returncode == 0
    assert "the 0 seconds are over" in run.stdout
    assert "16 skipped" in run.stdout


@pytest.mark.parametrize("came", ["tpu", "cuda:0"])
def test_an_unknown_device_is_a_usage_error(came):
    run = suite("--device", came)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--device: {came!r} came, expected cpu or cuda" in run.stderr
