"""Where commands write: looked at before an hour of scoring, not after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def check_targets(targets: Mapping[str, str | None], inputs: Sequence[str]) -> None:
    """That each option's file can be written and is neither an input nor another option's file.

    Raises:
        ValueError: it cannot, or is; the option is named.
    """
    taken = {os.path.realpath(name): f"the input {name}" for name in inputs if os.path.exists(name)}
    for option, target in targets.items():
        if target is None:
            continue
        folder = Path(target).absolute().parent
        if not folder.is_dir() or os.path.isdir(target):
            raise ValueError(f"--{option} {target}: expected a file in a folder that exists")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--{option} {target}: the folder {folder} cannot be written to")
        place = os.path.realpath(target)
        if place in taken:
            raise ValueError(f"--{option} {target}: {taken[place]} would be overwritten; name another file")
        taken[place] = f"--{option}"


def check_extension(option: str, target: str, extensions: Sequence[str]) -> None:
    """That the file's name ends in one of the extensions.

    Raises:
        ValueError: it does not.
    """
    if not target.lower().endswith(tuple(extensions)):
        raise ValueError(f"--{option} {target}: unknown extension; expected one of {', '.join(extensions)}")


def check_picture(target: str) -> None:
    """That matplotlib can draw a file of that name.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it cannot.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    check_extension("plot", target, [f".{kind}" for kind in known])
