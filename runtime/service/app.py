"""The routes: sentences in, moments out, and what stands around them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from runtime.annotations import DataSet
from runtime.errors import GroundingError, QueryError
from runtime.grounder import Grounder, Subject
from runtime.service.batching import Batcher, BatchOptions
from runtime.service.gate import Gate, GateOptions, Gone, unless_gone
from runtime.service.library import MEDIA_TYPES, Entry, Library, Shelf
from runtime.service.refusals import Refusal, refusal_of
from runtime.service.telemetry import Telemetry
from runtime.timeline import Answer

log = logging.getLogger("drn.service")

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript"}


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """What one request may ask, and how long it may take.

    Attributes:
        timeout_s: seconds until a request is given up.
        most_queries: sentences of one request.
        longest_query: characters of a sentence.
        cache_bytes: of videos that stay ready.
        batching: how sentences wait for each other.
        gate: who may ask, and how much.
    """

    timeout_s: float = 30.0
    most_queries: int = 64
    longest_query: int = 500
    cache_bytes: int = 512 << 20
    batching: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    gate: GateOptions = dataclasses.field(default_factory=GateOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.most_queries <= self.batching.queue_size:
            raise GroundingError(
                f"--queue-size must hold one whole request of {self.most_queries} sentences, and is "
                f"{self.batching.queue_size}; choose a larger one."
            )


class Moment(BaseModel):
    """A part of the video, in seconds from its start, and how well it fits."""

    start: float
    end: float
    score: float


class Grounded(BaseModel):
    """The moments of one sentence, best first."""

    query: str
    video: str
    moments: list[Moment]


class Problem(BaseModel):
    code: str = Field(description="for programs", examples=["not_found"])
    message: str = Field(description="what happened, what was expected, and what to do")


class Failure(BaseModel):
    """How every request is answered that cannot be served."""

    error: Problem


class VideoEntry(BaseModel):
    id: str
    name: str
    duration: float = Field(description="seconds")
    num_frames: int
    media: str | None = Field(description="where a player finds the video, if the service has its file")


class VideoList(BaseModel):
    total: int = Field(description="videos whose names contain the text")
    videos: list[VideoEntry]


class Health(BaseModel):
    status: str = Field(description="ready, or draining while it ends", examples=["ready"])
    model: str
    digest: str = Field(description="SHA-256 of the model file as it was loaded")


class Service:
    """One model, its videos, and the queue before it."""

    def __init__(
        self,
        grounder: Grounder,
        data: DataSet | None = None,
        *,
        model: str = "model",
        digest: str = "",
        media: Path | None = None,
        options: ServiceOptions | None = None,
    ) -> None:
        options = options or ServiceOptions()
        self.grounder = grounder
        self.model = model
        self.digest = digest
        self.options = options
        self.telemetry = Telemetry()
        self.library = Library(data, media)
        self.batcher = Batcher(grounder, options.batching, self.telemetry.batch)
        self.shelf = Shelf(grounder, self.batcher, options.cache_bytes, self.telemetry.looked)
        self.gate = Gate(routes(self), options.gate, self.telemetry)
        self.telemetry.model(
            {"name": model, "digest": digest, "precision": grounder.manifest.precision, "part": grounder.manifest.part}
        )
        self.telemetry.gauge("queue_pairs", "Sentences that wait.", lambda: self.batcher.depth)
        self.telemetry.gauge("video_cache_bytes", "Memory of videos that are ready.", lambda: self.shelf.bytes)

    def close(self) -> None:
        """Finish what was taken, and end."""
        self.gate.draining = True
        self.batcher.close()
        self.shelf.close()

    async def ground(self, name: str, subject: Subject, queries: list[str], top_k: int) -> Response:
        """Answer as `infer --format json` prints it."""
        found = await self.batcher.ask([(subject, query) for query in queries], top_k)
        answers = [Answer(query, name, subject.duration, moments).to_dict() for query, moments in zip(queries, found)]
        return json_response(answers)

    def check_queries(self, queries: list[str]) -> None:
        """Raise Refusal unless the model can take every sentence: one that cannot be asked fails nobody else."""
        for number, query in enumerate(queries, 1):
            try:
                self.grounder.encode_query(query)
            except QueryError as error:
                which = f"Sentence {number}: " if len(queries) > 1 else ""
                raise Refusal(422, which + str(error), "invalid_query") from error

    async def subject(self, name: str) -> Subject:
        """Return a video as the model takes it; Refusal if it is not known."""
        if name in self.library:
            return await self.shelf.subject(name, lambda: self.library.load(name))
        raise unknown_video(name)

    def entry(self, name: str) -> Entry:
        if name in self.library:
            return self.library.entry(name)
        raise unknown_video(name)

    def shown(self, entry: Entry) -> dict[str, Any]:
        """Return a video as a list shows it."""
        place = None
        if entry.media is not None:
            place = f"/v1/videos/{entry.id}/media"
            if self.gate.needs_key:
                place += f"?ticket={self.gate.ticket(place)}"
        return {
            "id": entry.id,
            "name": entry.name,
            "duration": entry.duration,
            "num_frames": entry.num_frames,
            "media": place,
        }


def unknown_video(name: str) -> Refusal:
    return Refusal(
        404, f"There is no video {name[:80]!r} here; GET /v1/videos lists those that can be asked.", "unknown_video"
    )


def json_response(value: Any, status: int = 200) -> Response:
    # NaN is an error: JSON has none.
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def asking(options: ServiceOptions) -> type[BaseModel]:
    """Return the model of a question within these limits."""
    sentence = Annotated[str, Field(min_length=1, max_length=options.longest_query)]
    one = {"type": "string", "minLength": 1, "maxLength": options.longest_query}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": options.most_queries}

    class Question(BaseModel):
        """One or more sentences about one video."""

        model_config = ConfigDict(extra="forbid", strict=True)

        video: Annotated[str, Field(min_length=1, max_length=200, description="its id")]
        query: Annotated[
            list[sentence],
            Field(min_length=1, max_length=options.most_queries, description="a sentence, or several"),
            BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
            WithJsonSchema({"description": "a sentence, or several", "anyOf": [one, several]}),
        ]
        top_k: Annotated[int, Field(ge=1, le=100, description="most moments for each sentence")] = 5

    return Question


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request cannot be served; the message says why and what to do."},
    "5XX": {"model": Failure, "description": "The service cannot answer now."},
}


def routes(service: Service) -> FastAPI:
    """Return the routes of a service."""
    options = service.options

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="drn-deploy",
        summary="When in this video does this sentence happen?",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=FAILURES,
    )
    question = asking(options)

    @app.post(
        "/v1/ground",
        response_model=list[Grounded],
        openapi_extra={"requestBody": _body({"application/json": question.model_json_schema()})},
    )
    async def ground(request: Request) -> Response:
        """Say when in a video each sentence happens."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            asked = _parsed(question, await request.body())
        else:
            raise Refusal(415, f"The body is {kind or 'of no type'}; send application/json.")

        async def answer() -> Response:
            service.check_queries(asked.query)
            subject = await service.subject(asked.video)
            return await service.ground(asked.video, subject, asked.query, asked.top_k)

        return await unless_gone(request.receive, answer(), options.timeout_s)

    @app.get("/v1/videos", response_model=VideoList)
    async def videos(
        contains: Annotated[str, Query(max_length=200, description="a part of the name")] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response:
        """List the videos of the data set, by name."""
        total, found = service.library.page(contains, offset, limit)
        return json_response({"total": total, "videos": [service.shown(entry) for entry in found]})

    @app.get("/v1/videos/{video}", response_model=VideoEntry)
    async def video_entry(video: str) -> Response:
        """Tell of one video."""
        return json_response(service.shown(service.entry(video)))

    @app.get("/v1/videos/{video}/media", response_class=FileResponse)
    async def media(video: str) -> Response:
        """The video itself, for a player; ranges are served."""
        path = service.entry(video).media
        if path is None or not path.is_file():
            raise Refusal(404, f"The service has no file that plays {video[:80]!r}.", "no_media")
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix.lower()])

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Whether the service takes requests: 503 while it ends."""
        draining = service.gate.draining
        about = {"status": "draining" if draining else "ready", "model": service.model, "digest": service.digest}
        return json_response(about, 503 if draining else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters, in Prometheus's text format."""
        return Response(service.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_page(app)
    for kind, refuse in _HANDLERS:
        app.add_exception_handler(kind, _handler(refuse))
    return app


def _body(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return how OpenAPI tells of a body that comes in any of these types."""
    return {"required": True, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}


def _parsed(model: type[BaseModel], body: bytes) -> Any:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(422, _told(error.errors(include_url=False, include_input=False))) from error


def _told(problems: Any) -> str:
    """Return what is wrong with a request, the first few places of it."""
    places = [
        f"{'.'.join(str(part) for part in problem['loc']) or 'the body'}: {problem['msg']}" for problem in problems[:3]
    ]
    return f"The request cannot be read: {'; '.join(places)}. See /docs for what is expected."


def _of_http(error: Exception) -> Refusal:
    assert isinstance(error, HTTPException)
    said = {
        404: "There is nothing at this address; /docs lists what there is.",
        405: "This address does not take this method; /docs lists what it takes.",
    }.get(error.status_code, str(error.detail))
    return Refusal(error.status_code, said, headers=dict(error.headers or {}))


def _of_validation(error: Exception) -> Refusal:
    assert isinstance(error, RequestValidationError)
    return Refusal(422, _told(error.errors()))


def _of_grounding(error: Exception) -> Refusal:
    return error if isinstance(error, Refusal) else refusal_of(error)  # type: ignore[arg-type]


def _of_anything(error: Exception) -> Refusal:
    return Refusal(500, "The service failed on this request; tell whoever runs it when.")


_HANDLERS: tuple[tuple[type[Exception], Callable[[Exception], Refusal]], ...] = (
    (HTTPException, _of_http),
    (RequestValidationError, _of_validation),
    (Refusal, _of_grounding),
    (GroundingError, _of_grounding),
    (Gone, lambda error: Refusal(499, "The client has left.", "gone")),
    (Exception, _of_anything),
)


def _handler(refuse: Callable[[Exception], Refusal]) -> Callable[[Request, Exception], Response]:
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
            raise Refusal(404, "There is nothing at this address; /docs lists what there is.")
        tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
        headers = {"etag": tag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=PAGE_TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return file("index.html", request)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return file("docs.html", request)

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        return file(name, request)
