"""Rows in, rewards out, in the order of the input.

A `Scorer` reads ahead a window of rows, encodes them, sorts their responses by length into batches of at most
`token_budget` padded tokens, and gives the results back in input order. A row that cannot be scored becomes a
`RowError` in its place; its neighbours are not touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adajudge.data import (
    ConversationEncoder,
    EncodedRow,
    EncodingError,
    Message,
    Row,
    RowError,
    load_tokenizer,
    pad_rows,
    parse_row,
)
from adajudge.modeling import AdaJudgeForSequenceClassification

BUILT_IN_JUDGE = Path(__file__).parent / "builtin" / "judge"


@dataclass(frozen=True, slots=True)
class Score:
    """What the judge says of one response."""

    reward: float
    view_scores: tuple[float, float, float]  # last, mean, attention
    view_weights: tuple[float, float, float]
    depth_weights: tuple[float, ...]
    prompt_tokens: int
    response_tokens: int
    truncated: bool
    unknown_share: float
    holds_control_tokens: bool  # in the text itself: it may pretend to turns that nobody took


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row with the score of each of its responses."""

    row: Row
    scores: tuple[Score, ...]

    @property
    def margin(self) -> float:
        """Reward of the first response less the best of the others (of a pair: chosen less rejected)."""
        if len(self.scores) < 2:
            raise ValueError(f"row {self.row.id!r} has one response; a margin needs two")
        return self.scores[0].reward - max(score.reward for score in self.scores[1:])

    @property
    def ranking(self) -> list[int]:
        """Indices of the responses, best first; equal rewards keep their order."""
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i].reward)

    @property
    def winner(self) -> str | int:
        """Of a pair the side with the higher reward, or a tie; else the index of the best response."""
        if self.row.kind != "pair":
            return self.ranking[0]
        return "chosen" if self.margin > 0 else "rejected" if self.margin < 0 else "tie"

    def to_record(self) -> dict[str, Any]:
        """The output record: flat for one response, by side for a pair, a list for candidates."""
        first = self.scores[0]
        if self.row.kind == "single":
            return {"id": self.row.id, **_fields(first)}
        if self.row.kind == "pair":
            sides = {"chosen": _fields(first), "rejected": _fields(self.scores[1])}
            return {"id": self.row.id, "margin": self.margin, "winner": self.winner, **sides}
        candidates = [_fields(score) for score in self.scores]
        return {"id": self.row.id, "winner": self.winner, "ranking": self.ranking, "candidates": candidates}


def _fields(score: Score) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(score).items()}


