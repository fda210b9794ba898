"""What ptxas said of the CUDA kernels when the module was built; ``python -m tests.cuda.compile_report`` prints the tables of
docs/cuda.md."""

import re
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
REGISTERS, MOST_THREADS = 65536, 2048  # of a multiprocessor of sm_90


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int


@cache
def kernels():
    """Of every source in csrc/."""
    found = []
    for source in sorted(ROOT.glob("csrc/*.cu")):
        log = BUILD / f"csrc/{source.name}.o.log"
        assert log.stat().st_mtime >= source.stat().st_mtime, (
            "the report is older than the source: make setup"
        )
        report = re.findall(
            r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n"
            r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
            log.read_text(),
        )
        found += [
            Kernel(name, arch, int(r), int(frame), int(a) + int(b)) for name, arch, frame, a, b, r in report
        ]
    return found


class Variant(NamedTuple):
    """A row of the table: a kernel's template arguments, what it is used for, how a block of it loads."""

    kernel: str
    arguments: str  # mangled
    use: str
    threads: int
    tokens: int  # whose states are under way together
    row_bytes: int  # of one token that a thread loads: K states, its columns

    @property
    def in_flight(self):
        return self.threads * self.tokens * self.row_bytes


def scan(kernel, dtype, columns, depths, features, tokens):
    size = 2 if dtype == "bf16" else 4
    mangled = {"bf16": "13__nv_bfloat16", "fp32": "f"}[dtype]
    arguments = f"{mangled}Li{16 // size}ELi{columns}ELi{depths}E" + ("Lb1E" if kernel == "scan" else "")
    use = f"{dtype}, d = {features}, K = {depths}"
    return Variant(kernel, arguments, use, features // columns, tokens, depths * columns * size)


VARIANTS = [
    scan("scan", "bf16", 8, 1, 4096, 4),
    scan("scan", "bf16", 8, 2, 4096, 4),
    scan("scan", "bf16", 8, 3, 4096, 4),
    scan("scan", "bf16", 8, 4, 4096, 2),
    scan("scan", "bf16", 16, 3, 8192, 2),
    scan("scan", "fp32", 8, 3, 4096, 2),
    scan("scan_backward", "bf16", 8, 1, 4096, 2),
    scan("scan_backward", "bf16", 8, 2, 4096, 2),
    scan("scan_backward", "bf16", 8, 3, 4096, 2),
    scan("scan_backward", "bf16", 8, 4, 4096, 1),
    scan("scan_backward", "fp32", 8, 3, 4096, 1),
]


# Kernel, template arguments (mangled), threads of a block.
OTHERS = {
    ("combine", "f"): 256,
    ("gate", "f"): 256,
    ("dots", "13__nv_bfloat16Li8E"): 256,
    ("spread_means", "13__nv_bfloat16Li8E"): 128,
    ("spread_attention", "13__nv_bfloat16Li8E"): 128,
    ("zero_padding", "13__nv_bfloat16Li8E"): 256,
    ("add_rows", "f"): 256,
    ("sum_alpha_parts", "f"): 32,
    ("form_shares", "13__nv_bfloat16Li8E"): 128,
    ("form_shares", "fLi4E"): 128,
    ("evaluate", "fLb0E"): 512,
    ("evaluate", "fLb1E"): 512,
    ("view_gradients", "13__nv_bfloat16Li8E"): 256,
    ("view_gradients", "fLi4E"): 256,
    ("weight_gradients", "13__nv_bfloat16"): 128,
    ("vector_gradients", "f"): 256,
    ("focal_bradley_terry", "f"): 512,
}


def of_variant(kernel, arguments):
    """By architecture."""
    pattern = f"cuda{len(kernel)}{kernel}I{arguments}E"
    return {found.arch: found for found in kernels() if pattern in found.name}


def others_table():
    """Markdown: the kernels beside the scans."""
    head = ["kernel", "of", "threads", *ARCHITECTURES]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for (kernel, arguments), threads in OTHERS.items():
        found = of_variant(kernel, arguments)
        dtype = "bf16" if "bfloat16" in arguments else "fp32"
        of = {"evaluatefLb0E": "fp32, forward", "evaluatefLb1E": "fp32, backward"}.get(
            kernel + arguments, dtype
        )
        cells = [f"`{kernel}`", of, threads, *(found[arch].registers for arch in ARCHITECTURES)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def scans_table():
    """Markdown: the kernels that read the states, and what they keep under way."""
    head = ["kernel", "for", "threads", "tokens at a time", *ARCHITECTURES, "blocks", "KiB under way"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for variant in VARIANTS:
        found = of_variant(variant.kernel, variant.arguments)
        registers = found["sm_90"].registers
        of_block = variant.threads * (-(-registers // 8) * 8)  # handed out in eights
        blocks = min(REGISTERS // of_block, MOST_THREADS // variant.threads)
        cells = [f"`{variant.kernel}`", variant.use, variant.threads, variant.tokens]
        cells += [found[arch].registers for arch in ARCHITECTURES]
        cells += [blocks, blocks * variant.in_flight // 1024]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(scans_table(), others_table(), sep="\n\n")
