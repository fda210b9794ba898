"""How an option of any command is spelt and read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


class UsageError(Exception):
    """An option, or what it names, cannot be used; the message says which and why."""


def add_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, **options: Any) -> None:
    """An option ``--some_name``, also spelt ``--some-name``."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)


def boolean(text: str) -> bool:
    """A converter of a switch that may be given a value."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"true or false; {text!r} came")
    return values[text.lower()]


def number(
    kind: Callable[[str], Any], least: float, most: float = math.inf, open_end: bool = False
) -> Callable[[str], Any]:
    """A converter that refuses what lies outside a range; with `open_end` the least value too."""

    def convert(text: str) -> Any:
        expected = f"a number {'above' if open_end else 'of at least'} {least:g}"
        expected += "" if most == math.inf else f" and at most {most:g}"
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{expected}; {text!r} came") from None
        if not least <= value <= most or (open_end and value == least) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{expected}; {text} came")
        return value

    return convert
