"""The queue in front of the engine: sequences of many clients, scored together by one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from adajudge.data import EncodedRow
from adajudge.scoring.results import Score, ScoringError
from adajudge.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_SHARES = 8  # requests that a batch has room for when all of them have much to be scored
_UNPROVEN = 8  # sequences that an engine which never scored one may fail on before it is given up
_RECENT = 0.2  # weight of the latest batch in the rate


class EngineError(ScoringError):
    """The engine failed on a sequence in a way that no sequence should make it fail."""


class Scoring(Protocol):
    """What the batcher needs of a scorer."""

    def score_encoded(self, rows: Sequence[EncodedRow]) -> list[Score | ScoringError]:
        """One result per sequence."""


class _Part:
    """Sequences that were submitted together; their scores may come in several batches."""

    __slots__ = ("future", "remaining", "results", "rows")

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows
        self.results: list[Score | ScoringError] = [ScoringError("not scored")] * len(rows)
        self.remaining = len(rows)
        self.future: Future[list[Score | ScoringError]] = Future()


class Batcher:
    """Scores what waits, in batches of about `token_limit()` tokens, in a thread of its own.

    Requests take turns: of one with thousands of sequences a batch holds an eighth as long as others wait.

    Args:
        scorer: what scores the batches.
        token_limit: tokens of a batch; asked before each one, since an engine may halve its budget.
        max_wait: seconds that the first sequence waits for others.
        metrics: what is counted.
    """

    def __init__(
        self, scorer: Scoring, token_limit: Callable[[], int], max_wait: float, metrics: Metrics
    ) -> None:
        self._scorer = scorer
        self._token_limit = token_limit
        self._max_wait = max_wait
        self._metrics = metrics
        self._changed = threading.Condition()
        self._queues: OrderedDict[object, deque[tuple[_Part, int]]] = OrderedDict()
        self._since = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="adajudge-score", daemon=True)
        self.rows_waiting = 0
        self.tokens_waiting = 0
        self.rows_per_second = 0.0
        self.failing = False  # the engine fails on sequences that it has scored before
        self._sound: EncodedRow | None = None  # the latest that was scored

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, patience: float | None = None) -> bool:
        """Drop what waits, and end the thread when its batch is done.

        Returns:
            Whether it has ended, which is waited for as many seconds; ``None``: for as long as it takes.
        """
        with self._changed:
            self._stopping = True
            owners = list(self._queues)
            self._changed.notify()
        for owner in owners:
            self.drop(owner)
        if self._thread.is_alive():
            self._thread.join(patience)
        return not self._thread.is_alive()

    def submit(self, owner: object, rows: Sequence[EncodedRow]) -> Future[list[Score | ScoringError]]:
        """One result per sequence, in the future; sequences of an owner are scored in their order."""
        part = _Part(rows)
        if not rows:
            part.future.set_result([])
            return part.future
        with self._changed:
            if self._stopping:
                part.future.cancel()
                return part.future
            if not self._queues:
                self._since = time.monotonic()
            self._queues.setdefault(owner, deque()).extend((part, i) for i in range(len(rows)))
            self._count(len(rows), sum(len(row) for row in rows))
            self._changed.notify()
        return part.future

    def drop(self, owner: object) -> None:
        """Forget what waits of this owner: its client has gone."""
        with self._changed:
            queue = self._queues.pop(owner, ())
            self._count(-len(queue), -sum(len(part.rows[i]) for part, i in queue))
        for part, _ in queue:
            part.future.cancel()

    def _count(self, rows: int, tokens: int) -> None:
        self.rows_waiting += rows
        self.tokens_waiting += tokens
        self._metrics.waiting.set(self.rows_waiting)

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:  # all of it was dropped while it waited
                continue
            started = time.perf_counter()
            rows = [part.rows[i] for part, i in batch]
            results = self._score(rows)
            seconds = time.perf_counter() - started
            rate = len(batch) / max(seconds, 1e-6)
            self.rows_per_second += (rate - self.rows_per_second) * (_RECENT if self.rows_per_second else 1)
            self._metrics.busy.inc(seconds)
            self._metrics.batch_rows.observe(len(batch))
            scored = [row for row, result in zip(rows, results, strict=True) if isinstance(result, Score)]
            self._metrics.rows.inc(len(scored))
            self._metrics.tokens.inc(sum(len(row) for row in scored))
            self._metrics.truncated.inc(sum(row.truncated for row in scored))
            for (part, i), result in zip(batch, results, strict=True):
                part.results[i] = result
                part.remaining -= 1
                if part.remaining == 0:
                    with suppress(InvalidStateError):  # dropped meanwhile
                        part.future.set_result(part.results)

    def _take(self) -> list[tuple[_Part, int]] | None:
        """The next batch; None when the batcher stops."""
        limit = self._token_limit()
        with self._changed:
            self._changed.wait_for(lambda: self._queues or self._stopping)
            patience = self._since + self._max_wait - time.monotonic()
            self._changed.wait_for(lambda: self.tokens_waiting >= limit or self._stopping, max(0.0, patience))
            if self._stopping:
                return None
            batch: list[tuple[_Part, int]] = []
            tokens = 0
            while self._queues and tokens < limit:
                owner, queue = self._queues.popitem(last=False)
                share = 0
                while queue and tokens < limit and share < max(1, limit // _SHARES):
                    part, i = queue.popleft()
                    batch.append((part, i))
                    tokens += len(part.rows[i])
                    share += len(part.rows[i])
                if queue:
                    self._queues[owner] = queue
            self._count(-len(batch), -tokens)
            return batch

    def _score(self, rows: Sequence[EncodedRow]) -> list[Score | ScoringError]:
        """One result per sequence; where the engine fails the halves are tried, so that one sequence fails alone.

        Where it fails on a sequence that it has scored before, it is the engine: the rest of the batch is not tried.
        """
        results: list[Score | ScoringError] = []
        alone = 0  # sequences that failed by themselves
        waiting = [rows]
        while waiting:
            piece = waiting.pop()
            try:
                scores = self._scorer.score_encoded(piece)
            except Exception as error:
                if len(piece) > 1 and not (self.failing and self._sound):
                    half = len(piece) // 2
                    waiting += [piece[half:], piece[:half]]
                    continue
                alone += 1
                if alone == 1 and not self.failing:  # else the log has it
                    logger.exception("the engine failed on a sequence of %d tokens", len(piece[0]))
                if self._works() if self._sound else alone < _UNPROVEN:
                    if self._sound:
                        self.failing = False
                    if len(piece) > 1:
                        waiting.append(piece)
                    else:
                        results.append(_failed(error))
                    continue
                if not self.failing:
                    logger.error(
                        "the engine fails on what it should score; the rest of its batch is given up"
                    )
                self.failing = True
                results += [_failed(error)] * (len(rows) - len(results))
                break
            results += scores
            for row, score in zip(piece, scores, strict=True):
                if isinstance(score, Score):
                    self._sound, self.failing = row, False
        if alone and self._sound is None:
            self.failing = True
        return results

    def _works(self) -> bool:
        """Whether the engine scores what it has scored before."""
        assert self._sound is not None
        try:
            return isinstance(self._scorer.score_encoded([self._sound])[0], Score)
        except Exception:  # the failure that is being looked into has been logged
            return False


def _failed(error: Exception) -> EngineError:
    return EngineError(f"the engine failed: {type(error).__name__}")
