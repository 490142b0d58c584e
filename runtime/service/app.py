"""Define the routes: sentences in, moments out, videos, the page and metrics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from runtime.core.errors import GroundingError, excerpt
from runtime.core.io.input_files import open_inside
from runtime.service.http_errors import HttpError, to_http_error
from runtime.service.middleware import ClientDisconnected, RequestGuard, cancel_on_disconnect
from runtime.service.schemas import (
    Failure,
    Grounded,
    Health,
    SentVideo,
    VideoEntry,
    VideoList,
    form_schema,
    format_validation_errors,
    parse_body,
    request_models,
)
from runtime.service.service import Service, json_response
from runtime.service.video_cache import MEDIA_TYPES

JSON = "application/json"
READ = ["GET", "HEAD"]
MULTIPART = "multipart/form-data"
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request cannot be served; the message says why and what to do."},
    "5XX": {"model": Failure, "description": "The service cannot answer now."},
}


def application(service: Service) -> RequestGuard:
    """Return the service as an ASGI application."""
    return RequestGuard(
        _routes(service), service.options.gate, service.keys, service.telemetry, lambda: service.draining
    )


def _routes(service: Service) -> FastAPI:
    """Return the routes of a service."""
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
    _add_status(app, service)
    _add_page(app)
    for kind, refuse in _HANDLERS:
        app.add_exception_handler(kind, _handler(refuse))
    return app


def _add_grounding(app: FastAPI, service: Service) -> None:
    """Serve queries about a video."""
    options = service.options
    question, sent_question = request_models(options.most_queries, options.longest_query)
    asked_so = {JSON: question.model_json_schema(), MULTIPART: form_schema(sent_question)}

    @app.post(
        "/v1/ground",
        response_model=list[Grounded],
        openapi_extra={"requestBody": _body(asked_so)},
    )
    async def ground(request: Request) -> Response:
        """Say when in a video each sentence happens: a video that is known here, or one that is sent along."""
        kind = _kind(request)
        if kind == MULTIPART:
            return await service.ground_upload(request, sent_question)
        if kind != JSON:
            raise _wrong_kind(kind, JSON, MULTIPART)
        requested = parse_body(question, await request.body())

        answer = service.ground(
            requested.video, lambda: service.subject(requested.video), requested.query, requested.top_k
        )
        return await cancel_on_disconnect(request.receive, answer, options.timeout_s)


def _add_videos(app: FastAPI, service: Service) -> None:
    """Serve the videos of the data set, and those that clients send."""

    @app.get("/v1/videos", response_model=VideoList)
    async def videos(
        contains: Annotated[str, Query(max_length=200, description="a part of the name")] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """List the videos of the data set, by name."""
        total, result = service.library.page(contains, offset, limit)
        return json_response({"total": total, "videos": [service.shown(entry) for entry in result]})

    @app.get("/v1/videos/{video}", response_model=VideoEntry)
    async def video_entry(video: str) -> Response:
        """Tell of one video."""
        return json_response(service.shown(service.entry(video)))

    @app.post(
        "/v1/videos",
        response_model=VideoEntry,
        status_code=201,
        openapi_extra={"requestBody": _body({MULTIPART: form_schema(SentVideo)})},
    )
    async def send(request: Request) -> Response:
        """Send a video, as features or as a file, to be asked by its id; it is kept for a while."""
        if _kind(request) != MULTIPART:
            raise _wrong_kind(_kind(request), MULTIPART)
        with service.uploads.incoming() as upload:
            await service.receive(request, upload, SentVideo)
            service.uploads.keep(upload)
        return json_response(service.shown(upload.entry), 201)

    @app.delete("/v1/videos/{video}", status_code=204)
    async def forget(video: str) -> Response:
        """Remove an upload before its time."""
        if video in service.library:
            raise HttpError(403, f"{excerpt(video)} belongs to the data set; only uploads can be removed.")
        service.uploads.forget(service.upload(video))
        return Response(status_code=204)

    @app.get("/v1/videos/{video}/media", response_class=FileResponse)
    async def media(video: str) -> Response:
        """The video itself, for a player; ranges are served."""
        path = service.entry(video).media
        try:
            handle = None if path is None else open_inside(path, path.parent)
        except OSError:
            handle = None
        if path is None or handle is None:
            raise HttpError(404, f"The service has no file that plays {video[:80]!r}.", "no_media")
        return _Opened(handle, MEDIA_TYPES[path.suffix.lower()])


def _add_status(app: FastAPI, service: Service) -> None:
    """Serve whether the service takes requests, and its metrics."""

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Return whether the service accepts requests; 503 while it shuts down."""
        draining = service.draining
        about = {"status": "draining" if draining else "ready", "model": service.model, "digest": service.digest}
        return json_response(about, 503 if draining else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters, in Prometheus's text format."""
        return Response(service.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Opened(FileResponse):
    """The content of an open file, which is closed afterwards; its path is not looked at again."""

    def __init__(self, handle: int, media_type: str) -> None:
        super().__init__(f"/dev/fd/{handle}", media_type=media_type, stat_result=os.fstat(handle))
        self._handle = handle

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            os.close(self._handle)


def _body(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of a body of any of these types."""
    return {"required": True, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _wrong_kind(kind: str, *expected: str) -> HttpError:
    return HttpError(415, f"The body is {kind[:80] or 'of no type'}; send {' or '.join(expected)}.")


def _of_http(error: Exception) -> HttpError:
    assert isinstance(error, HTTPException)
    said = {
        404: "There is nothing at this address; /docs lists what there is.",
        405: "This address does not take this method; /docs lists what it takes.",
    }.get(error.status_code, str(error.detail))
    return HttpError(error.status_code, said, headers=dict(error.headers or {}))


def _of_validation(error: Exception) -> HttpError:
    assert isinstance(error, RequestValidationError)
    return HttpError(422, format_validation_errors(error.errors()))


def _of_grounding(error: Exception) -> HttpError:
    return error if isinstance(error, HttpError) else to_http_error(error)  # type: ignore[arg-type]


def _of_anything(error: Exception) -> HttpError:
    return HttpError(500, "The service failed on this request; report the time to its operator.")


_HANDLERS: tuple[tuple[type[Exception], Callable[[Exception], HttpError]], ...] = (
    (HTTPException, _of_http),
    (RequestValidationError, _of_validation),
    (HttpError, _of_grounding),
    (GroundingError, _of_grounding),
    (ClientDisconnected, lambda error: HttpError(499, "The client has left.", "gone")),
    (Exception, _of_anything),
)


def _handler(refuse: Callable[[Exception], HttpError]) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        refusal = refuse(error)
        return Response(refusal.body(), refusal.status, refusal.headers, "application/json")

    return handle


def _add_page(app: FastAPI) -> None:
    """Serve the files of the page, read once: no path from a request ever meets the disk."""
    files = {path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.suffix in PAGE_TYPES}

    def file(name: str, request: Request) -> Response:
        content = files.get(name)
        if content is None:
            raise HttpError(404, "There is nothing at this address; /docs lists what there is.")
        tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=PAGE_TYPES[Path(name).suffix], headers=headers)

    @app.api_route("/", methods=READ, include_in_schema=False)
    async def index(request: Request) -> Response:
        return file("index.html", request)

    @app.api_route("/docs", methods=READ, include_in_schema=False)
    async def docs(request: Request) -> Response:
        return file("docs.html", request)

    @app.api_route("/page/{name}", methods=READ, include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        return file(name, request)
