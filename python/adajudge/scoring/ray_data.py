"""The scorer as an actor of Ray Data: a data set in, the same rows with rewards out.

Needs the extra ``ray`` (``pip install 'adajudge-kernels[ray]'``); `RewardActor` itself needs pyarrow only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from adajudge.data import RowError
from adajudge.scoring.scorer import Result, Scorer

if TYPE_CHECKING:
    from ray.data import Dataset

_NUMBERS = pyarrow.list_(pyarrow.float64())
# What is added. Lists have one entry per response, in the order of the row: chosen, rejected; or as they came.
COLUMNS = pyarrow.schema(
    [
        ("reward", pyarrow.float64()),
        ("rewards", _NUMBERS),
        ("view_scores", pyarrow.list_(_NUMBERS)),
        ("view_weights", pyarrow.list_(_NUMBERS)),
        ("depth_weights", pyarrow.list_(_NUMBERS)),
        ("truncated", pyarrow.list_(pyarrow.bool_())),
        ("error", pyarrow.struct([("field", pyarrow.string()), ("reason", pyarrow.string())])),
    ]
)


class RewardActor:
    """A callable class for ``Dataset.map_batches(.., batch_format="pyarrow")``; each actor loads the judge once.

    ``reward`` is that of the row's first response (of a pair the chosen one), ``rewards`` has all of them. A row that cannot
    be scored keeps its place: its rewards are null, and ``error`` has the field at fault and the reason.

    Args:
        model: folder of a saved judge, which every machine can read; None is the built-in judge.
        options: as of `Scorer.from_pretrained`.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.scorer = Scorer.from_pretrained(model, **options)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """The batch with the columns of `COLUMNS`, its rows in their order.

        Raises:
            TypeError: the batch is no pyarrow table.
            ValueError: it has a column of such a name already.
        """
        if not isinstance(batch, pyarrow.Table):
            raise TypeError(
                f"batch: a {type(batch).__name__} came, expected a pyarrow.Table (batch_format='pyarrow')"
            )
        taken = [name for name in COLUMNS.names if name in batch.column_names]
        if taken:
            raise ValueError(f"the data have columns {', '.join(taken)} already; rename or drop them first")
        records = [_columns(result) for result in self.scorer.score(batch.to_pylist())]
        scored = pyarrow.Table.from_pylist(records, schema=COLUMNS)
        for name in COLUMNS.names:
            batch = batch.append_column(COLUMNS.field(name), scored[name])
        return batch


def score_dataset(
    dataset: Dataset,
    model: str | Path | None = None,
    *,
    actors: int = 1,
    batch_size: int = 1024,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """The data set with the columns of `COLUMNS`, scored by actors as it is read; nothing is held as a whole.

    Ray may hand the rows on in another order (unless its ``preserve_order`` is set): give them ids. What a row scores
    depends, in the last bits, on the batch it comes in, see `Scorer.score_windows`.

    Args:
        dataset: rows in any format that `adajudge.data.parse_row` reads, one per record.
        model: as of `RewardActor`.
        actors: judges in the cluster.
        batch_size: rows that an actor gets at once; responses of a prompt that come together share it.
        num_cpus: of an actor; Ray's default is 1, and torch uses as many threads.
        num_gpus: of an actor; 1 for a judge on a GPU of its own.
        options: as of `Scorer.from_pretrained`.
    """
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        RewardActor,
        fn_constructor_kwargs={"model": None if model is None else str(model), **options},
        compute=ActorPoolStrategy(size=actors),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        udf_modifying_row_count=False,
    )


def _columns(result: Result) -> dict[str, Any]:
    if isinstance(result, RowError):
        return {"error": {"field": result.field, "reason": result.reason}}
    scores = result.scores
    return {
        "reward": scores[0].reward,
        "rewards": [score.reward for score in scores],
        "view_scores": [score.view_scores for score in scores],
        "view_weights": [score.view_weights for score in scores],
        "depth_weights": [score.depth_weights for score in scores],
        "truncated": [score.truncated for score in scores],
    }
