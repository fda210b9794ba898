"""From a request to its answer: a body within limits, rows encoded in threads, scores from the batcher."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adajudge.data import EncodedRow, EncodingError, Row
from adajudge.data.json_text import parse_json
from adajudge.scoring import Score, Scorer, ScoringError
from adajudge.serving.batcher import Batcher, EngineError
from adajudge.serving.errors import JSONAnswer, ServingError
from adajudge.serving.formats import Fault, Item, Outcome, WireFormat, fault_of, shortened
from adajudge.serving.metrics import Metrics
from adajudge.serving.settings import Settings

logger = logging.getLogger(__name__)

_THREADS = 4  # that encode
_CHUNK = 32  # responses that a thread encodes in one go
_AHEAD = 32  # budgets of tokens that are encoded and wait; beyond, encoding waits
_BODIES = 8  # bodies of the largest size that may be held at once
_LAST_BATCH = 5.0  # seconds for a batch whose clients have all gone
_LISTED = 100  # bad rows that an error lists

# Of JSON's types, and of what pydantic calls its errors and the alternatives of a field.
_KINDS: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "text", bool: "a boolean"},
    **{int: "a number", float: "a number", type(None): "null"},
}
_EXPECTED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "an object"),
    **{"list_type": "a list", "string_type": "text", "bool_type": "a boolean"},
}
_ALTERNATIVES: dict[int | str, str] = {"str": "text", "list[any]": "a list"}


class Service:
    """Scores the bodies of requests with one judge.

    Args:
        scorer: of the judge.
        settings: limits.

    Attributes:
        ended: after `close`, whether the thread that scores has ended.
    """

    def __init__(self, scorer: Scorer, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.token_budget.set_function(lambda: scorer.engine.token_budget)
        self.batcher = Batcher(
            scorer, lambda: scorer.engine.token_budget, settings.max_batch_wait_ms / 1000, self.metrics
        )
        self.started = int(time.time())
        self._scorer = scorer
        self._threads = ThreadPoolExecutor(_THREADS, "adajudge-encode")
        self._encoding = asyncio.Semaphore(_THREADS)
        self._accepted = 0  # rows
        self._held = 0  # bytes of bodies
        self._abandoned = False
        self.ended = False
        self._working: set[asyncio.Future[Response]] = set()

    def abandon(self) -> None:
        """Refuse what was accepted and is not answered yet, with 503, and wait for no thread."""
        self._abandoned = True
        for task in self._working:
            task.cancel()

    def close(self) -> None:
        """End the threads; what still waits is dropped, and an engine that works on is waited for a moment only."""
        self.ended = self.batcher.stop(0.0 if self._abandoned else _LAST_BATCH)
        self._threads.shutdown(wait=not self._abandoned, cancel_futures=True)

    async def answer(self, request: Request, wire: WireFormat) -> Response:
        """Answer one request, or raise `ServingError`."""
        seconds = self.settings.timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._answer(request, wire)
        except TimeoutError:
            raise ServingError(
                504, "timeout", f"not answered within {seconds:g} s; its waiting rows were dropped"
            ) from None

    async def _answer(self, request: Request, wire: WireFormat) -> Response:
        _check_media_type(request)
        if (
            int(request.headers.get("content-length", 0)) > self.settings.max_body
        ):  # h11 has let only digits pass
            raise self._too_large()
        held = 0
        try:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                held += len(chunk)
                self._held += len(chunk)
                if len(body) > self.settings.max_body:
                    raise self._too_large()
                if self._held > _BODIES * self.settings.max_body:
                    raise self._busy("too many bytes of requests are held")
            return await self._unless_disconnected(request, self._score_body(body, wire))
        finally:
            self._held -= held

    async def _unless_disconnected(self, request: Request, work: Awaitable[Response]) -> Response:
        """The work's result; it is cancelled when the client goes away."""
        working = asyncio.ensure_future(work)
        self._working.add(working)
        watching = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            if working.cancelled():
                raise ServingError(
                    503, "shutting_down", "the server was told to end before this was answered"
                )
            return working.result()
        finally:
            self._working.discard(working)
            for task in (working, watching):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _score_body(self, body: bytearray, wire: WireFormat) -> Response:
        loop = asyncio.get_running_loop()
        limit = self.settings.max_rows
        encoding_format, items = await loop.run_in_executor(self._threads, _parse, body, wire, limit)
        body.clear()  # those who wait for the answer hold it, too
        rows = sum(map(_responses_of, items))
        if self._accepted + rows > self.settings.max_queue:
            raise self._busy(f"{self._accepted} responses are being scored")
        self._accept(rows)
        try:
            outcomes = await self._score(items, stop_at_faults=not wire.carries_errors)
        finally:
            self._accept(-rows)
        faults = [(i, outcome) for i, outcome in enumerate(outcomes) if isinstance(outcome, Fault)]
        for _, fault in faults:
            self.metrics.bad_rows.labels(fault.kind).inc()
        if faults and not wire.carries_errors:
            raise _refusal(faults, len(items))
        return JSONAnswer(wire.answer(encoding_format, items, outcomes, self.settings.model_name))

    def _accept(self, rows: int) -> None:
        self._accepted += rows
        self.metrics.accepted.set(self._accepted)

    def _too_large(self) -> ServingError:
        return ServingError(413, "body_too_large", f"the body is longer than {self.settings.max_body_mb:g} MiB",
                            headers={"Connection": "close"})  # fmt: skip

    def _busy(self, message: str) -> ServingError:
        rate = self.batcher.rows_per_second
        seconds = min(60, max(1, math.ceil(self.batcher.rows_waiting / rate))) if rate else 1
        return ServingError(429, "overloaded", f"{message}; try again later",
                            headers={"Retry-After": str(seconds)})  # fmt: skip

    async def _score(self, items: list[Item], stop_at_faults: bool) -> list[Outcome]:
        """One outcome per item. With `stop_at_faults` nothing more is scored once a row turns out to be bad."""
        owner = object()
        faults: dict[int, Fault] = {}
        responses = [0] * len(items)  # that were encoded
        places: list[int] = []  # of the items whose sequences were submitted
        parts: list[asyncio.Future[list[Score | ScoringError]]] = []
        try:
            for piece in _pieces(items):
                encoded = await self._encode([item for _, item in piece])
                rows: list[EncodedRow] = []
                for (place, item), sequences in zip(piece, encoded, strict=True):
                    before = responses[place]  # of a row that was divided
                    responses[place] += _responses_of(item)
                    if isinstance(sequences, Fault):
                        faults.setdefault(place, _behind(sequences, before))
                    else:
                        rows += sequences
                        places += [place] * len(sequences)
                if stop_at_faults and faults:
                    self.batcher.drop(owner)
                else:
                    parts.append(asyncio.wrap_future(self.batcher.submit(owner, rows)))
            if stop_at_faults and faults:
                return [faults.get(place, ()) for place in range(len(items))]
            scores = [score for part in await asyncio.gather(*parts) for score in part]
        finally:
            self.batcher.drop(owner)
        found: list[list[Score | ScoringError]] = [[] for _ in items]
        for place, score in zip(places, scores, strict=True):
            found[place].append(score)
        return [faults.get(place) or _outcome(found[place]) for place in range(len(items))]

    async def _encode(self, items: list[Item]) -> list[tuple[EncodedRow, ...] | Fault]:
        loop = asyncio.get_running_loop()
        async with self._encoding:  # first come, first served
            while self.batcher.tokens_waiting > _AHEAD * self._scorer.engine.token_budget:
                await asyncio.sleep(0.005)
            return await loop.run_in_executor(
                self._threads, lambda: [self._encode_safely(item) for item in items]
            )

    def _encode_one(self, item: Item) -> tuple[EncodedRow, ...] | Fault:
        if isinstance(item, Fault):
            return item
        if isinstance(item, Row):
            encoded = self._scorer.encode(item)
            return encoded if isinstance(encoded, tuple) else fault_of(encoded)
        try:
            return (self._scorer.encode_rendered(item.text, add_bos=item.add_bos),)
        except EncodingError as error:
            return Fault(item.field, str(error))

    def _encode_safely(self, item: Item) -> tuple[EncodedRow, ...] | Fault:
        try:
            return self._encode_one(item)
        except Exception as error:  # of a tokenizer or a template: its neighbours are encoded all the same
            logger.exception("a row cannot be encoded")
            return Fault("row", f"it cannot be encoded: {type(error).__name__}", kind="engine_error")


