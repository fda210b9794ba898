"""Where what was measured on a GPU is kept, for later processes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

FOLDER_VARIABLE = "ADAJUDGE_CACHE"


def measured_file(kind: str) -> Path | None:
    """The file of one kind of measurement on this process's GPU (all its GPUs are taken to be alike); None without one."""
    if not torch.cuda.is_available():
        return None
    name = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(0)).strip("-")
    folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adajudge_kernels"
    )
    return Path(folder) / f"{kind}-{name}.json"
