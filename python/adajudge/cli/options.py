"""How an option of any command is spelt."""

from __future__ import annotations

import argparse
from typing import Any


def add_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, **options: Any) -> None:
    """An option ``--some_name``, also spelt ``--some-name``."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)
