"""Wire formats: from a request's JSON to what is to be scored, and from scores to the answer.

Each `WireFormat` has the fields it reads (a pydantic model), the responses it asks for, and the form of its answer. Fields that
would change a score and are not served are refused; others that a client may send besides are not looked at.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adajudge.data import Row, RowError, parse_row
from adajudge.scoring.results import Score, ScoredRow

_MESSAGE = 1000  # characters; a reason may quote what came, which may be megabytes


def shortened(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= _MESSAGE else text[:_MESSAGE] + ".."


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text that a chat template has been applied to.

    Args:
        text: the conversation with its special tokens.
        add_bos: put the bos token in front where the chat template does and the text has none.
        field: where the request has it.
    """

    text: str
    add_bos: bool
    field: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row has no score."""

    field: str
    reason: str
    id: str | None = None
    kind: Literal["invalid_row", "not_scored", "engine_error"] = "invalid_row"

    def record(self, row: int) -> dict[str, Any]:
        """As it stands in an answer."""
        return {
            "type": self.kind,
            "message": shortened(self.reason),
            "row": row,
            "field": shortened(self.field),
        }


Item = Row | Rendered | Fault
Outcome = tuple[Score, ...] | Fault


class _Request(BaseModel):
    """Fields of any request; more may come and are not kept."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="not looked at: a server has one judge, named in the answer")

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_served(cls, content: Any) -> Any:
        given = content if isinstance(content, dict) else {}
        for name, (allowed, reason) in _NOT_SERVED.items():
            value = given.get(name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name}: {reason}")
        return content


# Fields of vLLM, SGLang and OpenAI that would change the score: what may stand there, and what to say of the rest.
_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_activation": ((False,), "a reward is never put through a sigmoid; expected false"),
    "activation": ((False,), "a reward is never put through a sigmoid; expected false"),
    "softmax": ((False,), "a reward is never put through a softmax; expected false"),
    "normalize": ((False,), "a reward is never normalised; expected false"),
    "truncate_prompt_tokens": ((-1,), "the server's max_length holds for all requests; leave it out"),
    "dimensions": ((1,), "a reward has one dimension"),
    "chat_template": ((), "the judge's own chat template is used; leave it out"),
    "chat_template_kwargs": ((), "the judge's own chat template is used; leave it out"),
    "instruction": ((), "instructions are not served; put them in the prompt"),
    "tools": (([],), "no judge would see them; leave them out"),
    "system": (("",), "expected the first message"),
    "continue_final_message": ((False,), "the last message is scored as a whole; expected false"),
    "add_generation_prompt": ((False,), "the last message is the response that is scored; expected false"),
}


class GetReward(_Request):
    """OpenRLHF's remote reward model."""

    query: list[Any] = Field(
        description="conversations with the chat template applied, special tokens in them"
    )


class _TextOrMessages(_Request):
    """What vLLM's pooling endpoints take."""

    input: str | list[Any] | None = Field(
        None, description="one or several conversations, chat template applied"
    )
    messages: list[Any] | None = Field(None, description="one conversation; the last message is the response")
    add_special_tokens: bool = Field(True, description="put the bos token in front where the template does")

    @model_validator(mode="after")
    def _one_of_both(self) -> _TextOrMessages:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        if self.input == [] or self.messages == []:
            raise ValueError("an empty list came, expected at least one conversation")
        return self


class Classify(_TextOrMessages):
    """vLLM's ``/classify``."""


class Pooling(_TextOrMessages):
    """vLLM's ``/pooling``."""

    encoding_format: Literal["float", "base64"] = "float"
    task: Literal["classify", "score"] | None = None


class Embeddings(_TextOrMessages):
    """``/v1/embeddings`` of OpenAI, as SGLang serves reward models through it."""

    encoding_format: Literal["float", "base64"] = "float"


class ScorePairs(_Request):
    """vLLM's ``/score``: queries are prompts, documents are responses."""

    queries: str | list[Any] | None = Field(None, description="one prompt for all documents, or one for each")
    documents: str | list[Any] | None = None
    text_1: str | list[Any] | None = Field(None, description="older name of queries")
    text_2: str | list[Any] | None = Field(None, description="older name of documents")

    @model_validator(mode="after")
    def _two_lists_that_fit(self) -> ScorePairs:
        given = {
            name for name in ("queries", "documents", "text_1", "text_2") if getattr(self, name) is not None
        }
        if given not in ({"queries", "documents"}, {"text_1", "text_2"}):
            raise ValueError("expected either queries and documents, or text_1 and text_2")
        prompts, responses = self.pairs()
        if not prompts or not responses:
            raise ValueError("an empty list came, expected at least one query and one document")
        if len(prompts) not in (1, len(responses)):
            raise ValueError(
                f"{len(prompts)} queries came for {len(responses)} documents; expected 1 or as many"
            )
        return self

    def pairs(self) -> tuple[list[Any], list[Any]]:
        """Prompts and responses."""
        first = self.text_1 if self.queries is None else self.queries
        second = self.text_2 if self.documents is None else self.documents
        return _as_list(first), _as_list(second)


