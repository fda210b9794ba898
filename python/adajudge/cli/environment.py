"""Print what is installed, what was found, and which backend is chosen and why."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the report of `adajudge_kernels.env`."""
    from adajudge_kernels import env

    return env.main()
