"""Figures of any number of rewards, in fixed memory."""

import numpy as np
import pytest
from adajudge.data import Message, Row
from adajudge.scoring import Score, ScoredRow
from adajudge.scoring.figures import Distribution
from adajudge.scoring.results import record_schema
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=30), min_size=1, max_size=4), st.floats(0, 1))
def test_a_quantile_is_a_number_of_the_list_but_for_its_last_bits(parts, share):
    distribution = Distribution()
    for part in parts:
        distribution.add(part)
    numbers = sorted(x for part in parts for x in part)
    assert distribution.count == len(numbers)
    if not numbers:
        with pytest.raises(ValueError, match="of no numbers"):
            distribution.quantile(share)
        return
    expected = np.quantile(np.array(numbers), share, method="inverted_cdf")
    assert distribution.quantile(share) == pytest.approx(expected, rel=2**-14, abs=1e-37)
    assert (distribution.quantile(0), distribution.quantile(1)) == (numbers[0], numbers[-1])


@settings(max_examples=40, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.integers(1, 12))
def test_a_histogram_counts_every_number(numbers, bins):
    distribution = Distribution()
    distribution.add(numbers)
    counts, edges = distribution.histogram(bins)
    assert counts.sum() == len(numbers)
    assert (np.diff(edges) > 0).all()


def test_the_quantile_of_zeros_is_zero():
    distribution = Distribution()
    distribution.add([0.0, -0.0, 0.0, 1.0, -1.0])
    assert [distribution.quantile(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [-1, 0, 0, 0, 1]


def test_a_histogram_shows_the_middle_although_one_number_is_far_out():
    distribution = Distribution()
    distribution.add([*np.linspace(0, 10, 1000).tolist(), 1e6])
    counts, edges = distribution.histogram(10)
    assert edges[-1] < 10.1
    assert counts.min() > 90


SCORE = Score(1.0, (1.0, 2.0, 3.0), (0.5, 0.25, 0.25), (1.0,), 3, 4, False, 0.0, False)


@pytest.mark.parametrize(("kind", "count"), [("single", 1), ("pair", 2), ("candidates", 3)])
def test_the_parquet_schema_has_every_field_of_a_record(kind, count):
    """pyarrow would leave out without a word what the schema does not name."""
    import pyarrow

    row = Row("a", 1, kind, (Message("user", "hello"),), ("x",) * count)
    record = ScoredRow(row, (SCORE,) * count).to_record()
    assert pyarrow.Table.from_pylist([record], record_schema([kind])).to_pylist() == [record]