def _check_media_type(request: Request) -> None:
    """Web pages of others can post anything but JSON to this server without being asked."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    came = None
    if content_type != "application/json" and not content_type.endswith("+json"):
        came = f"{content_type or 'no type'} came, expected 'Content-Type: application/json'"
    elif (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        came = f"Content-Encoding: {coding} came, expected a body as it is"
    if came:
        raise ServingError(415, "unsupported_media_type", came, headers={"Connection": "close"})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _responses_of(item: Item) -> int:
    return len(item.responses) if isinstance(item, Row) else 1


def _parse(body: bytearray, wire: WireFormat, max_rows: int) -> tuple[str, list[Item]]:
    """The form of the answer's vectors, and the items; nothing else of the request is kept while it is scored."""
    try:
        content = parse_json(body)
    except (ValueError, RecursionError) as error:
        raise ServingError(400, "invalid_json", f"the body cannot be read: {shortened(str(error))}") from None
    try:
        request = wire.request.model_validate(content)
    except ValidationError as error:
        field, message = _fault_of_request(error.errors(include_url=False, include_context=False))
        raise ServingError(422, "invalid_request", message, field=shortened(field) or None) from None
    items: list[Item] = []
    rows = 0
    for item in wire.items(request):
        rows += _responses_of(item)
        if rows > max_rows:  # before millions of them are made
            raise ServingError(
                413, "too_many_rows", f"more than {max_rows} responses came, the most of a request"
            )
        items.append(item)
    return getattr(request, "encoding_format", "float"), items


