"""AdaJudge reward models around any transformers backbone: train, score, explain.

Names are imported when they are first used, so that ``import adajudge`` and ``adajudge --help`` stay quick.
Using `AdaJudgeForSequenceClassification` registers the judge with transformers' ``AutoConfig`` and
``AutoModelForSequenceClassification``; before that, or an ``import adajudge.modeling``, they do not know it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adajudge.configuration import AdaJudgeConfig
    from adajudge.modeling import AdaJudgeForSequenceClassification, AdaJudgeOutput
    from adajudge.scoring import Score, ScoredRow, Scorer
    from adajudge_kernels._version import __version__

_HOMES = {
    "AdaJudgeConfig": "adajudge.configuration",
    "AdaJudgeForSequenceClassification": "adajudge.modeling",
    "AdaJudgeOutput": "adajudge.modeling",
    "Score": "adajudge.scoring",
    "ScoredRow": "adajudge.scoring",
    "Scorer": "adajudge.scoring",
    "__version__": "adajudge_kernels._version",
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
    return getattr(importlib.import_module(_HOMES[name]), name)
