"""Loading a tokenizer, with one kind of error for all that can be wrong with its files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerError(ValueError):
    """No usable tokenizer; the message names the folder."""


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder (or of a hub name).

    Raises:
        TokenizerError: it is missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(os.fspath(path))
    except Exception as error:  # its parsers raise KeyError, TypeError, bare Exception ..
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise TokenizerError(
            f"{os.fspath(path)}: no usable tokenizer there (tokenizer.json and its configuration): {reason}"
        ) from error
    return tokenizer
