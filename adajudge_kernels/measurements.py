"""Where what was measured on a GPU is kept, for later processes."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch

logger = logging.getLogger("adajudge_kernels")

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


def measured_names(kind: str, known: Collection[str]) -> dict[str, str]:
    """What is the fastest for each of the file's keys, some of the `known` names; empty where nothing was measured.

    A file that holds something else is not used, and a warning says so.
    """
    path = measured_file(kind)
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        named = isinstance(found, dict) and set(found.values()) <= set(known)
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is not used: %s", path, error)
        return {}
    if not named:
        logger.warning("%s is not used: expected names of %s", path, ", ".join(known))
        return {}
    return dict(found)
