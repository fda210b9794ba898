"""Rows: one record of an input file, in whichever accepted format, as one frozen value.

``parse_row`` recognises the format of each record by its keys:

=====================  ==================================================================  ============
format                 keys                                                                ``Row.kind``
=====================  ==================================================================  ============
TRL preference         ``chosen``, ``rejected`` (+ ``prompt``, ``margin``)                 pair
HelpSteer3 preference  ``context``, ``response1``, ``response2``, ``overall_preference``   pair
NeMo-RL preference     ``context``, ``completions: [{rank, completion}]``, lowest is best  pair [1]_
candidates             ``prompt``, ``responses: [...]``                                    candidates
messages               ``messages``, the last one the assistant's                          single
scoring row            ``prompt``, ``response``                                            single
=====================  ==================================================================  ============

.. [1] With more than two completions: candidates in the record's order, their ranks in ``Row.ranks``.

A prompt is a string (one user message) or a list of ``{"role", "content"}``; a response is a string, an
assistant message, or a list of messages that ends with the assistant's. ``null`` counts as missing. What is
wrong with a record becomes a `RowError` value; parsing never raises.

Where a record could be read in two ways it is an error, never a guess: keys of two formats, a prompt beside
messages that begin otherwise, messages with tool calls or reasoning (which no judge would see). Only a pair of
texts without any prompt, TRL's implicit form, is split where the two begin to differ; ``Row.implicit_prompt``
tells so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ROLES = ("system", "user", "assistant", "tool")

# Parts of a message beside its text. A score that left them out would be of another response.
_UNREAD_PARTS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
    "audio",
)

# Columns that other programs put into the conversation: read by none of the formats, so a score would miss them.
_ONE_MORE_MESSAGE = "a column of its own is not read; expected the first message of the prompt"
_NOT_SEEN = "no judge would see it; expected no such column"
_NOT_READ = {
    "system": _ONE_MORE_MESSAGE,
    "system_prompt": _ONE_MORE_MESSAGE,
    **dict.fromkeys(
        ("tools", "documents", "chat_template_kwargs", "image", "images", "videos", "audio"), _NOT_SEEN
    ),
}

_WORDS_OF_CHANCE = 4

# How other data sets call the prompt: beside a pair without one, such a column is a misnamed prompt.
_OTHER_NAMES_OF_PROMPT = ("question", "instruction", "query", "input", "context", "post", "problem")

RowKind = Literal["single", "pair", "candidates"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: ``role`` (one of ``ROLES``) and its text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its responses.

    Args:
        id: the record's own ``id``, else its line number as a string.
        line: line of the file, from 1 (in json and parquet: number of the record, from 1).
        kind: ``"single"`` (one response), ``"pair"`` (chosen, rejected) or ``"candidates"`` (any number).
        prompt: the messages before the response; may be empty.
        responses: response texts, in the order that ``kind`` says.
        weight: pair weight of the loss; sqrt(abs(preference)) for HelpSteer3, 0 for a tie, else 1.
        margin: TRL's optional margin of a pair.
        ranks: rank of each response (NeMo-RL), lowest is best.
        implicit_prompt: the prompt is what both texts of a pair begin with; the record has none of its own.
        extra: every other column of the record, untouched.
    """

    id: str
    line: int
    kind: RowKind
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    weight: float = 1.0
    margin: float | None = None
    ranks: tuple[float, ...] | None = None
    implicit_prompt: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The preferred response of a pair."""
        return self._side(0)

    @property
    def rejected(self) -> str:
        """The other response of a pair."""
        return self._side(1)

    @property
    def tie(self) -> bool:
        """Whether this is a pair without a preference (only read on request, see ``read_rows``)."""
        return self.kind == "pair" and self.weight == 0.0

    def name_of(self, index: int) -> str:
        """Of a response, as errors and figures name it: response, chosen, rejected or ``responses[index]``."""
        names = {"single": ("response",), "pair": ("chosen", "rejected")}.get(self.kind)
        return f"responses[{index}]" if names is None else names[index]

    def error(self, field: str, reason: str) -> RowError:
        """A `RowError` about this row, for what only turns out later (encoding, length)."""
        return RowError(self.line, self.id, field, reason)

    def _side(self, index: int) -> str:
        if self.kind != "pair":
            raise ValueError(
                f"row {self.id!r} is {self.kind!r}; only a pair has a chosen and a rejected side"
            )
        return self.responses[index]


@dataclass(frozen=True, slots=True)
class RowError:
    """A record that cannot be used: where it is, which field is at fault, and why.

    Args:
        line: line of the file (json and parquet: record), from 1.
        id: the record's id, or the line number as a string.
        field: path of the field, e.g. ``"messages[1].role"``; ``"row"`` is the whole record.
        reason: what came and what was expected.
    """

    line: int
    id: str
    field: str
    reason: str

    def __str__(self) -> str:
        """One line for a log or a terminal."""
        return f"line {self.line} (id {self.id!r}), field {self.field!r}: {self.reason}"


def parse_row(record: object, line: int) -> Row | RowError:
    """Read one decoded record in any accepted format; a malformed one is returned as a `RowError`."""
    row_id = str(line)
    try:
        if not isinstance(record, Mapping):
            raise _MalformedError("row", f"expected an object, got {_describe(record)}")
        fields = {key: value for key, value in record.items() if value is not None}
        row_id = _parse_id(fields.pop("id", None), default=row_id)
        for name, reason in _NOT_READ.items():
            if fields.get(name):
                raise _MalformedError(name, reason)
        if "prompt" in record and "prompt" not in fields and ("chosen" in fields or "messages" in fields):
            raise _MalformedError("prompt", "null; expected a prompt, or no such field")
        return _FORMATS[_detect_format(fields)](row_id, line, fields)
    except _MalformedError as malformed:
        return RowError(line, row_id, malformed.field, malformed.reason)


class _MalformedError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def _parse_id(value: object, default: str) -> str:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _MalformedError("id", f"expected a string or an integer, got {_describe(value)}")
    return _text(value, "id") if isinstance(value, str) else str(value)


def _detect_format(fields: Mapping[str, Any]) -> str:
    found = {name: next(key for key in keys if key in fields)
             for name, keys in _KEYS.items() if any(key in fields for key in keys)}  # fmt: skip
    if len(found) > 1 and "response" not in fields:
        found.pop("scoring", None)  # a prompt goes with all
    if "preference" in found:
        found.pop("messages", None)  # UltraFeedback: the chosen conversation once more
    if not found:
        names = ", ".join(map(str, fields)) or "none"
        raise _MalformedError(
            "row",
            f"no known format: keys found: {names}; expected prompt + response, messages, chosen + rejected, "
            "prompt + responses, context + response1 + response2 + overall_preference, or context + completions",
        )
    prompts = [key for key in ("prompt", "context") if key in fields]
    if len(prompts) > 1 and next(iter(found)) in ("helpsteer3", "nemo_rl"):
        raise _MalformedError("row", "both prompt and context came; expected one of them")
    if len(found) > 1:
        raise _MalformedError(
            "row", f"keys of several formats: {', '.join(found.values())}; expected one of them"
        )
    return next(iter(found))


def _parse_preference(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    chosen_value, rejected_value = _take(fields, "chosen"), _take(fields, "rejected")
    margin_value = fields.pop("margin", None)
    margin = None if margin_value is None else _number(margin_value, "margin")
    texts = isinstance(chosen_value, str) and isinstance(rejected_value, str)
    implicit = "prompt" not in fields
    if implicit and texts:
        _refuse_other_names(fields)
        prompt, chosen, rejected = _split_shared_text(chosen_value, rejected_value)
    else:
        explicit = () if implicit else _prompt(fields.get("prompt"), "prompt")
        chosen_turns, chosen = _turns_and_response(chosen_value, "chosen")
        rejected_turns, rejected = _turns_and_response(rejected_value, "rejected")
        if chosen_turns != rejected_turns:
            raise _MalformedError(
                "rejected",
                "chosen and rejected differ before their last message; only the last may differ",
            )
        if implicit and not chosen_turns:
            _refuse_other_names(fields)
            raise _MalformedError("prompt", "missing field, and chosen and rejected are responses alone")
        prompt = _joined(explicit, chosen_turns, "chosen")
        _refuse_repeated_prompt(fields.pop("prompt", None), chosen_value, rejected_value)
    if "messages" in fields:
        _check_conversation(fields["messages"], prompt, chosen)
    return Row(
        row_id,
        line,
        "pair",
        prompt,
        (chosen, rejected),
        margin=margin,
        implicit_prompt=implicit and texts,
        extra=fields,
    )


def _refuse_other_names(fields: Mapping[str, Any]) -> None:
    """Of a pair without a prompt: a column that is one under another name."""
    misnamed = next((name for name in _OTHER_NAMES_OF_PROMPT if name in fields), None)
    if misnamed is not None:
        raise _MalformedError("prompt", f"missing field; is it {misnamed!r}? Then name it 'prompt'")


def _refuse_repeated_prompt(prompt: object, chosen: object, rejected: object) -> None:
    """Texts that both begin with the whole prompt are conversations, not responses (a few words may be chance)."""
    if not isinstance(prompt, str) or not isinstance(chosen, str) or not isinstance(rejected, str):
        return
    text = prompt.strip()
    if len(text.split()) >= _WORDS_OF_CHANCE and all(x.strip().startswith(text) for x in (chosen, rejected)):
        raise _MalformedError("chosen", "both sides begin with the prompt; expected the responses alone")


def _check_conversation(value: object, prompt: tuple[Message, ...], chosen: str) -> None:
    """``messages`` beside a pair says the chosen side once more (UltraFeedback), or the record contradicts itself."""
    said = [(m.role, m.content.strip()) for m in (*prompt, Message("assistant", chosen))]
    if [(m.role, m.content.strip()) for m in _messages(value, "messages")] != said:
        raise _MalformedError(
            "messages", "not the prompt and the chosen response of this pair; expected one of the two"
        )


def _joined(explicit: tuple[Message, ...], turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The prompt of a record that has both a prompt and conversations: these may repeat it, or go on from it."""
    if not explicit or not turns:
        return explicit or turns
    said, repeated = ([(m.role, m.content.strip()) for m in messages] for messages in (explicit, turns))
    if turns[0].role not in ("system", "user"):
        return explicit + turns  # they go on from the prompt
    if said in (repeated[: len(said)], repeated[-len(said) :]):
        return turns
    if explicit[-1].role != "system" or turns[0].role == "system":
        raise _MalformedError(
            f"{name}[0]",
            f"begins with another {turns[0].role} message than 'prompt'; expected the same one, or the turns behind it",
        )
    return explicit + turns


