"""Preference pairs of a file as a data set of token ids, with an account of every record of the file."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from torch.utils.data import Dataset

from adajudge.data import (
    ConversationEncoder,
    EncodedPair,
    EncodedRow,
    EncodingError,
    Row,
    RowError,
    read_rows,
)


class PairDataset(Dataset[EncodedPair]):
    """Encoded pairs, held as 4 bytes a token (lists of Python integers would take ten times that)."""

    def __init__(self, pairs: Iterable[EncodedPair] = ()) -> None:
        self._sides: list[tuple[array[int], int]] = []
        self._weights = array("d")
        for pair in pairs:
            self.append(pair)

    def append(self, pair: EncodedPair) -> None:
        """Add one pair."""
        for side in (pair.chosen, pair.rejected):
            self._sides.append((array("i", side.input_ids), side.prompt_length))
        self._weights.append(pair.weight)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._weights)

    def digest(self) -> str:
        """Of all pairs in their order."""
        found = blake2b(self._weights.tobytes(), digest_size=16)
        for ids, prompt_length in self._sides:
            found.update(b"%d %d " % (len(ids), prompt_length))
            found.update(ids.tobytes())
        return found.hexdigest()

    def __getitem__(self, index: int) -> EncodedPair:
        """The pair as `adajudge.data.PairCollator` takes it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        chosen, rejected = (EncodedRow(ids.tolist(), n) for ids, n in self._sides[2 * index : 2 * index + 2])
        return EncodedPair(chosen, rejected, self._weights[index])

    @property
    def tokens(self) -> int:
        """Tokens of all pairs, both sides."""
        return sum(len(ids) for ids, _ in self._sides)


@dataclass
class LoadedPairs:
    """What a file holds for training. Every record is in exactly one of the counts.

    Attributes:
        source: the file.
        dataset: its usable pairs, in the order of the file.
        bad_rows: records that cannot be used: malformed, no pair, or refused by the chat template.
        too_long: pairs with a response that does not fit `max_length`; left out of `dataset`.
        ties: pairs without a preference; left out of `dataset`.
        prompts_cut: pairs of `dataset` whose prompt lost its beginning to fit `max_length`.
        responses_cut: pairs of `dataset` whose response lost its end (only an encoder with `truncate_response`).
        implicit_prompts: pairs of `dataset` without a prompt; the words both texts begin with were taken as one.
        control_tokens: pairs of `dataset` with a control token of the tokenizer in their text.
        margins: pairs of `dataset` that carry TRL's ``margin``.
    """

    source: str
    dataset: PairDataset = field(default_factory=PairDataset)
    bad_rows: list[RowError] = field(default_factory=list)
    too_long: list[RowError] = field(default_factory=list)
    ties: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    implicit_prompts: int = 0
    control_tokens: int = 0
    margins: int = 0

    def summary(self) -> str:
        """One line for a person: the counts that are not zero."""
        parts = [f"{len(self.dataset)} pairs, {self.dataset.tokens:,} tokens"]
        for count, meaning in (
            (self.ties, "ties left out"),
            (self.prompts_cut, "with the beginning of the prompt cut to fit max_length"),
            (self.responses_cut, "with the end of a response cut to fit max_length"),
            (
                self.implicit_prompts,
                "without a prompt: the words that both texts begin with were taken as one",
            ),
            (self.control_tokens, "with control tokens of the tokenizer in their text"),
            (self.margins, "with a margin, which the focal Bradley-Terry loss does not use"),
            (len(self.too_long), "left out because a response does not fit max_length"),
            (len(self.bad_rows), "bad rows"),
        ):
            if count:
                parts.append(f"{count} {meaning}")
        return f"{self.source}: {'; '.join(parts)}"


def load_pairs(
    source: str | os.PathLike[str],
    encoder: ConversationEncoder,
    progress: Callable[[Iterable[Row | RowError]], Iterable[Row | RowError]] = lambda rows: rows,
) -> LoadedPairs:
    """Read and tokenise the pairs of a file, once, before training.

    Up front rather than batch by batch: what is wrong with row 39,000 is known before the first step, and later
    epochs tokenise nothing.

    Args:
        source: a file that `adajudge.data.read_rows` reads, or ``"-"``.
        encoder: the model's tokenizer and its longest sequence.
        progress: wraps the rows, for a progress bar.

    Raises:
        DataFileError: the file as a whole cannot be read.
    """
    reader = read_rows(source)
    loaded = LoadedPairs(os.fspath(source))
    for row in progress(reader):
        if isinstance(row, RowError):
            loaded.bad_rows.append(row)
            continue
        if row.kind != "pair":
            reason = (
                f"{len(row.responses)} response(s) without a chosen and a rejected one; training takes pairs"
            )
            loaded.bad_rows.append(row.error("row", reason))
            continue
        try:
            pair = _encode(row, encoder)
        except EncodingError as error:
            errors = loaded.too_long if _fits_without_limit(row, encoder) else loaded.bad_rows
            errors.append(row.error(error.field, str(error)))
            continue
        loaded.dataset.append(pair)
        sides = (pair.chosen, pair.rejected)
        loaded.prompts_cut += any(side.prompt_tokens_cut > 0 for side in sides)
        loaded.responses_cut += any(side.response_tokens_cut > 0 for side in sides)
        loaded.implicit_prompts += row.implicit_prompt
        loaded.control_tokens += any(side.holds_control_tokens for side in sides)
        loaded.margins += row.margin is not None
    loaded.ties = reader.counts.ties
    return loaded


def _encode(row: Row, encoder: ConversationEncoder) -> EncodedPair:
    chosen, rejected = (encoder.encode(row.prompt, side) for side in (row.chosen, row.rejected))
    return EncodedPair(chosen, rejected, row.weight)


def _fits_without_limit(row: Row, encoder: ConversationEncoder) -> bool:
    """Whether only the length keeps a row from being encoded."""
    limit, encoder.max_length = encoder.max_length, None
    try:
        _encode(row, encoder)
    except EncodingError:
        return False
    finally:
        encoder.max_length = limit
    return True
