"""What a benchmark run has measured, read from the file that pytest-benchmark writes."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.case import OURS

MAIN = (
    "eager",
    "eager products",
    "eager packed",
    "torch.compile",
)  # what most people would write instead of an operation of ours
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One side of a case. What a benchmark does not say of itself is empty, or None."""

    source: str  # the test file's name: "test_pooling.py"
    case: str
    work: str
    shape: str  # "T=4096 B=12 d=1024 K=3"
    dtype: str  # "bf16"
    side: str
    seconds: float  # median
    times_ours: float | None  # how many times our time it takes, where ours was timed in its rounds
    device: str
    threads: int | None
    useful_tokens_per_second: float | None
    bytes_that_must_move: int | None
    multiply_adds: int
    bandwidth: float | None  # bytes per second
    share_of_bandwidth: float | None
    peak_bytes: int | None  # of memory beyond the inputs
    head_share: float | None  # of a judge's arithmetic

    @classmethod
    def of(cls, benchmark: dict[str, Any]) -> Entry:
        """Of an element of the file's ``benchmarks``. Raises KeyError without a group, a side or a median."""
        info = benchmark["extra_info"]
        dtype = info.get("dtype", "").removeprefix("torch.")
        return cls(
            source=benchmark["fullname"].partition("::")[0].rpartition("/")[2],
            case=info.get("case", benchmark["group"]),
            work=info.get("work", ""),
            shape=info.get("shape", ""),
            dtype=SHORT_DTYPES.get(dtype, dtype),
            side=benchmark["params"]["side"],
            seconds=info.get("cuda_event_seconds", benchmark["stats"]["median"]),
            times_ours=info.get("times_adajudge_kernels"),
            device=info.get("device", "cpu"),
            threads=info.get("threads"),
            useful_tokens_per_second=info.get("useful_tokens_per_second"),
            bytes_that_must_move=info.get("bytes_that_must_move"),
            multiply_adds=info.get("multiply_adds", 0),
            bandwidth=info.get("bandwidth"),
            share_of_bandwidth=info.get("share_of_bandwidth"),
            peak_bytes=info.get("peak_bytes"),
            head_share=info.get("head_share_of_arithmetic"),
        )

    @property
    def family(self) -> str:
        """The case's name without what its shape says too: "experts, B=16" of shape "B=16 d=2048" is one of "experts"."""
        return ", ".join(part for part in self.case.split(", ") if part not in self.shape.split())

    @property
    def name(self) -> str:
        """The case with its size and dtype, as a reader finds it in tables."""
        return ", ".join(filter(None, [self.family, self.shape, self.dtype]))

    @property
    def sizes(self) -> dict[str, int]:
        """The shape's numbers by their letters."""
        return {letter: int(number) for letter, number in re.findall(r"(\w+)=(\d+)", self.shape)}


def _commit(written: dict[str, Any]) -> str:
    found = written.get("commit_info", {})
    if not re.fullmatch("[0-9a-f]{40}", found.get("id", "")):
        return ""
    return found["id"][:12] + (", changed" if found["dirty"] else "")


@dataclasses.dataclass(frozen=True)
class Run:
    """A file's entries, and the machine that they are of."""

    machine: dict[str, Any]
    date: str  # 2026-11-21
    commit: str  # what was measured, if git knew: 2102fe32e6fb, changed
    entries: list[Entry]  # in the order of each family's first in the file, then by size, dtype and work

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Raises OSError, and ValueError or KeyError where it is no file of pytest-benchmark."""
        written = json.loads(Path(path).read_text())
        entries = [Entry.of(benchmark) for benchmark in written["benchmarks"]]
        families = list(dict.fromkeys((entry.source, entry.family) for entry in entries))
        entries.sort(
            key=lambda x: (families.index((x.source, x.family)), [*x.sizes.values()], x.dtype, x.work)
        )
        return cls(written["machine_info"], written["datetime"][:10], _commit(written), entries)

    @property
    def device(self) -> str:
        """What the cases ran on: the GPU's name, or the processor's."""
        on_gpu = any(entry.device.startswith("cuda") for entry in self.entries)
        return self.machine["gpu"] if on_gpu else self.machine["processor"]

    @property
    def device_kind(self) -> str:
        """For names of files: ``cpu``, or the GPU's name in small letters and hyphens."""
        if self.device != self.machine.get("gpu"):
            return "cpu"
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @cached_property
    def cases(self) -> dict[tuple[str, str], dict[str, Entry]]:
        """The sides of every case and work, by name."""
        found: dict[tuple[str, str], dict[str, Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.name, entry.work), {})[entry.side] = entry
        return found

    @cached_property
    def operations(self) -> dict[tuple[str, str], dict[str, Entry]]:
        """Of `cases`, those in which ours stands beside one of the `MAIN` sides: no whole judges, no costs of calls."""
        return {
            key: sides
            for key, sides in self.cases.items()
            if next(iter(sides.values())).shape and OURS in sides and set(MAIN) & set(sides)
        }

    def speedup(self, other: Entry) -> float | None:
        """How many times our time another side takes, ours in its own rounds if it was taken; None without ours."""
        ours = self.cases[other.name, other.work].get(OURS)
        if other.times_ours is not None:
            return other.times_ours
        return other.seconds / ours.seconds if ours else None
