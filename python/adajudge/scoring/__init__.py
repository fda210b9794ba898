"""Scoring: rows in, rewards out, in the order of the input.

    encode (threads)  ->  pack (equal prompts once, a budget of tokens)  ->  judge  ->  results, in order

`Scorer` is the whole way from rows to results. `Engine` is its second half, from token ids to scores; `packing` decides which
sequences are read together; `results` is what comes out. `ScoringJob` scores a file that is too long to begin twice.
"""

from adajudge.builtin import BUILT_IN_JUDGE

from .engine import Engine
from .jobs import JobError, ScoringJob
from .results import Score, ScoredRow, ScoringError
from .scorer import Scorer

__all__ = [
    "BUILT_IN_JUDGE",
    "Engine",
    "JobError",
    "Score",
    "ScoredRow",
    "Scorer",
    "ScoringError",
    "ScoringJob",
]
