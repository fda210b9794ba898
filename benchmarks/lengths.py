"""Lengths of prompts and responses as judges meet them.

``lengths.json``: a row for every fourth prompt of RM-Bench's chat, code and safety parts, ``[prompt, three chosen responses,
three rejected ones]`` in tokens, counted as UTF-8 bytes / 4.
"""

from __future__ import annotations

import json
from pathlib import Path

TABLE: list[list[int]] = json.loads(Path(__file__).with_name("lengths.json").read_text())


def sequences(tokens: int, scale: float = 1.0) -> tuple[list[int], list[int]]:
    """Lengths of prompts and responses, one response each, until there are `tokens` of them: the last is cut to fit.

    Rows are taken in the table's order, which is drawn by lot, a different one of a row's six responses each time.
    """
    prompts: list[int] = []
    responses: list[int] = []
    left, index = tokens, 0
    while left >= 2:
        row = TABLE[index % len(TABLE)]
        prompt, response = (max(1, round(scale * n)) for n in (row[0], row[1 + index % 6]))
        prompt = min(prompt, left - 1)
        response = min(response, left - prompt)
        prompts.append(prompt)
        responses.append(response)
        left -= prompt + response
        index += 1
    return prompts, responses


def candidates(prompts: int, scale: float = 1.0) -> tuple[list[int], list[list[int]]]:
    """Lengths of so many prompts, and of the six responses of each."""
    rows = [[max(1, round(scale * n)) for n in TABLE[index % len(TABLE)]] for index in range(prompts)]
    return [row[0] for row in rows], [row[1:] for row in rows]