class Rewards(BaseModel):
    """Our own format: rows in any form that files may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rows: list[Any] = Field(
        description="rows as in a file: prompt + response, messages, chosen + rejected .."
    )
    model: str | None = None

    @field_validator("rows")
    @classmethod
    def _some(cls, rows: list[Any]) -> list[Any]:
        if not rows:
            raise ValueError("expected at least one row")
        return rows


@dataclass(frozen=True)
class WireFormat:
    """One endpoint.

    Args:
        path: of the endpoint.
        request: the fields it reads.
        items: what is to be scored, one after another; a `Fault` where that cannot be told.
        answer: the answer's body from the form of its vectors (``encoding_format``), the items, their outcomes and the judge's
            name.
        carries_errors: whether an answer has a place for the error of a row; else any bad row refuses the request.
    """

    path: str
    request: type[BaseModel]
    items: Callable[[Any], Iterator[Item]]
    answer: Callable[[str, list[Item], Sequence[Outcome], str], dict[str, Any]]
    carries_errors: bool = False


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rendered(value: object, field: str, add_bos: bool) -> Item:
    if not isinstance(value, str):
        if isinstance(value, (int, list)) and not isinstance(value, bool):
            return Fault(field, "token ids came; expected the conversation as text")
        return Fault(field, f"expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Fault(field, f"half of a surrogate pair at character {error.start}; not valid text")
    return Rendered(value, add_bos, field)


def _row(record: object, index: int) -> Item:
    row = parse_row(record, index)
    # No answer has the other columns.
    return replace(row, extra={}) if isinstance(row, Row) else fault_of(row)


def fault_of(error: RowError) -> Fault:
    """The same as a fault of the server."""
    return Fault(error.field, error.reason, error.id)


def _items_of_get_reward(request: GetReward) -> Iterator[Item]:
    return (_rendered(text, f"query[{i}]", add_bos=False) for i, text in enumerate(request.query))


def _items_of_text(request: _TextOrMessages) -> Iterator[Item]:
    if request.messages is not None:
        yield _row({"messages": request.messages}, 0)
    elif isinstance(request.input, str):
        yield _rendered(request.input, "input", request.add_special_tokens)
    else:
        for i, text in enumerate(request.input or []):
            yield _rendered(text, f"input[{i}]", request.add_special_tokens)


def _items_of_score(request: ScorePairs) -> Iterator[Item]:
    prompts, responses = request.pairs()
    for i, response in enumerate(responses):
        place = i if len(prompts) > 1 else 0
        named = ((f"queries[{place}]", prompts[place]), (f"documents[{i}]", response))
        wrong = next(((name, value) for name, value in named if not isinstance(value, str)), None)
        if wrong is None:
            yield _row({"prompt": prompts[place], "response": response}, i)
        else:
            yield Fault(wrong[0], f"expected a string, got {type(wrong[1]).__name__}")


def _items_of_rewards(request: Rewards) -> Iterator[Item]:
    return (_row(record, i) for i, record in enumerate(request.rows))


def _rewards(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome[0].reward for outcome in outcomes if not isinstance(outcome, Fault)]


def _answer_get_reward(_: Any, __: Any, outcomes: Sequence[Outcome], ___: str) -> dict[str, Any]:
    rewards = _rewards(outcomes)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def _listed(
    prefix: str, model: str, data: list[dict[str, Any]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The frame of OpenAI's and vLLM's answers."""
    scores = [score for outcome in outcomes if not isinstance(outcome, Fault) for score in outcome]
    tokens = sum(score.prompt_tokens + score.response_tokens for score in scores)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def _answer_classify(_: Any, __: Any, outcomes: Sequence[Outcome], model: str) -> dict[str, Any]:
    data = [
        {"index": i, "label": "LABEL_0", "probs": [reward], "num_classes": 1}
        for i, reward in enumerate(_rewards(outcomes))
    ]
    return _listed("classify", model, data, outcomes)


def _answer_score(_: Any, __: Any, outcomes: Sequence[Outcome], model: str) -> dict[str, Any]:
    data = [{"index": i, "object": "score", "score": reward} for i, reward in enumerate(_rewards(outcomes))]
    return _listed("score", model, data, outcomes)


def _vector(reward: float, encoding_format: str) -> list[float] | str:
    """A vector of one number; in base64 as little-endian fp32, which a reward is."""
    return base64.b64encode(struct.pack("<f", reward)).decode() if encoding_format == "base64" else [reward]


def _answer_pooling(encoding_format: str, _: Any, outcomes: Sequence[Outcome], model: str) -> dict[str, Any]:
    data = [
        {"index": i, "object": "pooling", "data": _vector(reward, encoding_format)}
        for i, reward in enumerate(_rewards(outcomes))
    ]
    return _listed("pool", model, data, outcomes)


def _answer_embeddings(
    encoding_format: str, _: Any, outcomes: Sequence[Outcome], model: str
) -> dict[str, Any]:
    data = [
        {"index": i, "object": "embedding", "embedding": _vector(reward, encoding_format)}
        for i, reward in enumerate(_rewards(outcomes))
    ]
    return _listed("embd", model, data, outcomes)


def _answer_rewards(_: Any, items: list[Item], outcomes: Sequence[Outcome], model: str) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for i, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
        if isinstance(outcome, Fault):
            known = item.id if isinstance(item, Row) else outcome.id
            data.append({"id": known or str(i), "error": outcome.record(i)})
        else:
            assert isinstance(item, Row)
            data.append(ScoredRow(item, outcome).to_record())
    return _listed("rewards", model, data, outcomes)


FORMATS = (
    WireFormat("/get_reward", GetReward, _items_of_get_reward, _answer_get_reward),
    WireFormat("/classify", Classify, _items_of_text, _answer_classify),
    WireFormat("/score", ScorePairs, _items_of_score, _answer_score),
    WireFormat("/pooling", Pooling, _items_of_text, _answer_pooling),
    WireFormat("/v1/embeddings", Embeddings, _items_of_text, _answer_embeddings),
    WireFormat(
        "/v1/rewards",
        Rewards,
        _items_of_rewards,
        _answer_rewards,
        carries_errors=True,
    ),
)