def _parse_helpsteer3(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    prompt = _prompt(_take(fields, "context"), "context")
    first = _response(_take(fields, "response1"), "response1")
    second = _response(_take(fields, "response2"), "response2")
    preference = _number(_take(fields, "overall_preference"), "overall_preference")
    if abs(preference) > 3:
        raise _MalformedError("overall_preference", f"expected a number from -3 to 3, got {preference:g}")
    responses = (second, first) if preference > 0 else (first, second)
    return Row(row_id, line, "pair", prompt, responses, weight=math.sqrt(abs(preference)), extra=fields)


def _parse_nemo_rl(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    key = "context" if "context" in fields or "prompt" not in fields else "prompt"
    prompt = _prompt(_take(fields, key), key)
    completions = _list(_take(fields, "completions"), "completions", at_least=2)
    ranked = []
    for i, item in enumerate(completions):
        name = f"completions[{i}]"
        if not isinstance(item, Mapping):
            raise _MalformedError(name, f"expected an object with rank and completion, got {_describe(item)}")
        for part in ("rank", "completion"):
            if item.get(part) is None:
                raise _MalformedError(f"{name}.{part}", "missing field")
        rank = _number(item["rank"], f"{name}.rank")
        ranked.append((rank, _response(item["completion"], f"{name}.completion")))
    if len(ranked) == 2:
        ranked.sort(key=lambda pair: pair[0])
    ranks, responses = tuple(rank for rank, _ in ranked), tuple(response for _, response in ranked)
    if len(ranked) > 2:
        return Row(row_id, line, "candidates", prompt, responses, ranks=ranks, extra=fields)
    weight = 0.0 if ranks[0] == ranks[1] else 1.0
    return Row(row_id, line, "pair", prompt, responses, weight=weight, ranks=ranks, extra=fields)


def _parse_candidates(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    prompt = _prompt(_take(fields, "prompt"), "prompt")
    values = _list(_take(fields, "responses"), "responses", at_least=1)
    responses = tuple(_response(value, f"responses[{i}]") for i, value in enumerate(values))
    return Row(row_id, line, "candidates", prompt, responses, extra=fields)


def _parse_messages(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    turns, response = _turns_and_response(_take(fields, "messages"), "messages", text_allowed=False)
    if "prompt" in fields and _joined(_prompt(fields["prompt"], "prompt"), turns, "messages") != turns:
        raise _MalformedError("prompt", "it is not in 'messages'; expected the whole conversation there")
    return Row(row_id, line, "single", turns, (response,), extra=fields)


def _parse_scoring(row_id: str, line: int, fields: dict[str, Any]) -> Row:
    prompt = _prompt(_take(fields, "prompt"), "prompt")
    response = _response(_take(fields, "response"), "response")
    return Row(row_id, line, "single", prompt, (response,), extra=fields)


# What a record of each format has, and one of no other.
_KEYS = {
    "preference": ("chosen", "rejected"),
    "helpsteer3": ("response1", "response2", "overall_preference"),
    "nemo_rl": ("completions",),
    "candidates": ("responses",),
    "messages": ("messages",),
    "scoring": ("response", "prompt"),
}

_FORMATS = {
    "preference": _parse_preference,
    "helpsteer3": _parse_helpsteer3,
    "nemo_rl": _parse_nemo_rl,
    "candidates": _parse_candidates,
    "messages": _parse_messages,
    "scoring": _parse_scoring,
}


def _take(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise _MalformedError(name, "missing field")
    return fields.pop(name)


def _prompt(value: object, name: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", _text(value, name, empty_allowed=True)),)
    return _messages(value, name)


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _MalformedError(name, f"expected a string or a list of messages, got {_describe(value)}")
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise _MalformedError(name, f"expected a message with role and content, got {_describe(value)}")
    for part in ("role", "content"):
        if value.get(part) is None:
            raise _MalformedError(f"{name}.{part}", "missing field")
        if not isinstance(value[part], str):
            raise _MalformedError(f"{name}.{part}", f"expected a string, got {_describe(value[part])}")
    if value["role"] not in ROLES:
        raise _MalformedError(
            f"{name}.role", f"unknown role {value['role']!r}; expected one of {', '.join(ROLES)}"
        )
    for part in _UNREAD_PARTS:
        if value.get(part):
            raise _MalformedError(f"{name}.{part}", "a judge reads a message's content only; put it there")
    return Message(value["role"], _text(value["content"], f"{name}.content", empty_allowed=True))


def _turns_and_response(
    value: object, name: str, text_allowed: bool = True
) -> tuple[tuple[Message, ...], str]:
    """Split a response given as text or messages into the turns before it and the text of its last turn."""
    if text_allowed and isinstance(value, str):
        return (), _text(value, name)
    if text_allowed and isinstance(value, Mapping):
        value = [value]
    if isinstance(value, str):
        raise _MalformedError(name, f"expected a list of messages, got {_describe(value)}")
    messages = _messages(value, name)
    if not messages:
        raise _MalformedError(name, "expected at least one message, got an empty list")
    last = f"{name}[{len(messages) - 1}]"
    if messages[-1].role != "assistant":
        raise _MalformedError(
            f"{last}.role", f"expected the last message from 'assistant', got {messages[-1].role!r}"
        )
    return messages[:-1], _text(messages[-1].content, f"{last}.content")


def _response(value: object, name: str) -> str:
    turns, response = _turns_and_response(value, name)
    if turns:
        raise _MalformedError(name, f"expected one assistant message, got {len(turns) + 1} messages")
    return response


def _split_shared_text(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    """Take the words that both texts begin with as the prompt (TRL's implicit prompt), never half a word."""
    _text(chosen, "chosen")
    _text(rejected, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared > 0 and not (chosen[shared - 1].isspace() or chosen[shared : shared + 1].isspace()):
        shared -= 1
    prompt = chosen[:shared].rstrip()
    if not prompt:
        raise _MalformedError(
            "prompt", "missing field, and chosen and rejected do not begin with the same words"
        )
    sides = chosen[shared:].lstrip(), rejected[shared:].lstrip()
    return (Message("user", prompt),), _text(sides[0], "chosen"), _text(sides[1], "rejected")


def _list(value: object, name: str, at_least: int) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _MalformedError(name, f"expected a list, got {_describe(value)}")
    if len(value) < at_least:
        raise _MalformedError(name, f"expected at least {at_least} entries, got {len(value)}")
    return value


def _text(value: str, name: str, empty_allowed: bool = False) -> str:
    if not empty_allowed and not value.strip():
        raise _MalformedError(name, "empty" if not value else "only white space")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair at character {error.start}; not valid text"
        raise _MalformedError(name, reason) from None
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _MalformedError(name, f"expected a number, got {_describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _MalformedError(name, f"expected a finite number, got {number}")
    return number


def _describe(value: object) -> str:
    """What came, in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", str: "a string", int: "a number", float: "a number"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
