"""What a benchmark asks of the sizes is there: a run on the device would show it only after minutes."""

import dataclasses
import re
from pathlib import Path

from benchmarks import sizes

FIELDS = {field.name for field in dataclasses.fields(sizes.Sizes)}


def test_every_size_that_a_benchmark_asks_for_is_a_field():
    asked = {
        (path.name, name)
        for path in Path(sizes.__file__).parent.glob("*.py")
        for name in re.findall(r"\bchosen\.(\w+)", path.read_text())
    }
    assert len(asked) > 10
    assert {(path, name) for path, name in asked if name not in FIELDS} == set()
