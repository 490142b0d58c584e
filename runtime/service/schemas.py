"""Declare the bodies of requests and responses for validation and OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from runtime.core.errors import GroundingError, excerpt
from runtime.core.io.text_files import parse_json
from runtime.service.http_errors import HttpError

MAX_MOMENTS = 100


class Moment(BaseModel):
    """Start and end in seconds, as players of the video file count them, and a score."""

    start: float
    end: float
    score: float


class Grounded(BaseModel):
    """The moments of one query, best first."""

    query: str
    video: str
    moments: list[Moment]


class Problem(BaseModel):
    code: str = Field(description="stable identifier for programs", examples=["not_found"])
    message: str = Field(description="what happened, and what to do")


class Failure(BaseModel):
    """The JSON body of every failed request."""

    error: Problem


class VideoEntry(BaseModel):
    id: str
    name: str
    duration: float | None = Field(description="seconds; null until it is known")
    num_frames: int | None = Field(description="number of frames, if known")
    media: str | None = Field(description="address of the video file for a player, if the service has the file")
    state: Literal["ready", "extracting", "failed"] = Field(description="queries wait while features are extracted")
    problem: str | None = Field(description="reason of the failure")


class VideoList(BaseModel):
    total: int = Field(description="number of videos whose names contain the text")
    videos: list[VideoEntry]


class Example(BaseModel):
    video: VideoEntry
    query: str | None = Field(description="sentence about the video from the data set, if it has one")


class ExampleList(BaseModel):
    examples: list[Example]


class ModelEntry(BaseModel):
    model: str
    digest: str = Field(description="SHA-256 of the model file as it was loaded")
    precision: str = Field(examples=["fp32"])
    words: int = Field(description="number of words that the model knows")
    no_match_threshold: float | None = Field(
        description="score of the best moment below which a query has no moment; null if every query has moments"
    )
    accepts_videos: bool = Field(description="whether video files can be uploaded, not only features")
    writes_clips: bool = Field(description="whether the service can cut clips from video files")


class WordList(BaseModel):
    total: int = Field(description="number of known words that start with the prefix")
    words: list[str]


class Health(BaseModel):
    status: str = Field(description="ready, or draining during shutdown", examples=["ready"])
    model: str
    digest: str = Field(description="SHA-256 of the model file as it was loaded")


class SentVideo(BaseModel):
    """The text fields of a form with an uploaded file."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200, description="name in the answers; default: name of the file")] = ""
    duration: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="seconds; with features, not with a video file")
    ] = None
    num_frames: Annotated[
        int | None, Field(ge=2, description="number of frames; default: estimated from the number of clips")
    ] = None
    partial: Annotated[bool, Field(description="accept a damaged video file, and use what can be decoded")] = False


def request_models(max_queries: int, max_query_chars: int) -> tuple[type[BaseModel], type[SentVideo]]:
    """Return the pydantic models of a JSON query about a known video, and of a form with its own video."""
    sentence = Annotated[str, Field(min_length=1, max_length=max_query_chars)]
    one = {"type": "string", "minLength": 1, "maxLength": max_query_chars}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": max_queries}
    queries = Annotated[
        list[sentence],
        Field(min_length=1, max_length=max_queries),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ]
    count = Annotated[int, Field(ge=1, le=MAX_MOMENTS, description="maximum number of moments per query")]
    always = Annotated[bool, Field(description="return the best moments even below the model's no-match threshold")]

    class Question(BaseModel):
        """One or more queries about one video."""

        model_config = ConfigDict(extra="forbid", strict=True)

        video: Annotated[str, Field(min_length=1, max_length=200, description="id of the video")]
        query: Annotated[queries, WithJsonSchema({"description": "one query, or several", "anyOf": [one, several]})]
        top_k: count = 5
        always_answer: always = False

    class SentQuestion(SentVideo):
        """One or more queries about the video in the same form."""

        query: Annotated[queries, WithJsonSchema({"description": "one field per query", **several})]
        top_k: count = 5
        always_answer: always = False

    return Question, SentQuestion


def form_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI schema of a form with these text fields and one file."""
    schema = model.model_json_schema()
    for name, description in (("features", ".npy or .npz file of (num_clips, D) floats"), ("video", "video file")):
        schema["properties"][name] = {"type": "string", "format": "binary", "description": description}
    schema["anyOf"] = [{"required": ["features", "duration"]}, {"required": ["video"]}]
    return schema


def parse_body(model: type[BaseModel], body: bytes) -> Any:
    """Return a validated JSON body.

    Raises:
        HttpError: 422 if it is not JSON, repeats a name or does not match the model.
    """
    try:
        value = model.model_validate_json(body)
        # pydantic uses the last of several values of one name, without an error.
        parse_json(body.decode(), "The request", advice="send every name once; /docs describes the body")
        return value
    except ValidationError as error:
        raise HttpError(422, format_validation_errors(error.errors())) from error
    except GroundingError as error:
        raise HttpError(422, str(error)) from error


def validate_form(model: type[BaseModel], fields: dict[str, Any]) -> Any:
    """Return the validated text fields of a form; HttpError 422 if they do not match the model."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise HttpError(422, format_validation_errors(error.errors())) from error


def format_validation_errors(problems: Any) -> str:
    """Return the first three validation errors of a request, from pydantic's `errors()`, as one message."""
    shown = [
        f"{excerpt('.'.join(map(str, problem['loc'])))[1:-1] or 'the body'}: {excerpt(problem['msg'])[1:-1]}"
        for problem in problems[:3]
    ]
    return f"The request is invalid: {'; '.join(shown)}. /docs describes it."
