"""From token ids to scores: packs, the judge, and one copy back from the device."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from adajudge.data import EncodedRow
from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.scoring.packing import Pack
from adajudge.scoring.reading import Reading, Way, attention_of
from adajudge.scoring.results import Score, ScoringError

logger = logging.getLogger(__name__)

_BUDGETS = {"cpu": 2048}
_BUDGET = 32768  # of an accelerator
_LEAST_SHARE = 64  # of the budget asked for, that is kept whatever happens


class Engine:
    """Scores encoded sequences, as many at a time as a budget of tokens allows.

    Where the device has no room for a pack, the pack is divided; the budget is halved, for good, if the pack had filled more
    than half of it. What is scored together depends on the sequences of a call and on the budget alone.

    Args:
        model: the judge, on its device.
        token_budget: tokens of a pack; default 2,048 on the CPU, else 32,768. A longer sequence is a pack of its own.
        compile_backbone: put the backbone under torch.compile, in place, for packs of any size. Takes a minute or more at
            the first packs.

    Attributes:
        asked_budget: the budget at first.
        token_budget: the budget now, at least a 64th of that.
        tokens_scored: tokens of all sequences scored so far, a shared prompt counted for each of its responses.
        tokens_read: those that the judge had to read for it.

    Raises:
        ValueError: `token_budget` is below 1.
    """

    def __init__(
        self,
        model: AdaJudgeForSequenceClassification,
        token_budget: int | None = None,
        *,
        compile_backbone: bool = False,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"token_budget: {token_budget} came, expected at least 1")
        self.model = model.eval()
        if compile_backbone:
            model.backbone.compile(dynamic=True)
        self.asked_budget = self.token_budget = token_budget or _BUDGETS.get(self.device.type, _BUDGET)
        self.tokens_scored = 0
        self.tokens_read = 0
        self._one_at_a_time = threading.Lock()
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        """Where the judge is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def score(self, rows: Sequence[EncodedRow]) -> list[Score | ScoringError]:
        """One result per sequence, in their order; equal ones are scored once. Calls of several threads take turns."""
        keys = [(row.prompt_length, tuple(row.input_ids)) for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        with self._one_at_a_time:
            numbers = dict(zip(distinct, self._score_distinct([*distinct.values()]), strict=True))
            self.tokens_scored += sum(map(len, rows))
        return [_result_of(row, numbers[key]) for row, key in zip(rows, keys, strict=True)]

    def _score_distinct(self, rows: Sequence[EncodedRow]) -> list[list[float] | ScoringError]:
        """The numbers of each sequence; all have other tokens."""
        waiting: deque[tuple[Way, Pack]] = deque()
        for way, chosen in Reading(self.model).divide(rows):
            waiting.extend((way, pack) for pack in way.pack(rows, chosen, self.token_budget))
        order: list[int] = []
        columns: list[Tensor] = []
        kept: list[Any] = []  # what was copied on a stream of its own lives until all is computed
        results: list[list[float] | ScoringError] = [ScoringError("not scored")] * len(rows)
        while waiting:
            way, pack = waiting.popleft()
            if pack.tokens > self.token_budget and len(pack.sequences) > 1:  # it was halved meanwhile
                _put_back(waiting, way, way.pack(rows, pack.sequences, self.token_budget))
                continue
            numbers = self._read(way, [rows[i] for i in pack.sequences], pack, kept)
            if numbers is not None:
                order += pack.sequences
                columns.append(numbers)
            elif len(pack.sequences) > 1:
                self._no_room_for(pack)
                _put_back(waiting, way, way.pack(rows, pack.sequences, pack.tokens // 2))
            else:
                (index,) = pack.sequences
                reason = f"the device has no room for its {len(rows[index])} tokens"
                results[index] = ScoringError(reason)
        table = torch.cat(columns).tolist() if columns else []  # here is waited for the device
        for index, numbers_of_one in zip(order, table, strict=True):
            results[index] = numbers_of_one
        return results

    def _no_room_for(self, pack: Pack) -> None:
        """A pack that is small beside the budget says nothing about the budget."""
        if pack.tokens > self.token_budget // 2:
            self.token_budget = max(1, self.asked_budget // _LEAST_SHARE, self.token_budget // 2)
        logger.warning(
            "no room for %d tokens at once; token_budget is now %d", pack.tokens, self.token_budget
        )

    def _copying(self) -> AbstractContextManager[Any]:
        """Copies to a GPU wait for what their stream does: on one of their own they do not wait for the pack before."""
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    def _read(self, way: Way, rows: list[EncodedRow], pack: Pack, kept: list[Any]) -> Tensor | None:
        """Reward, view scores, view weights and depth weights ``[B, 7 + K]``; None: the device has no room."""
        try:
            with self._copying():
                inputs = way.inputs(rows, pack, self.device)
            kept.append(inputs)
            with attention_of(self.model, way.attention):
                out = self.model(**inputs)
            numbers = [out.logits, out.view_scores, out.view_weights, out.depth_weights]
            table = torch.cat([x.float() for x in numbers], dim=1)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        else:
            self.tokens_read += pack.tokens
            return table
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # behind the except block, which keeps the failed pass's tensors alive
        return None


def _put_back(waiting: deque[tuple[Way, Pack]], way: Way, packs: list[Pack]) -> None:
    waiting.extendleft((way, pack) for pack in reversed(packs))


def _is_out_of_memory(error: Exception) -> bool:
    """torch and Python have a class for it; the CPU's allocator, cuBLAS and Triton only say it."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in texts
    )


def _result_of(row: EncodedRow, numbers: list[float] | ScoringError) -> Score | ScoringError:
    if isinstance(numbers, ScoringError):
        return numbers
    reward, score_last, score_mean, score_attention, last, mean, attention, *depths = numbers
    if not all(math.isfinite(x) for x in numbers):
        return ScoringError(f"the judge's reward is not finite: {reward}")
    return Score(
        reward=reward,
        view_scores=(score_last, score_mean, score_attention),
        view_weights=(last, mean, attention),
        depth_weights=tuple(depths),
        prompt_tokens=row.prompt_length,
        response_tokens=row.response_length,
        truncated=row.truncated,
        unknown_share=row.unknown_share,
        holds_control_tokens=row.holds_control_tokens,
    )
