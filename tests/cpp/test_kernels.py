"""The C++ test of the CPU kernels, as far as it takes seconds; all of it: ``make test-sanitizers``."""

import subprocess
import sys
from pathlib import Path


def test_kernels_agree_with_doubles_and_stay_within_their_buffers(tmp_path):
    """On one instruction set, without the checks for undefined behaviour: they take minutes together."""
    script = Path(__file__).with_name("run.py")
    command = [sys.executable, script, "--sanitize", "address", "--places", "plain", "--folder", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
