"""Errors of the server: one class, one shape on the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ServingError(Exception):
    """A request cannot be served.

    On the wire: ``{"error": {"type", "message", "row"?, "field"?, "rows"?}}``.

    Args:
        status: of HTTP.
        kind: word for programs, e.g. ``"invalid_row"``.
        message: what came and what was expected.
        row: which of the request's rows, from 0.
        field: path of the field at fault.
        rows: every bad row, where there may be several: ``{"row", "field", "type", "message"}``.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        row: int | None = None,
        field: str | None = None,
        rows: list[dict[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})
        parts = {"type": kind, "message": message, "row": row, "field": field, "rows": rows}
        self.body = {"error": {name: value for name, value in parts.items() if value is not None}}

    def response(self) -> Response:
        """The answer."""
        return JSONAnswer(self.body, self.status, self.headers)


class JSONAnswer(Response):
    """JSON in ASCII, so that half a surrogate pair in a client's text cannot break it, and never with NaN in it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
