"""Rows in, rewards out, in the order of the input."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from sys import is_finalizing
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adajudge.builtin import BUILT_IN_JUDGE
from adajudge.data import (
    ConversationEncoder,
    EncodedRow,
    EncodingError,
    Message,
    Row,
    RowError,
    load_tokenizer,
    parse_row,
)
from adajudge.loading import load_trained_judge
from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.scoring.engine import Engine
from adajudge.scoring.reading import choose_attention
from adajudge.scoring.results import Score, ScoredRow, ScoringError

_CHUNK = 32  # rows that a thread encodes in one go
_THREADS = 4
_AHEAD = 2  # windows that are being encoded while one is scored
_LARGEST_WINDOW = 1 << 20  # rows; three are held at once

Encoded = tuple[EncodedRow, ...]
Result = ScoredRow | RowError
_Waiting = tuple[Sequence[Row | RowError], list[Future[list[Encoded | RowError]]]]


class Scorer:
    """Scores rows with a judge: encodes them in threads of its own while the device scores the rows before them.

    A row that cannot be scored becomes a `RowError` in its place; its neighbours are not touched.

    Args:
        model: the judge, on its device.
        tokenizer: its tokenizer, with a chat template.
        max_length: longest sequence in tokens; default the backbone's own limit. A longer prompt is cut from
            the left and the score flagged as truncated; a response that does not fit is a `RowError`.
        token_budget: tokens that are read at once, see `Engine`.
        compile_backbone: put the backbone under torch.compile, see `Engine`.
        window: rows whose responses are packed together. Three windows are held at once, whatever the number of rows.
        truncate_response: cut a response that does not fit instead of refusing it (flagged).
        unknown_limit: share of unknown words above which a row is refused; default the judge's own
            (`AdaJudgeConfig.unknown_word_limit`), 1 scores every row.

    Raises:
        ValueError: `max_length`, `token_budget` or `window` is out of range, the chat template cannot be used, or the
            tokenizer is not the one that the judge was trained with.
    """

    def __init__(
        self,
        model: AdaJudgeForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        token_budget: int | None = None,
        window: int = 512,
        truncate_response: bool = False,
        unknown_limit: float | None = None,
        compile_backbone: bool = False,
    ) -> None:
        if not 1 <= window <= _LARGEST_WINDOW:
            raise ValueError(f"window: {window} came, expected 1 to {_LARGEST_WINDOW}")
        longest = model.config.longest_sequence(max_length)
        self.engine = Engine(model, token_budget, compile_backbone=compile_backbone)
        self.encoder = ConversationEncoder(tokenizer, longest, truncate_response=truncate_response)
        boundary = model.config.turn_boundary
        if boundary is not None and boundary != self.encoder.boundary.to_dict():
            raise ValueError(
                "tokenizer: it or its chat template is not the one that the judge was trained with: tokens around a turn are "
                f"{self.encoder.boundary.to_dict()}, expected {boundary}"
            )
        self.window = window
        self.unknown_limit = model.config.unknown_word_limit if unknown_limit is None else unknown_limit

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
            attn_implementation: default: ``"adajudge"``, which reads no padding and the prompt of several responses once,
                where the backbone is served by it; else transformers' own choice.
            options: as of `Scorer`.

        Raises:
            OSError: the folder has no config.json or no weights, or what an adapter was trained on is not there any more.
            ValueError: it holds no complete judge or no usable tokenizer, the weights under an adapter have changed, the
                attention is unknown, or `Scorer` refuses an option.
            ImportError: an adapter needs peft, or the attention a library, which is not installed.
            RuntimeError: torch cannot use the device (AssertionError where torch was built without it).
        """
        path = BUILT_IN_JUDGE if path is None else path
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json there; expected a folder with a saved judge")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else None
        model = load_trained_judge(path, dtype=dtype, attn_implementation=attn_implementation).to(device)
        if attn_implementation is None:
            choose_attention(model)
        return cls(model, load_tokenizer(path), **options)

    @property
    def model(self) -> AdaJudgeForSequenceClassification:
        """The judge."""
        return self.engine.model

    @property
    def tokens_scored(self) -> int:
        """Tokens of all sequences scored so far, a shared prompt counted for each of its responses."""
        return self.engine.tokens_scored

    def score(self, rows: Iterable[Row | RowError | Mapping[str, Any]]) -> Iterator[Result]:
        """One result per row, in order; errors among the rows pass through.

        A mapping is read as a record of a file, see `adajudge.data.parse_row`; its line is its place in `rows`.
        """
        if isinstance(rows, (Mapping, str)):
            raise ValueError(f"rows: a {type(rows).__name__} came, expected a list of rows or records")
        parsed = (
            row if isinstance(row, (Row, RowError)) else parse_row(row, line)
            for line, row in enumerate(rows, 1)
        )
        for results in self.score_windows(windows_of(parsed, self.window)):
            yield from results

    def score_windows(self, windows: Iterable[Sequence[Row | RowError]]) -> Iterator[list[Result]]:
        """The results of each window, in order. A row's scores depend, to the last bit, on its window alone.

        Where `windows` raises, the results of those before come first.
        """
        waiting: deque[_Waiting] = deque()
        remaining = iter(windows)
        failure: Exception | None = None
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "adajudge-encode") as threads:
            try:
                while True:
                    try:
                        while failure is None and len(waiting) <= _AHEAD:
                            waiting.append(self._begin(next(remaining), threads))
                    except StopIteration:
                        remaining = iter(())
                    except Exception as error:
                        failure = error
                    if not waiting:
                        break
                    window, futures = waiting.popleft()
                    yield self._score_window(window, [item for part in futures for item in part.result()])
            finally:
                if not is_finalizing():  # the interpreter ends with an unfinished generator
                    threads.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _begin(self, window: Sequence[Row | RowError], threads: ThreadPoolExecutor) -> _Waiting:
        """Have the rows of a window encoded."""
        chunks = [window[i : i + _CHUNK] for i in range(0, len(window), _CHUNK)]
        return window, [threads.submit(self._encode_all, chunk) for chunk in chunks]

    def score_response(self, prompt: str | Sequence[Message], response: str) -> Score:
        """Score one response; a prompt given as text is one user message.

        Raises:
            ValueError: the row cannot be scored; the message names the field and the reason.
        """
        if not isinstance(response, str):
            raise ValueError(f"response: expected a string, got {type(response).__name__}")
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ValueError(f"prompt: expected a string or messages, got {type(prompt).__name__}")
        turns = (
            [asdict(m) if isinstance(m, Message) else m for m in prompt]
            if not isinstance(prompt, str)
            else prompt
        )
        row = parse_row({"prompt": turns, "response": response}, 1)
        if isinstance(row, RowError):
            raise ValueError(f"{row.field}: {row.reason}")
        (result,) = self._score_window([row], [self.encode(row)])
        if isinstance(result, RowError):
            raise ValueError(f"{result.field}: {result.reason}")
        return result.scores[0]

    def encode(self, row: Row) -> Encoded | RowError:
        """Token ids of each of a row's responses behind its prompt, or why there are none. Threads may call it at once."""
        encoded = []
        for index, response in enumerate(row.responses):
            try:
                encoded.append(self.encoder.encode(row.prompt, response))
                self._check_known(encoded[-1])
            except EncodingError as error:
                one = error.field == "prompt" or row.kind == "single"
                return row.error(error.field if one else row.name_of(index), str(error))
        return tuple(encoded)

    def encode_rendered(self, text: str, *, add_bos: bool = False) -> EncodedRow:
        """Token ids of text that a chat template has been applied to already, see `ConversationEncoder`.

        Raises:
            EncodingError: it cannot be scored, and why.
        """
        encoded = self.encoder.encode_rendered(text, add_bos=add_bos)
        self._check_known(encoded)
        return encoded

    def score_encoded(self, rows: Sequence[EncodedRow]) -> list[Score | ScoringError]:
        """One result per encoded response; calls of several threads take turns."""
        return self.engine.score(rows)

    def _check_known(self, encoded: EncodedRow) -> None:
        unknown = encoded.unknown_share
        if self.unknown_limit is not None and unknown > self.unknown_limit:
            raise EncodingError(
                "row",
                f"{unknown:.0%} of its words are unknown to this judge, expected at most {self.unknown_limit:.0%} "
                "(--allow_unknown scores such rows)",
            )

    def _encode_all(self, rows: Sequence[Row | RowError]) -> list[Encoded | RowError]:
        return [self.encode(row) if isinstance(row, Row) else row for row in rows]

    def _score_window(
        self, window: Sequence[Row | RowError], encoded: Sequence[Encoded | RowError]
    ) -> list[Result]:
        flat = [item for items in encoded if not isinstance(items, RowError) for item in items]
        scores = iter(self.score_encoded(flat))
        results: list[Result] = []
        for row, items in zip(window, encoded, strict=True):
            if isinstance(items, RowError):
                results.append(items)
                continue
            assert isinstance(row, Row)
            results.append(scored_row(row, list(itertools.islice(scores, len(items)))))
        return results


def scored_row(row: Row, scores: Sequence[Score | ScoringError]) -> Result:
    """The row with its scores; an error of the row if any of its responses could not be scored."""
    sound = tuple(score for score in scores if isinstance(score, Score))
    if len(sound) == len(scores):
        return ScoredRow(row, sound)
    return row.error("row", str(next(score for score in scores if isinstance(score, ScoringError))))


def windows_of(rows: Iterable[Row | RowError], size: int) -> Iterator[list[Row | RowError]]:
    """Runs of so many rows; where `rows` raises, those before come as a last, shorter one."""
    remaining = iter(rows)
    window: list[Row | RowError] = []
    failure: Exception | None = None
    while failure is None:
        try:
            window.append(next(remaining))
        except StopIteration:
            break
        except Exception as error:
            failure = error
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
    if failure is not None:
        raise failure
