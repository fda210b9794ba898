"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from adajudge import __version__
from adajudge.scoring import Scorer
from adajudge.serving.errors import JSONAnswer, ServingError
from adajudge.serving.formats import FORMATS, WireFormat
from adajudge.serving.gate import Gate, is_authorized
from adajudge.serving.service import Service
from adajudge.serving.settings import Settings


def create_app(scorer: Scorer, settings: Settings) -> Gate:
    """The ASGI application: FastAPI behind a gate, which a server drains before it ends."""
    service = Service(scorer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(title="adajudge", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    paths = frozenset({wire.path for wire in FORMATS} | {"/health", "/metrics", "/v1/models"})
    gate = Gate(app, service, paths)
    for wire in FORMATS:
        schema = {
            "content": {"application/json": {"schema": wire.request.model_json_schema()}},
            "required": True,
        }
        app.post(
            wire.path,
            summary=(wire.request.__doc__ or "").splitlines()[0],
            openapi_extra={"requestBody": schema},
        )(_endpoint(service, wire))

    @app.get("/health")
    async def health(request: Request) -> Response:
        """Whether new work is accepted; with the key also which judge is served."""
        draining, failing = gate.draining, service.batcher.failing
        state = "draining" if draining else "failing" if failing else "ok"
        body: dict[str, Any] = {"status": state, "accepting": not draining}
        if is_authorized(request.headers.get("authorization"), settings.api_key):
            body |= {"model": settings.model_name, "version": __version__}
            body |= {"device": str(scorer.engine.device), "max_length": scorer.encoder.max_length}
        return JSONAnswer(body, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        """The one judge, in OpenAI's form."""
        model = {
            "id": settings.model_name,
            "object": "model",
            "created": service.started,
            "owned_by": "adajudge",
        }
        return JSONAnswer({"object": "list", "data": [model]})

    @app.exception_handler(ServingError)
    async def on_serving_error(_: Request, error: ServingError) -> Response:
        service.metrics.refused.labels(error.kind).inc()
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        service.metrics.refused.labels(kind).inc()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ServingError(error.status_code, kind, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> Response:  # the server logs the traceback
        service.metrics.refused.labels("internal_error").inc()
        return ServingError(500, "internal_error", f"the server failed: {type(error).__name__}").response()

    return gate


def _endpoint(service: Service, wire: WireFormat) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await service.answer(request, wire)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    endpoint.__name__ = wire.path.strip("/").replace("/", "_")
    return endpoint
