"""Kernels' machine code for NVIDIA GPUs: its loops, and how much of a GPU's issue slots their instructions need while their
bytes are moved. It is read with the cuobjdump that comes with triton."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

H200_BYTES_A_CYCLE = 4.3e12 / (132 * 1.98e9)  # that an SM moves at the bandwidth of a copy
ISSUED_A_CYCLE = 4  # warp instructions


class Instruction(NamedTuple):
    """Of a kernel: its name, and where it goes if it is a branch."""

    name: str
    target: int | None


def dump(code, *options):
    """What cuobjdump says of a file, or of a cubin's bytes."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = code
        if isinstance(code, bytes):
            path = Path(folder, "kernel.cubin")
            path.write_bytes(code)
        command = [triton.knobs.nvidia.cuobjdump.path, *options, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(code):
    """Of a kernel, in their order; targets are places in this list."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([^;]+);", code)
    places = {int(place, 16): i for i, (place, _) in enumerate(lines)}
    found = []
    for _, text in lines:
        branch = re.match(r"BRA\b.*0x([0-9a-f]+)", text)
        found.append(
            Instruction(re.split(r"[ .]", text)[0], places.get(int(branch[1], 16)) if branch else None)
        )
    return found


def loops(kernel):
    """Slices of a kernel's instructions: what lies between a branch back and where it goes. What stands after its end is no
    loop, but what a compiler has put out of the way, as waiting once more for a barrier."""
    end = max(i for i, x in enumerate(kernel) if x.name == "EXIT")
    return [
        slice(x.target, i + 1) for i, x in enumerate(kernel[:end]) if x.target is not None and x.target <= i
    ]


def issue_slots(count, moved):
    """The share of an H200's issue slots that `count` warp instructions take while `moved` bytes are moved."""
    return count / moved * H200_BYTES_A_CYCLE / ISSUED_A_CYCLE
