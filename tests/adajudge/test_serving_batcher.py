"""The queue in front of the engine: order, turns, limits, ends."""

import threading
import time

import pytest
from adajudge.data import EncodedRow
from adajudge.scoring import Score, ScoringError
from adajudge.serving.batcher import Batcher, EngineError
from adajudge.serving.metrics import Metrics

from tests.adajudge.servers import wait_until


def sequence(number, tokens=10):
    return EncodedRow([number] * tokens, 1)


class Engine:
    """Gives every sequence its number as a reward; waits where it is told to."""

    def __init__(self):
        self.batches = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.broken = set()

    def score_encoded(self, rows):
        self.batches.append([row.input_ids[0] for row in rows])
        assert self.may_go_on.wait(10)
        if self.broken & {row.input_ids[0] for row in rows}:
            raise RuntimeError("no")
        zero = (0.0, 0.0, 0.0)
        return [Score(float(row.input_ids[0]), zero, zero, (1.0,), 1, 9, False, 0.0, False) for row in rows]


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def batcher(engine):
    """Of a hundred tokens a batch, ten sequences."""
    batcher = Batcher(engine, lambda: 100, 0.0, Metrics())
    batcher.start()
    yield batcher
    engine.may_go_on.set()
    batcher.stop()


def hold(engine, batcher):
    """Let a first sequence occupy the engine, so that what follows waits."""
    engine.may_go_on.clear()
    first = batcher.submit("first", [sequence(0)])
    wait_until(lambda: engine.batches)
    return first


def rewards(future):
    return [score.reward for score in future.result(10)]


def test_scores_come_in_the_order_of_their_sequences(batcher):
    futures = [batcher.submit(i, [sequence(100 * i + j) for j in range(25)]) for i in range(4)]
    for i, future in enumerate(futures):
        assert rewards(future) == [100.0 * i + j for j in range(25)]
    assert (batcher.rows_waiting, batcher.tokens_waiting) == (0, 0)


def test_a_small_request_does_not_wait_for_a_large_one(batcher, engine):
    hold(engine, batcher)
    large = batcher.submit("large", [sequence(i) for i in range(1000, 1100)])
    small = batcher.submit("small", [sequence(1)])
    engine.may_go_on.set()
    assert rewards(small) == [1.0]
    assert len(rewards(large)) == 100
    assert 1 in engine.batches[1]
    assert max(map(len, engine.batches)) == 10


def test_a_sequence_longer_than_a_batch_is_scored(batcher):
    assert rewards(batcher.submit("a", [sequence(7, tokens=500)])) == [7.0]


def test_what_is_dropped_is_not_scored(batcher, engine):
    hold(engine, batcher)
    dropped, kept = (batcher.submit(name, [sequence(n)]) for n, name in ((1, "a"), (2, "b")))
    batcher.drop("a")
    batcher.drop("nobody")
    engine.may_go_on.set()
    assert rewards(kept) == [2.0]
    assert dropped.cancelled()
    assert engine.batches == [[0], [2]]


def test_dropping_all_that_waits_ends_no_thread(engine):
    batcher = Batcher(engine, lambda: 100, 0.2, Metrics())
    batcher.start()
    batcher.submit("a", [sequence(1)])
    batcher.drop("a")
    assert rewards(batcher.submit("b", [sequence(2)])) == [2.0]
    batcher.stop()


def test_a_failing_engine_fails_the_sequences_that_make_it_fail(batcher, engine):
    engine.broken = {3, 17}
    results = batcher.submit("a", [sequence(i) for i in range(20)]).result(10)
    assert [i for i, result in enumerate(results) if isinstance(result, EngineError)] == [3, 17]
    assert all(isinstance(result, Score) for i, result in enumerate(results) if i not in (3, 17))
    assert not batcher.failing
    engine.broken = {5}
    (result,) = batcher.submit("a", [sequence(5)]).result(10)
    assert isinstance(result, ScoringError)
    assert not batcher.failing  # it still scores what it has scored before
    engine.broken = set(range(20))
    batcher.submit("a", [sequence(5)]).result(10)
    wait_until(lambda: batcher.failing)
    engine.broken = set()
    assert rewards(batcher.submit("a", [sequence(5)])) == [5.0]
    assert not batcher.failing


@pytest.mark.parametrize("has_scored", [True, False])
def test_a_dead_engine_is_given_up_and_logged_once(engine, caplog, has_scored):
    batcher = Batcher(engine, lambda: 10_000, 0.0, Metrics())
    batcher.start()
    if has_scored:
        assert rewards(batcher.submit("a", [sequence(0)])) == [0.0]
    engine.broken = set(range(2000))
    engine.batches.clear()
    results = batcher.submit("a", [sequence(i) for i in range(1000)]).result(10)
    assert {type(result) for result in results} == {EngineError}
    assert batcher.failing
    assert len(engine.batches) < 30
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert len(caplog.records) == 2  # and that it is given up
    caplog.clear()
    batcher.submit("a", [sequence(i) for i in range(1000)]).result(10)
    assert not caplog.records
    engine.broken = {7}  # it works again, but for one sequence
    results = batcher.submit("a", [sequence(i) for i in range(100)]).result(10)
    assert [i for i, result in enumerate(results) if isinstance(result, EngineError)] == [7]
    assert not batcher.failing
    batcher.stop()


def test_sequences_wait_a_moment_for_others(engine):
    batcher = Batcher(engine, lambda: 30, 10.0, Metrics())
    batcher.start()
    futures = []
    for i in range(3):  # the third fills the batch
        futures.append(batcher.submit(i, [sequence(i)]))
        time.sleep(0.02)
    assert [rewards(future) for future in futures] == [[0.0], [1.0], [2.0]]
    assert engine.batches == [[0, 1, 2]]
    batcher.stop()


def test_stopping_drops_what_waits_and_ends_the_thread(engine):
    batcher = Batcher(engine, lambda: 100, 0.0, Metrics())
    batcher.start()
    first = hold(engine, batcher)
    waiting = batcher.submit("b", [sequence(1)])
    threading.Timer(0.1, engine.may_go_on.set).start()
    batcher.stop()
    assert rewards(first) == [0.0]
    assert waiting.cancelled()
    assert batcher.submit("c", [sequence(2)]).cancelled()
    assert "adajudge-score" not in {thread.name for thread in threading.enumerate()}


def test_an_engine_that_hangs_is_not_waited_for(engine):
    batcher = Batcher(engine, lambda: 100, 0.0, Metrics())
    batcher.start()
    hold(engine, batcher)
    assert batcher.stop(patience=0.05) is False
    engine.may_go_on.set()
    assert batcher.stop() is True


def test_nothing_is_answered_at_once(batcher):
    assert batcher.submit("a", []).result(0) == []


def test_what_was_cut_is_counted(engine):
    metrics = Metrics()
    batcher = Batcher(engine, lambda: 100, 0.0, metrics)
    batcher.start()
    batcher.submit("one", [sequence(1), EncodedRow([2] * 10, 1, prompt_tokens_cut=3)]).result(10)
    batcher.stop()
    assert metrics.registry.get_sample_value("adajudge_truncated_rows_total") == 1.0
