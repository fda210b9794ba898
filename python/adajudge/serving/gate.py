"""What stands in front of every endpoint: key, host, draining, and the count of requests that are being answered."""

from __future__ import annotations

import base64
import binascii
import hmac
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adajudge.serving.errors import ServingError
from adajudge.serving.service import Service


class Gate:
    """An ASGI application around another.

    Attributes:
        draining: refuse new work with 503.
        in_flight: requests that were let in and are not answered yet.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app = app
        self._settings = service.settings
        self._metrics = service.metrics
        self._paths = paths
        self.service = service
        self.draining = False
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or refuse it before a byte of its body is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._paths else "other"
        status = "499"  # the client went away before there was an answer

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        started = time.perf_counter()
        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                self._metrics.refused.labels(refusal.kind).inc()
                await refusal.response()(scope, receive, send_and_see)
                return
            self.in_flight += 1
            try:
                await self._app(scope, receive, send_and_see)
            finally:
                self.in_flight -= 1
        finally:
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ServingError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._settings.accepts_host(host):
            return ServingError(403, "forbidden_host", f"{host!r} is not a name of this machine's loopback",
                                headers={"Connection": "close"})  # fmt: skip
        public = scope["path"] == "/health"
        if not public and not is_authorized(headers.get("authorization"), self._settings.api_key):
            return ServingError(
                401,
                "unauthorized",
                "expected the server's key as 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
            )
        if self.draining and not public and scope["method"] == "POST":
            return ServingError(503, "shutting_down", "the server is shutting down and takes no new requests",
                                headers={"Connection": "close", "Retry-After": "5"})  # fmt: skip
        return None


def is_authorized(header: str | None, key: str | None) -> bool:
    """Whether an ``Authorization`` header has the key: as a bearer token, or as a password.

    Clients that can be given nothing but a URL (OpenRLHF, verl) send a password: ``http://any:KEY@host:port``.
    """
    if key is None:
        return True
    scheme, _, value = (header or "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(given.encode(), key.encode())