def _fault_of_request(errors: list[ErrorDetails]) -> tuple[str, str]:
    """The first field that is wrong, and what came and what was expected there."""
    first = errors[0]
    place = first["loc"]
    came = _KINDS.get(type(first["input"]), type(first["input"]).__name__)
    expected = _EXPECTED.get(first["type"])
    if place and place[-1] in _ALTERNATIVES:  # of several types
        place = place[:-1]
        tags = [e["loc"][-1] for e in errors if e["loc"][:-1] == place]
        expected = " or ".join(_ALTERNATIVES[tag] for tag in tags if tag in _ALTERNATIVES)
    field = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place).lstrip(".")
    if expected is not None:
        return field, f"{came} came, expected {expected}"
    if first["type"] == "missing":
        return field, "nothing came, expected this field"
    if first["type"] == "extra_forbidden":
        return field, "there is no such field"
    return field, first["msg"].removeprefix("Value error, ")


def _pieces(items: list[Item]) -> Iterator[list[tuple[int, Item]]]:
    """The items with their places, in pieces of at most `_CHUNK` responses; a row with more of them is divided."""
    piece: list[tuple[int, Item]] = []
    filled = 0
    for place, item in enumerate(items):
        parts: list[Item] = [item]
        if isinstance(item, Row) and len(item.responses) > _CHUNK:
            texts = item.responses
            parts = [replace(item, responses=texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK)]
        for part in parts:
            if piece and filled + _responses_of(part) > _CHUNK:
                yield piece
                piece, filled = [], 0
            piece.append((place, part))
            filled += _responses_of(part)
    if piece:
        yield piece


def _behind(fault: Fault, before: int) -> Fault:
    """The fault of a part of a row, the response counted in the whole row."""
    found = re.fullmatch(r"responses\[(\d+)\]", fault.field)
    return replace(fault, field=f"responses[{before + int(found[1])}]") if found else fault


def _outcome(scores: list[Score | ScoringError]) -> Outcome:
    failed = next((score for score in scores if isinstance(score, ScoringError)), None)
    if failed is None:
        return tuple(score for score in scores if isinstance(score, Score))
    return Fault("row", str(failed), kind="engine_error" if isinstance(failed, EngineError) else "not_scored")


def _refusal(faults: list[tuple[int, Fault]], items: int) -> ServingError:
    row, first = faults[0]
    failed = any(fault.kind == "engine_error" for _, fault in faults)
    return ServingError(
        500 if failed else 422,
        "engine_error" if failed else first.kind,
        f"{len(faults)} of {items} rows cannot be scored, and this format has no place for their errors; "
        f"row {row}: {shortened(first.reason)}",
        row=row,
        field=shortened(first.field),
        rows=[fault.record(i) for i, fault in faults[:_LISTED]],
    )
