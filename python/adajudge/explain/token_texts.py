"""Which text each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character are decoded as


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Texts ``[T]`` that joined are the decoded sequence.

    A token decoded alone loses the space before it (SentencePiece) or is a part of a character (byte-level BPE), so each is
    what the text gains by it, behind the tokens before. A character of several tokens is the last one's; the others are empty.
    """
    texts: list[str] = []
    start = read = 0  # tokens start .. read are decoded again, for what they change in the text behind them
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[start:stop]) for stop in (read, end))
        if now.endswith(_INCOMPLETE) and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts
