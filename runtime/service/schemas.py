"""Declare requests and answers, as OpenAPI describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from runtime.core.errors import GroundingError, excerpt
from runtime.core.io.text_files import parse_json
from runtime.service.http_errors import HttpError

MAX_MOMENTS = 100


class Moment(BaseModel):
    """A part of the video, in seconds as players of its file count them, and how well it fits."""

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
    """The JSON body of every failed request."""

    error: Problem


class VideoEntry(BaseModel):
    id: str
    name: str
    duration: float | None = Field(description="seconds, once known")
    num_frames: int | None = Field(description="where it is known")
    media: str | None = Field(description="where a player finds the video, if the service has its file")
    state: Literal["ready", "extracting", "failed"] = Field(description="questions wait while it is extracting")
    problem: str | None = Field(description="why it failed")


class VideoList(BaseModel):
    total: int = Field(description="videos whose names contain the text")
    videos: list[VideoEntry]


class Health(BaseModel):
    status: str = Field(description="ready, or draining while it ends", examples=["ready"])
    model: str
    digest: str = Field(description="SHA-256 of the model file as it was loaded")


class SentVideo(BaseModel):
    """The fields of a form beside its file."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200, description="what answers call it; the file's name when left out")] = ""
    duration: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="seconds; of features, not of a video file")
    ] = None
    num_frames: Annotated[int | None, Field(ge=2, description="frames; from the number of clips when left out")] = None
    partial: Annotated[bool, Field(description="use what can be decoded of a damaged video file")] = False


def request_models(most_queries: int, longest_query: int) -> tuple[type[BaseModel], type[SentVideo]]:
    """Return the models of a question about a known video and of one that brings its video, within these limits."""
    sentence = Annotated[str, Field(min_length=1, max_length=longest_query)]
    one = {"type": "string", "minLength": 1, "maxLength": longest_query}
    several = {"type": "array", "items": one, "minItems": 1, "maxItems": most_queries}
    queries = Annotated[
        list[sentence],
        Field(min_length=1, max_length=most_queries),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ]
    count = Annotated[int, Field(ge=1, le=MAX_MOMENTS, description="most moments for each sentence")]

    class Question(BaseModel):
        """One or more sentences about one video."""

        model_config = ConfigDict(extra="forbid", strict=True)

        video: Annotated[str, Field(min_length=1, max_length=200, description="its id")]
        query: Annotated[queries, WithJsonSchema({"description": "a sentence, or several", "anyOf": [one, several]})]
        top_k: count = 5

    class SentQuestion(SentVideo):
        """One or more sentences about the video in the same form."""

        query: Annotated[queries, WithJsonSchema({"description": "one field for each sentence", **several})]
        top_k: count = 5

    return Question, SentQuestion


def form_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a form with a file beside these fields."""
    schema = model.model_json_schema()
    for name, what in (("features", "a .npy or .npz file of (num_clips, D) floats"), ("video", "a video file")):
        schema["properties"][name] = {"type": "string", "format": "binary", "description": what}
    schema["anyOf"] = [{"required": ["features", "duration"]}, {"required": ["video"]}]
    return schema


def parse_body(model: type[BaseModel], body: bytes) -> Any:
    try:
        value = model.model_validate_json(body)
        # pydantic uses the last of several values of one name, without an error.
        parse_json(body.decode(), "The request", advice="send every name once; see /docs for what is expected")
        return value
    except ValidationError as error:
        raise HttpError(422, format_validation_errors(error.errors(include_url=False, include_input=False))) from error
    except GroundingError as error:
        raise HttpError(422, str(error)) from error


def validate_form(model: type[BaseModel], fields: dict[str, Any]) -> Any:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise HttpError(422, format_validation_errors(error.errors(include_url=False, include_input=False))) from error


def format_validation_errors(problems: Any) -> str:
    """Return what is wrong with a request, the first few places of it."""
    places = [
        f"{excerpt('.'.join(map(str, problem['loc'])))[1:-1] or 'the body'}: {excerpt(problem['msg'])[1:-1]}"
        for problem in problems[:3]
    ]
    return f"The request cannot be read: {'; '.join(places)}. See /docs for what is expected."
