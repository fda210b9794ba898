"""The built-in judge: its generated world, how it is trained from nothing, and the trained judge itself."""

from pathlib import Path

BUILT_IN_JUDGE = Path(__file__).parent / "judge"

__all__ = ["BUILT_IN_JUDGE"]
