"""Define the routes: grounding, videos, health, metrics and the web page."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from runtime.core.errors import DeviceError, GroundingError, excerpt
from runtime.service.http_errors import HttpError, to_http_error
from runtime.service.middleware import RequestGuard, cancel_on_disconnect, request_id
from runtime.service.schemas import (
    ExampleList,
    Failure,
    Grounded,
    Health,
    ModelEntry,
    SentVideo,
    VideoEntry,
    VideoList,
    WordList,
    form_schema,
    format_validation_errors,
    parse_body,
    request_models,
)
from runtime.service.service import TEXT_TYPES, AnswerFormat, Service, json_response
from runtime.service.video_cache import MEDIA_TYPES

log = logging.getLogger("drn.service")

JSON = "application/json"
READ = ["GET", "HEAD"]
MULTIPART = "multipart/form-data"
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request is invalid; the message contains the reason and what to do."},
    "5XX": {"model": Failure, "description": "The service cannot answer now."},
}


def application(service: Service) -> RequestGuard:
    """Return the service as an ASGI application."""
    return RequestGuard(
        _routes(service), service.options.gate, service.keys, service.telemetry, lambda: service.draining
    )


def _routes(service: Service) -> FastAPI:
    app = FastAPI(
        title="drn-deploy",
        summary="When in this video does this sentence happen?",
        version="1",
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
    )
    _add_grounding(app, service)
    _add_videos(app, service)
    _add_media(app, service)
    _add_model(app, service)
    _add_status(app, service)
    _add_page(app)

    async def respond(request: Request, exception: Exception) -> Response:
        error = _to_http_error(exception)
        if isinstance(exception, DeviceError):
            # Clients do not get the message, so the operator needs it.
            log.error("[%s] %s %s failed: %s", request_id(request.scope), request.method, request.url.path, exception)
        service.telemetry.refused(error.code)
        return Response(error.body(), error.status, error.headers, JSON)

    for error_class in (HTTPException, RequestValidationError, HttpError, GroundingError, Exception):
        app.add_exception_handler(error_class, respond)
    return app


def _add_grounding(app: FastAPI, service: Service) -> None:
    options = service.options
    json_model, form_model = request_models(options.max_queries, options.max_query_chars)
    schemas = {JSON: json_model.model_json_schema(), MULTIPART: form_schema(form_model)}

    @app.post(
        "/v1/ground",
        response_model=list[Grounded],
        responses={
            200: {"content": {media_type: {"schema": {"type": "string"}} for media_type in TEXT_TYPES.values()}}
        },
        openapi_extra={"requestBody": _body(schemas)},
    )
    async def ground(
        request: Request,
        output: Annotated[AnswerFormat, Query(alias="format", description="as of `infer --format`")] = "json",
    ) -> Response:
        """Ground queries in a video of the data set, an earlier upload, or a video in the same form."""
        media_type = _media_type(request)
        if media_type == MULTIPART:
            return await service.ground_upload(request, form_model, output)
        if media_type != JSON:
            raise _unsupported_type(media_type, JSON, MULTIPART)
        requested = parse_body(json_model, await request.body())
        answer = service.ground(
            requested.video,
            lambda: service.video_input(requested.video),
            requested.query,
            requested.top_k,
            requested.always_answer,
            output,
        )
        return await cancel_on_disconnect(request.receive, answer, options.timeout_s)


def _add_videos(app: FastAPI, service: Service) -> None:

    @app.get("/v1/videos", response_model=VideoList)
    async def videos(
        contains: Annotated[str, Query(max_length=200, description="part of the name")] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """List the videos of the data set, sorted by name."""
        total, entries = service.catalog.page(contains, offset, limit)
        return json_response({"total": total, "videos": [service.to_dict(entry) for entry in entries]})

    @app.get("/v1/examples", response_model=ExampleList)
    async def examples() -> Response:
        """List videos of the data set to begin with, each with a sentence about it if the data set has one."""
        chosen = await asyncio.to_thread(lambda: service.examples)
        return json_response(
            {"examples": [{"video": service.to_dict(entry), "query": query} for entry, query in chosen]}
        )

    @app.get("/v1/videos/{video}", response_model=VideoEntry)
    async def video_entry(video: str) -> Response:
        """Describe one video."""
        return json_response(service.to_dict(service.entry(video)))

    @app.post(
        "/v1/videos",
        response_model=VideoEntry,
        status_code=201,
        openapi_extra={"requestBody": _body({MULTIPART: form_schema(SentVideo)})},
    )
    async def send(request: Request) -> Response:
        """Upload clip features or a video file, and return its id for queries. Unused uploads expire."""
        if _media_type(request) != MULTIPART:
            raise _unsupported_type(_media_type(request), MULTIPART)
        with service.uploads.incoming() as upload:
            await service.receive(request, upload, SentVideo)
            service.uploads.add(upload)
        return json_response(service.to_dict(upload.entry), 201)

    @app.delete("/v1/videos/{video}", status_code=204)
    async def forget(video: str) -> Response:
        """Delete an upload."""
        if video in service.catalog:
            raise HttpError(403, f"{excerpt(video)} belongs to the data set. Only uploads can be deleted.")
        service.uploads.remove(service.upload(video))
        return Response(status_code=204)


def _add_media(app: FastAPI, service: Service) -> None:

    @app.get("/v1/videos/{video}/media", response_class=FileResponse)
    async def media(video: str) -> Response:
        """Return the video file, for a player; range requests are supported."""
        path, handle = service.open_media(video)
        return _OpenFileResponse(handle, MEDIA_TYPES[path.suffix.lower()])

    @app.get("/v1/videos/{video}/clip", response_class=FileResponse)
    async def clip(
        request: Request,
        video: str,
        start: Annotated[float, Query(ge=0, le=10**9, allow_inf_nan=False, description="seconds, as players count")],
        end: Annotated[float, Query(gt=0, le=10**9, allow_inf_nan=False, description="at most 120 s after the start")],
    ) -> Response:
        """Return a part of the video file as an mp4 file, encoded again so that it starts and ends at any frame."""
        # After the body, only a disconnection is received.
        await request.body()
        cut = service.cut_clip(video, start, end)
        handle = await cancel_on_disconnect(request.receive, cut, service.options.timeout_s)
        return _OpenFileResponse(handle, "video/mp4")


def _add_model(app: FastAPI, service: Service) -> None:

    @app.get("/v1/model", response_model=ModelEntry)
    async def model() -> Response:
        """Describe the model, and what the service accepts."""
        return json_response(service.describe_model())

    @app.get("/v1/words", response_model=WordList)
    async def words(
        prefix: Annotated[str, Query(max_length=100, description="start of the words; case is ignored")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> Response:
        """List words that the model knows, in alphabetical order."""
        known = service.grounder.manifest.vocabulary.starting_with(prefix)
        return json_response({"total": len(known), "words": known[:limit]})


def _add_status(app: FastAPI, service: Service) -> None:

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Return whether the service accepts requests; 503 while it shuts down."""
        draining = service.draining
        health = {"status": "draining" if draining else "ready", "model": service.model, "digest": service.digest}
        return json_response(health, 503 if draining else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(service.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _OpenFileResponse(FileResponse):
    """Send an open file and close it; its path is not resolved again."""

    def __init__(self, handle: int, media_type: str) -> None:
        super().__init__(f"/dev/fd/{handle}", media_type=media_type, stat_result=os.fstat(handle))
        self._handle = handle

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            os.close(self._handle)


def _body(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of a body with one of several media types."""
    return {"required": True, "content": {media_type: {"schema": schema} for media_type, schema in schemas.items()}}


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported_type(actual: str, *expected: str) -> HttpError:
    return HttpError(
        415,
        f"Expected a body of type {' or '.join(expected)}, got {actual[:80] or 'no Content-Type'}. Set the header "
        "Content-Type.",
    )


def _not_found() -> HttpError:
    return HttpError(404, "This address does not exist. /docs lists all addresses.")


def _to_http_error(error: Exception) -> HttpError:
    """Return the HTTP error for an exception, also for those of FastAPI."""
    if isinstance(error, RequestValidationError):
        return HttpError(422, format_validation_errors(error.errors()))
    if not isinstance(error, HTTPException):
        return to_http_error(error)
    if error.status_code == 404:
        return _not_found()
    message = str(error.detail)
    if error.status_code == 405:
        message = "This address does not support the method. /docs lists the methods."
    return HttpError(error.status_code, message, headers=dict(error.headers or {}))


def _add_page(app: FastAPI) -> None:
    """Serve the files of the web page from memory, so that no path from a request reaches the file system."""
    files = {path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.suffix in PAGE_TYPES}

    async def file(name: str, request: Request) -> Response:
        content = files.get(name)
        if content is None:
            raise _not_found()
        tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=PAGE_TYPES[Path(name).suffix], headers=headers)

    @app.api_route("/", methods=READ, include_in_schema=False)
    @app.api_route("/docs", methods=READ, include_in_schema=False)
    async def page(request: Request) -> Response:
        return await file("docs.html" if request.url.path == "/docs" else "index.html", request)

    app.api_route("/page/{name}", methods=READ, include_in_schema=False)(file)