class Scorer:
    """Scores rows with a judge.

    Args:
        model: the judge, in evaluation mode on its device.
        tokenizer: its tokenizer, with a chat template.
        max_length: longest sequence in tokens; default the backbone's own limit. A longer prompt is cut from
            the left and the score flagged as truncated; a response that does not fit is a `RowError`.
        token_budget: padded tokens of a batch. A single longer sequence is a batch of its own.
        window: rows read ahead. Bounds the memory, and what can be sorted together.
        truncate_response: cut a response that does not fit instead of refusing it (flagged).
        unknown_limit: share of unknown words above which a row is refused; default the judge's own
            (`AdaJudgeConfig.unknown_word_limit`), 1 scores every row.
    """

    def __init__(
        self,
        model: AdaJudgeForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        token_budget: int = 8192,
        window: int = 512,
        truncate_response: bool = False,
        unknown_limit: float | None = None,
    ) -> None:
        for name, value in (("token_budget", token_budget), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: {value} came, expected at least 1")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length: {max_length} came, but the backbone ends at {limit} tokens")
        self.model = model.eval()
        self.encoder = ConversationEncoder(
            tokenizer, limit if max_length is None else max_length, truncate_response=truncate_response
        )
        self.token_budget, self.window = token_budget, window
        self.unknown_limit = model.config.unknown_word_limit if unknown_limit is None else unknown_limit
        self.tokens_scored = 0

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Scorer:
        """Load a judge and its tokenizer from a folder; None is the built-in judge.

        Args:
            path: folder written by `AdaJudgeForSequenceClassification.save_pretrained` or ``adajudge train``; a LoRA
                adapter is merged into the judge it was trained on.
            device: default: CUDA where there is one, else the CPU.
            dtype: of the weights; default fp32 on the CPU, as saved elsewhere.
            attn_implementation: ``"adajudge"`` reads no padding and equal prompts of a batch once; default: transformers'.
            options: as of `Scorer`.
        """
        path = BUILT_IN_JUDGE if path is None else path
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json there; expected a folder with a saved judge")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else None
        if (Path(path) / "adapter_config.json").is_file():
            from adajudge.training import load_judge  # merges the adapter; needs peft

            model = load_judge(path, dtype=dtype, attn_implementation=attn_implementation)
        else:
            model = AdaJudgeForSequenceClassification.from_pretrained(
                str(path), dtype=dtype or "auto", attn_implementation=attn_implementation
            )
        return cls(model.to(device), load_tokenizer(path), **options)

    def score(self, rows: Iterable[Row | RowError | Mapping[str, Any]]) -> Iterator[ScoredRow | RowError]:
        """One result per row, in order; errors among the rows pass through.

        A mapping is read as a record of a file, see `adajudge.data.parse_row`; its line is its place in `rows`.
        """
        if isinstance(rows, (Mapping, str)):
            raise ValueError(f"rows: a {type(rows).__name__} came, expected a list of rows or records")
        iterator = (
            row if isinstance(row, (Row, RowError)) else parse_row(row, line)
            for line, row in enumerate(rows, 1)
        )
        while window := list(itertools.islice(iterator, self.window)):
            yield from self._score_window(window)

    def score_response(self, prompt: str | Sequence[Message], response: str) -> Score:
        """Score one response; a prompt given as text is one user message.

        Raises:
            ValueError: the row cannot be scored; the message names the field and the reason.
        """
        if not isinstance(response, str):
            raise ValueError(f"response: expected a string, got {type(response).__name__}")
        if not isinstance(prompt, Sequence):
            raise ValueError(f"prompt: expected a string or messages, got {type(prompt).__name__}")
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        (result,) = self.score([Row("0", 1, "single", messages, (response,))])
        if isinstance(result, RowError):
            raise ValueError(f"{result.field}: {result.reason}")
        return result.scores[0]

    def _score_window(self, window: list[Row | RowError]) -> Iterator[ScoredRow | RowError]:
        encoded = [self._encode(row) if isinstance(row, Row) else row for row in window]
        flat = [row for item in encoded if isinstance(item, list) for row in item]
        scores = iter(self._score_encoded(flat))
        for row, item in zip(window, encoded, strict=True):
            if isinstance(item, RowError):
                yield item
                continue
            assert isinstance(row, Row)
            own = tuple(itertools.islice(scores, len(item)))
            if all(math.isfinite(score.reward) for score in own):
                yield ScoredRow(row, own)
            else:
                yield row.error("row", f"the judge's reward is not finite: {[s.reward for s in own]}")

    def _encode(self, row: Row) -> list[EncodedRow] | RowError:
        try:
            encoded = [self.encoder.encode(row.prompt, response) for response in row.responses]
        except EncodingError as error:
            return row.error(error.field, str(error))
        unknown = max(item.unknown_share for item in encoded)
        if self.unknown_limit is not None and unknown > self.unknown_limit:
            return row.error("row", f"{unknown:.0%} of its words are unknown to this judge; not scored")
        return encoded

    def _score_encoded(self, rows: list[EncodedRow]) -> list[Score]:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scores: dict[int, Score] = {}
        for batch in _batches(order, [len(row) for row in rows], self.token_budget):
            for index, score in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                scores[index] = score
        return [scores[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _forward(self, rows: list[EncodedRow]) -> list[Score]:
        self.tokens_scored += sum(len(row) for row in rows)
        batch = pad_rows(rows, pad_token_id=0)  # any id: padding is known by its mask alone
        device = next(self.model.parameters()).device
        out = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
        columns = (out.logits[:, 0], out.view_scores, out.view_weights, out.depth_weights)
        numbers = zip(*(column.float().cpu().tolist() for column in columns), strict=True)
        return [
            Score(
                reward,
                tuple(view_scores),
                tuple(view_weights),
                tuple(depth_weights),
                row.prompt_length,
                row.response_length,
                row.truncated,
                row.unknown_share,
                row.holds_control_tokens,
            )
            for row, (reward, view_scores, view_weights, depth_weights) in zip(rows, numbers, strict=True)
        ]


def _batches(order: list[int], lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Cut indices sorted by falling length into runs whose padded size is at most `budget` tokens."""
    begin = 0
    while begin < len(order):
        count = max(1, budget // lengths[order[begin]])
        yield order[begin : begin + count]
        begin += count
