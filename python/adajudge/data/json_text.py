"""JSON in which no object has a key twice: which of its values were meant would be a guess."""

from __future__ import annotations

import json
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has this key more than once."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} comes twice in one object")
        self.key = key


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text; bytes may be UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: no JSON (a json.JSONDecodeError), no text (a UnicodeDecodeError), or a `RepeatedKeyError`.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise RepeatedKeyError(key)
        record[key] = value
    return record
