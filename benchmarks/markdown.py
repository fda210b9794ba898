"""Figures and tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

SECONDS = ((1.0, 1, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "us"))  # from so many on, per second, unit


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without the columns that are empty in every row; nothing without rows."""
    if not rows:
        return ""
    used = [index for index in range(len(header)) if any(row[index] for row in rows)]
    lines = [[row[index] for index in used] for row in (header, ["---"] * len(header), *rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def time(seconds: float) -> str:
    """Three digits and a unit."""
    scale, unit = next((scale, unit) for least, scale, unit in SECONDS if seconds >= least)
    return f"{digits(seconds * scale)} {unit}"


def digits(number: float) -> str:
    """At least three significant digits, whole above 100, thousands apart."""
    decimals = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:,.{decimals}f}".replace(",", " ")


def times(ratio: float | None) -> str:
    """A ratio, or nothing."""
    return "" if ratio is None else f"{ratio:.2f}x"


def share(part: float | None) -> str:
    """In percent, or nothing."""
    return "" if part is None else f"{100 * part:.0f} %"


def megabytes(amount: int | None) -> str:
    """Bytes as MB (10^6), or nothing."""
    return "" if amount is None else digits(amount / 1e6)


def thousands(amount: float | None) -> str:
    """A count, or nothing."""
    return "" if amount is None else f"{amount:,.0f}".replace(",", " ")
