"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

from benchmarks.report import table

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_blocks():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_block_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})


def test_the_measured_table_is_what_the_report_prints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table(ROOT / "benchmarks" / "results" / "cpu.json") in readme
