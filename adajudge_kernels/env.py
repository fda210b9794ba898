"""``python -m adajudge_kernels.env``: what is installed, what was found, which backend is chosen and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

from adajudge_kernels import compiled
from adajudge_kernels._version import __version__
from adajudge_kernels.backends import (
    BACKEND_VARIABLE,
    BACKENDS,
    FAMILIES,
    choose_backend,
    unavailable_reason,
)
from adajudge_kernels.refinement import libraries

_PACKAGES = ("triton", "transformers", "safetensors", "peft", "accelerate", "flash-attn")


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """The report as sections of (name, value) lines."""
    return [
        ("software", _software()),
        ("devices", _devices()),
        ("backends", [(name, unavailable_reason(name) or "available") for name in BACKENDS]),
        ("choice", _choices()),
        ("attention inside packed sequences", _attention()),
    ]


def _software() -> list[tuple[str, str]]:
    lines = [
        ("adajudge-kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    for package in _PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    return [*lines, ("nvcc", shutil.which("nvcc") or "not found")]


def _devices() -> list[tuple[str, str]]:
    lines = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if compiled.module is not None and not compiled.module.emulated:
        named = os.environ.get(compiled.SIMD_VARIABLE)
        why = f"{compiled.SIMD_VARIABLE}={named}" if named else "the best here"
        lines.append(
            ("instruction set", f"{compiled.module.level()} of {', '.join(compiled.module.levels())}: {why}")
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        lines.append((f"cuda:{index}", f"{properties.name}, {capability}, {memory:.0f} GiB"))
    return lines


def _choices() -> list[tuple[str, str]]:
    named = os.environ.get(BACKEND_VARIABLE)
    lines = [(BACKEND_VARIABLE, named or "not set")]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for family in FAMILIES:
            try:
                choice = choose_backend(torch.device(device), family)
                lines.append((f"{family} on {device}", f"{choice.backend}: {choice.reason}"))
            except ValueError as error:
                lines.append((f"{family} on {device}", f"calls raise: {error}"))
    return lines


def _attention() -> list[tuple[str, str]]:
    """Whose attention there is; a library serves packed sequences on a GPU where it is forced, or was measured to be faster."""
    names = (libraries.OWN, *libraries.LIBRARIES)
    lines = [(name, libraries.unavailable_reason(name) or "available") for name in names]
    named = os.environ.get(libraries.ATTENTION_VARIABLE)
    lines.append((libraries.ATTENTION_VARIABLE, named or "not set"))
    if named:
        reason = libraries.unavailable_reason(named)
        lines.append(("chosen", named if reason is None else f"calls raise: {reason}"))
        return lines
    measured = libraries.measured_attention()
    chosen = ", ".join(f"{what}: {name}" for what, name in measured.items()) or "nothing measured"
    return [*lines, ("chosen", f"{libraries.OWN} unless measured to be slower ({chosen})")]


def main() -> int:
    """Print the report; exit code 1 if a forced backend cannot be used."""
    sections = report()
    width = max(len(name) for _, lines in sections for name, _ in lines)
    for title, lines in sections:
        print(title)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}")
    return int(any(value.startswith("calls raise") for _, lines in sections for _, value in lines))


if __name__ == "__main__":
    sys.exit(main())
