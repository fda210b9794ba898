"""Ray Data gives what one process gives. Ray is large: `make test-ray` installs it and runs this."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from adajudge import Scorer
from adajudge.data import RowError, read_rows
from adajudge.scoring.ray_data import COLUMNS, RewardActor

ROOT = Path(__file__).parents[2]
PAIRS = [row for row in read_rows(ROOT / "examples/pairs.jsonl") if not isinstance(row, RowError)]


def record(number):
    """Pairs; some without the field that the others have, some with words that the judge does not know."""
    row = PAIRS[number % len(PAIRS)]
    made = {
        "id": f"row-{number}",
        "prompt": row.prompt[0].content,
        "chosen": row.chosen,
        "rejected": row.rejected,
    }
    if number % 7 == 3:
        made["rejected"] = None
    if number % 11 == 5:
        made["prompt"] = "Wherefore art thou, Romeo?"
    return made


RECORDS = [record(number) for number in range(60)]


@pytest.fixture(scope="module")
def expected():
    """Of one process."""
    return list(Scorer.from_pretrained().score(RECORDS))


def check(rows, expected):
    """The rows in the order of `expected`, to the columns that came and to those that were added."""
    assert [{key: row[key] for key in RECORDS[0]} for row in rows] == RECORDS
    failed = 0
    for row, result in zip(rows, expected, strict=True):
        if isinstance(result, RowError):
            assert row["error"] == {"field": result.field, "reason": result.reason}
            assert [row[name] for name in COLUMNS.names[:-1]] == [None] * (len(COLUMNS) - 1)
            failed += 1
            continue
        assert row["error"] is None
        assert row["rewards"] == pytest.approx([score.reward for score in result.scores], abs=1e-6)
        assert row["reward"] == row["rewards"][0]
        for name in ("view_scores", "view_weights", "depth_weights"):
            for got, score in zip(row[name], result.scores, strict=True):
                assert got == pytest.approx(getattr(score, name), abs=1e-6)
        assert row["truncated"] == [score.truncated for score in result.scores]
    assert 10 < failed < 30


def test_an_actor_keeps_every_row_and_says_what_is_wrong(expected):
    actor = RewardActor(device="cpu")
    parts = [actor(pyarrow.Table.from_pylist(RECORDS[i : i + 32])) for i in (0, 32)]
    check(pyarrow.concat_tables(parts).to_pylist(), expected)


def test_an_actor_refuses_what_it_would_overwrite_or_cannot_read():
    actor = RewardActor(device="cpu")
    with pytest.raises(ValueError, match="columns reward, error already"):
        actor(pyarrow.Table.from_pylist([{**RECORDS[0], "reward": 1.0, "error": ""}]))
    with pytest.raises(TypeError, match=r"batch: a dict came, expected a pyarrow\.Table"):
        actor({"prompt": ["a"]})


def test_ray_gives_what_one_process_gives(expected, tmp_path):
    """The example, with two actors on several files and small batches: it is a process of its own, and ends its own Ray."""
    pytest.importorskip("ray", reason="needs the extra ray: make test-ray")
    (tmp_path / "rows").mkdir()
    for part in range(3):
        table = pyarrow.Table.from_pylist(RECORDS[20 * part : 20 * part + 20])
        pyarrow.parquet.write_table(table, tmp_path / f"rows/{part}.parquet")
    command = [
        sys.executable,
        ROOT / "examples/ray_score.py",
        "rows",
        "scores",
        "--actors",
        "2",
        "--cpus",
        "0.5",
    ]
    command += ["--batch_size", "8"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    env = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "scores").to_pylist()
    check(sorted(rows, key=lambda row: int(row["id"].removeprefix("row-"))), expected)
