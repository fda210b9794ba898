"""AdaJudge reward models around any transformers backbone: train, score, explain.

Names are imported when they are first used, so that ``import adajudge`` and ``adajudge --help`` stay quick.
Using `AdaJudgeConfig` or `AdaJudgeForSequenceClassification` registers both with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adajudge_kernels._version import __version__

if TYPE_CHECKING:
    from adajudge.configuration import AdaJudgeConfig
    from adajudge.modeling import AdaJudgeForSequenceClassification, AdaJudgeOutput
    from adajudge.scoring import Score, ScoredRow, Scorer

_HOMES = {
    "AdaJudgeConfig": "configuration",
    "AdaJudgeForSequenceClassification": "modeling",
    "AdaJudgeOutput": "modeling",
    "Score": "scoring",
    "ScoredRow": "scoring",
    "Scorer": "scoring",
}

__all__ = [
    "AdaJudgeConfig",
    "AdaJudgeForSequenceClassification",
    "AdaJudgeOutput",
    "Score",
    "ScoredRow",
    "Scorer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adajudge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adajudge.{_HOMES[name]}"), name)
