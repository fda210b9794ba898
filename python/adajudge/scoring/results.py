"""What the judge says of a response, and of a row with all its responses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from adajudge.data import Row


@dataclass(frozen=True, slots=True)
class Score:
    """What the judge says of one response."""

    reward: float
    view_scores: tuple[float, float, float]  # last, mean, attention
    view_weights: tuple[float, float, float]
    depth_weights: tuple[float, ...]
    prompt_tokens: int
    response_tokens: int
    truncated: bool
    unknown_share: float
    holds_control_tokens: bool  # in the text itself: it may pretend to turns that nobody took


class ScoringError(ValueError):
    """One response cannot be scored, and why: its reward is not finite, or the device has no room for it."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row with the score of each of its responses."""

    row: Row
    scores: tuple[Score, ...]

    @property
    def margin(self) -> float:
        """Reward of the first response less the best of the others (of a pair: chosen less rejected)."""
        if len(self.scores) < 2:
            raise ValueError(f"row {self.row.id!r} has one response; a margin needs two")
        return self.scores[0].reward - max(score.reward for score in self.scores[1:])

    @property
    def ranking(self) -> list[int]:
        """Indices of the responses, best first; equal rewards keep their order."""
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i].reward)

    @property
    def winner(self) -> str | int:
        """Of a pair the side with the higher reward, or a tie; else the index of the best response."""
        if self.row.kind != "pair":
            return self.ranking[0]
        return "chosen" if self.margin > 0 else "rejected" if self.margin < 0 else "tie"

    def to_record(self) -> dict[str, Any]:
        """The output record: flat for one response, by side for a pair, a list for candidates."""
        first = self.scores[0]
        if self.row.kind == "single":
            return {"id": self.row.id, **_fields(first)}
        if self.row.kind == "pair":
            sides = {"chosen": _fields(first), "rejected": _fields(self.scores[1])}
            return {"id": self.row.id, "margin": self.margin, "winner": self.winner, **sides}
        candidates = [_fields(score) for score in self.scores]
        return {"id": self.row.id, "winner": self.winner, "ranking": self.ranking, "candidates": candidates}


def _fields(score: Score) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(score).items()}


def record_schema(kinds: Collection[str]) -> Any:
    """The pyarrow schema of `ScoredRow.to_record`'s records, for rows of these kinds.

    Where pairs and candidates come together, the winner of both is text.
    """
    import pyarrow

    types = {float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    hints = get_type_hints(Score)
    score = [(name, types.get(hint, pyarrow.list_(pyarrow.float64()))) for name, hint in hints.items()]
    columns = [("id", pyarrow.string())]
    if "single" in kinds:
        columns += score
    if "pair" in kinds:
        columns.append(("margin", pyarrow.float64()))
    if "pair" in kinds or "candidates" in kinds:
        columns.append(("winner", pyarrow.string() if "pair" in kinds else pyarrow.int64()))
    if "pair" in kinds:
        columns += [(side, pyarrow.struct(score)) for side in ("chosen", "rejected")]
    if "candidates" in kinds:
        columns += [
            ("ranking", pyarrow.list_(pyarrow.int64())),
            ("candidates", pyarrow.list_(pyarrow.struct(score))),
        ]
    return pyarrow.schema(columns)
