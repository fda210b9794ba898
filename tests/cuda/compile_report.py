"""What ptxas said of the CUDA kernels when the module was built, and the module's machine code;
``python -m tests.cuda.compile_report`` prints the tables of docs/cuda.md."""

import re
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from adajudge_kernels import compiled
from tests import machine_code

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# Of a multiprocessor of sm_90.
REGISTERS, MOST_THREADS, WARP = 65536, 2048, 32
SHARED_OF_BLOCK, SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED = 227 << 10, 228 << 10, 1 << 10
# csrc/pooling_plans.cuh; what a block has beside its ring, at most.
MOST_STAGES, SHARED_OF_SUMS = 8, 2 << 10


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
    """A row of the tables: a kernel that reads states, and what it is used for; figures as in csrc/pooling*.cuh."""

    kernel: str
    dtype: str
    columns: int  # of a thread
    depths: int
    features: int
    of: str = "views"  # csrc/pooling.cuh, Pass

    @property
    def ring(self):
        return self.kernel.startswith("ring")

    @property
    def size(self):
        return 2 if self.dtype == "bf16" else 4

    @property
    def arguments(self):
        """Of the template, mangled."""
        mangled = {"bf16": "13__nv_bfloat16", "fp32": "f"}[self.dtype]
        number = ("means", "attention", "views").index(self.of)
        return f"{mangled}Li{16 // self.size}ELi{self.columns}ELi{self.depths}ELNS0_4PassE{number}E"

    @property
    def use(self):
        of = f"K = {self.depths}" if self.of == "views" else self.of
        return f"{self.dtype}, d = {self.features}, {of}"

    @property
    def threads(self):
        return self.features // self.columns

    @property
    def most_threads(self):
        """SCAN_THREADS, BACKWARD_THREADS."""
        return 384 if self.kernel.endswith("backward") and self.columns > 8 else 512

    @property
    def tokens(self):
        """SCAN_TOKENS, BACKWARD_TOKENS."""
        of_thread = self.depths * self.columns * self.size
        if self.kernel.endswith("backward"):
            return 2 if of_thread <= 48 else 1
        if self.ring:
            return 2 if of_thread <= 96 else 1
        return 32 // self.columns if of_thread <= 48 else 16 // self.columns if of_thread <= 96 else 1

    @property
    def step_bytes(self):
        return self.tokens * self.depths * self.features * self.size

    def blocks_and_stages(self):
        """``ring_stages``, which blocks fit by their registers, on a multiprocessor of sm_90."""
        for blocks in range(self.most_threads // self.threads, 0, -1):
            room = min(SHARED_OF_BLOCK, SHARED_OF_MULTIPROCESSOR // blocks - SHARED_RESERVED) - SHARED_OF_SUMS
            stages = min(MOST_STAGES, room // (self.step_bytes + 8))
            if stages > 1:
                return blocks, stages
        raise ValueError(f"{self} has no ring")


VARIANTS = [
    Variant("scan", "bf16", 8, 1, 4096, "means"),
    Variant("scan", "bf16", 8, 1, 4096, "attention"),
    Variant("scan", "bf16", 8, 2, 4096),
    Variant("scan", "bf16", 8, 3, 4096),
    Variant("scan", "bf16", 8, 4, 4096),
    Variant("scan", "bf16", 16, 3, 8192),
    Variant("scan", "fp32", 8, 3, 4096),
    Variant("scan_backward", "bf16", 8, 1, 4096, "attention"),
    Variant("scan_backward", "bf16", 8, 2, 4096),
    Variant("scan_backward", "bf16", 8, 3, 4096),
    Variant("scan_backward", "bf16", 8, 4, 4096),
    Variant("scan_backward", "fp32", 8, 3, 4096),
]
RINGS = [
    Variant("ring_scan", "bf16", 16, 1, 4096, "means"),
    Variant("ring_scan", "bf16", 16, 1, 4096, "attention"),
    Variant("ring_scan", "bf16", 16, 3, 1024),
    Variant("ring_scan", "bf16", 16, 3, 4096),
    Variant("ring_scan", "bf16", 16, 4, 4096),
    Variant("ring_scan", "bf16", 16, 3, 8192),
    Variant("ring_scan", "fp32", 16, 3, 4096),
    Variant("ring_scan_backward", "bf16", 8, 1, 4096, "attention"),
    Variant("ring_scan_backward", "bf16", 8, 3, 1024),
    Variant("ring_scan_backward", "bf16", 8, 3, 4096),
    Variant("ring_scan_backward", "bf16", 8, 4, 4096),
    Variant("ring_scan_backward", "bf16", 16, 3, 5120),
    Variant("ring_scan_backward", "fp32", 8, 3, 4096),
]


# Kernel, template arguments (mangled), threads of a block.
OTHERS = {
    ("combine", "fLi4E"): 256,
    ("gate", "fLi4E"): 256,
    ("dots", "13__nv_bfloat16Li8E"): 256,
    ("spread_means", "13__nv_bfloat16Li8E"): 128,
    ("spread_attention", "13__nv_bfloat16Li8ELi3E"): 128,
    ("zero_padding", "13__nv_bfloat16Li8E"): 256,
    ("add_rows", "fLi4E"): 512,
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


@cache
def sass():
    """The machine code of the built module for sm_90, by kernel."""
    functions = machine_code.dump(compiled.module.__file__, "-sass", "-arch", "sm_90").split("Function : ")
    return {function.split("\n", 1)[0].strip(): function for function in functions[1:]}


def issue_slots(variant):
    """The share of an H200's that a variant takes while a step's bytes are moved. Of the kernel's longest loop, all branches,
    without what one thread asks the copy engine for."""
    kernel = machine_code.instructions(sass()[of_variant(variant.kernel, variant.arguments)["sm_90"].name])
    loop = max(machine_code.loops(kernel), key=lambda found: found.stop - found.start)
    count = loop.stop - loop.start
    copies = [i for i in range(loop.start, loop.stop) if kernel[i].name == "UBLKCP"]
    if copies:
        around = next(
            i for i in range(loop.start, copies[0]) if copies[-1] < (kernel[i].target or 0) < loop.stop
        )
        count -= kernel[around].target - around - 1
    moved = variant.step_bytes * (2 if variant.kernel.endswith("backward") else 1)
    return machine_code.issue_slots(count * variant.threads / WARP, moved)


def rows_table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def scans_table():
    """Markdown: the kernels that read the states, and what they keep under way."""
    head = [
        "kernel",
        "for",
        "threads",
        "tokens at a time",
        *ARCHITECTURES,
        "blocks",
        "KiB under way",
        "slots",
    ]
    rows = []
    for variant in VARIANTS:
        found = of_variant(variant.kernel, variant.arguments)
        registers = found["sm_90"].registers
        of_block = variant.threads * (-(-registers // 8) * 8)  # handed out in eights
        blocks = min(REGISTERS // of_block, MOST_THREADS // variant.threads)
        of_archs = [found[arch].registers for arch in ARCHITECTURES]
        under_way = blocks * variant.step_bytes // 1024
        rows.append(
            [
                f"`{variant.kernel}`",
                variant.use,
                variant.threads,
                variant.tokens,
                *of_archs,
                blocks,
                under_way,
                f"{100 * issue_slots(variant):.0f} %",
            ]
        )
    return rows_table(head, rows)


def rings_table():
    """Markdown: those that read the states by the copy engine."""
    archs = ARCHITECTURES[1:3]
    head = ["kernel", "for", "threads", "tokens", "stages", *archs, "blocks", "KiB under way", "slots"]
    rows = []
    for variant in RINGS:
        found = of_variant(variant.kernel, variant.arguments)
        blocks, stages = variant.blocks_and_stages()
        of_archs = [found[arch].registers for arch in archs]
        under_way = blocks * (stages - 1) * variant.step_bytes // 1024
        rows.append(
            [
                f"`{variant.kernel}`",
                variant.use,
                variant.threads,
                variant.tokens,
                stages,
                *of_archs,
                blocks,
                under_way,
                f"{100 * issue_slots(variant):.0f} %",
            ]
        )
    return rows_table(head, rows)


def others_table():
    """Markdown: the kernels beside the scans."""
    rows = []
    for (kernel, arguments), threads in OTHERS.items():
        found = of_variant(kernel, arguments)
        dtype = "bf16" if "bfloat16" in arguments else "fp32"
        of = {"evaluatefLb0E": "fp32, forward", "evaluatefLb1E": "fp32, backward"}.get(
            kernel + arguments, dtype
        )
        rows.append([f"`{kernel}`", of, threads, *(found[arch].registers for arch in ARCHITECTURES)])
    return rows_table(["kernel", "of", "threads", *ARCHITECTURES], rows)


def main():
    """Print the tables, or say why there are none."""
    if compiled.module is None or not compiled.module.with_cuda:
        sys.exit("the compiled module holds no CUDA kernels: `make setup` where nvcc is found")
    try:
        print(scans_table(), rings_table(), others_table(), sep="\n\n")
    except FileNotFoundError as error:
        sys.exit(f"{error.filename}: no such report; it is written by `make setup` where nvcc is found")
    except ImportError:
        sys.exit("triton: not installed; its cuobjdump reads the machine code")


if __name__ == "__main__":
    main()
