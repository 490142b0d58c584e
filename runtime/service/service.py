"""Combine model, batcher, data set and uploads into the service behind the routes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from runtime.backends.base import Device
from runtime.core.errors import DeviceError, GroundingError, QueryError
from runtime.core.io.input_files import open_inside
from runtime.core.names import near_name
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.formatting import Answer, format_answers
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.media.clip_writer import check_encoder
from runtime.service.batching import Batcher, BatchOptions
from runtime.service.clips import ClipCutter
from runtime.service.http_errors import HttpError, unknown_video
from runtime.service.middleware import ApiKeys, GateOptions, cancel_on_disconnect
from runtime.service.multipart import read_form
from runtime.service.prometheus import Telemetry
from runtime.service.schemas import SentVideo, validate_form
from runtime.service.uploaded_files import display_name
from runtime.service.uploads import Upload, UploadOptions, Uploads, storing
from runtime.service.video_cache import Entry, VideoCache, VideoCatalog, check_windows

AnswerFormat = Literal["json", "csv", "srt"]
TEXT_TYPES = {"csv": "text/csv", "srt": "application/x-subrip"}
# Maximum size of the header that lists unknown words: proxies reject responses with more than 4 to 8 KiB of headers.
MAX_HEADER_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """The limits of a service.

    Attributes:
        timeout_s: maximum time of a request, in seconds.
        max_query_chars: maximum length of a query, in characters.
        cache_bytes: memory for prepared videos.
    """

    timeout_s: float = 30.0
    max_queries: int = 64
    max_query_chars: int = 500
    cache_bytes: int = 512 << 20
    batching: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    gate: GateOptions = dataclasses.field(default_factory=GateOptions)
    uploads: UploadOptions = dataclasses.field(default_factory=UploadOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.max_queries <= self.batching.queue_size:
            raise GroundingError(
                f"Expected --queue-size of at least {self.max_queries}, the maximum number of queries of one request, "
                f"got {self.batching.queue_size}. Correct the option.",
                code="invalid_option",
            )


class Service:
    """A model with the videos that clients can query.

    Args:
        model, digest: file name of the model and its SHA-256, for the health check and the metrics.
        media: directory of the video files of `data`.
        extractor: extractor of uploaded video files; None rejects them.

    Attributes:
        writes_clips: whether the service may have video files, and PyAV can write clips of them.
        draining: whether the service shuts down and rejects new requests.
    """

    def __init__(
        self,
        grounder: Grounder,
        data: DataSet | None = None,
        *,
        model: str = "model",
        digest: str = "",
        media: Path | None = None,
        extractor: Path | None = None,
        device: Device = "auto",
        threads: int | None = None,
        options: ServiceOptions | None = None,
    ) -> None:
        options = options or ServiceOptions()
        self.grounder = grounder
        self.model = model
        self.digest = digest
        self.options = options
        self.telemetry = Telemetry()
        self.catalog = VideoCatalog(data, media)
        self.batcher = Batcher(grounder, options.batching, self.telemetry.batch)
        self.cache = VideoCache(grounder, self.batcher, options.cache_bytes, self.telemetry)
        self.uploads = Uploads(
            options.uploads, grounder.manifest.features.clock, extractor, device, threads, self.cache.forget
        )
        self.keys = ApiKeys(options.gate.api_key)
        self.clips = ClipCutter(threads)
        self.writes_clips = (media is not None or extractor is not None) and has_encoder()
        self.draining = False
        self.telemetry.model.info(
            {"name": model, "digest": digest, "precision": grounder.manifest.precision, "part": grounder.manifest.part}
        )
        self.telemetry.gauge("queue_pairs", "Queries that wait.", lambda: self.batcher.depth)
        self.telemetry.gauge("video_cache_bytes", "Memory of prepared videos.", lambda: self.cache.bytes)
        self.telemetry.gauge("upload_bytes", "Disk space of uploads.", lambda: self.uploads.bytes)

    def close(self) -> None:
        """Finish the accepted queries, and delete the uploads."""
        self.draining = True
        self.batcher.close()
        self.cache.close()
        self.uploads.close()

    async def sweep(self) -> None:
        """Delete expired uploads."""
        self.uploads.sweep()

    async def ground(
        self,
        name: str,
        prepare: Callable[[], Awaitable[VideoInput]],
        queries: list[str],
        top_k: int,
        always_answer: bool = False,
        output: AnswerFormat = "json",
    ) -> Response:
        """Return the moments of queries as `infer --format` prints them; a header lists unknown words.

        Raises:
            HttpError: 422 if the model cannot encode a query, which is checked before any query is batched; 429 if the
                queue is full; 503 during shutdown; or `prepare` raised it.
        """
        unknown = self._count_unknown_words(queries)
        video = await prepare()
        check_windows(len(self.grounder.cut(video)), len(queries))
        # Without a threshold both kinds of requests are equal, and share batches.
        always_answer = always_answer and self.grounder.manifest.presence is not None
        result = await self.batcher.ground([(video, query) for query in queries], top_k, always_answer)
        answers = [
            Answer(query, name, video.duration + video.offset, moments) for query, moments in zip(queries, result)
        ]
        if output == "json":
            response = json_response([answer.to_dict() for answer in answers])
        else:
            response = Response(format_answers(answers, output) + "\n", media_type=TEXT_TYPES[output])
        if unknown:
            header, omitted = unknown_words(list(unknown))
            response.headers["drn-unknown-words"] = header
            if omitted:
                response.headers["drn-unknown-words-omitted"] = str(omitted)
        return response

    def _count_unknown_words(self, queries: list[str]) -> Counter[str]:
        unknown: Counter[str] = Counter()
        for number, query in enumerate(queries, 1):
            try:
                self.grounder.encode_query(query, unknown)
            except QueryError as error:
                prefix = f"Query {number}: " if len(queries) > 1 else ""
                raise HttpError(422, prefix + str(error), "invalid_query") from error
        return unknown

    async def video_input(self, name: str) -> VideoInput:
        """Return a video of the data set or an upload, prepared for the model; HttpError 404 if it is unknown."""
        if name in self.catalog:
            return await self.cache.get(name, lambda: self.catalog.load(name), self.catalog.stamp(name))
        upload = self.upload(name)
        extraction = upload.extraction
        if extraction is not None:
            await asyncio.wait((extraction,))
            # The upload may have been deleted meanwhile, which cancels its extraction.
            upload = self.upload(name)
            extraction.result()
        return await self.cache.get(name, upload.load)

    @functools.cached_property
    def examples(self) -> list[tuple[Entry, str | None]]:
        """Videos to begin with; see `VideoCatalog.examples`. Reading the annotations may take a second."""
        return self.catalog.examples(self.grounder.manifest.vocabulary)

    def describe_model(self) -> dict[str, Any]:
        """Return the JSON object that describes the model and what the service accepts."""
        manifest = self.grounder.manifest
        return {
            "model": self.model,
            "digest": self.digest,
            "precision": manifest.precision,
            "words": len(manifest.vocabulary),
            "no_match_threshold": manifest.presence.threshold if manifest.presence else None,
            "accepts_videos": self.uploads.accepts_videos,
            "writes_clips": self.writes_clips,
        }

    def upload(self, name: str) -> Upload:
        """Return an upload by its id; HttpError 404 if there is none."""
        upload = self.uploads.get(name)
        if upload is None:
            raise unknown_video(name, near_name(self.catalog.folded_names, name))
        return upload

    def entry(self, name: str) -> Entry:
        """Return the description of a video; HttpError 404 if it is unknown."""
        return self.catalog.entry(name) if name in self.catalog else self.upload(name).entry

    async def receive(self, request: Request, upload: Upload, form: type[SentVideo]) -> tuple[Any, Video | None]:
        """Store a form with one file in an upload.

        Returns:
            The validated fields, and the video of features. For a video file the extraction is started instead.

        Raises:
            HttpError: the form, the features or the video file are invalid or too large.
        """

        def choose_path(field: str) -> Path:
            if field not in ("features", "video"):
                raise HttpError(422, f"Expected a file called features or video, got {field[:80]!r}. Rename the field.")
            if field == "video" and not self.uploads.accepts_videos:
                raise HttpError(
                    422, "This service accepts no video files, because it runs without --extractor. Send features."
                )
            return upload.directory / f"{field}.sent"

        with storing():
            sent = await read_form(
                request.headers["content-type"],
                request.stream(),
                choose_path,
                lambda size: self.uploads.reserve(upload, size),
            )
        if len(sent.files) != 1:
            raise HttpError(422, f"Expected one file, called features or video, got {len(sent.files)}. Send one.")
        repeated = [name for name, values in sent.fields.items() if len(values) > 1 and name != "query"]
        if repeated:
            raise HttpError(422, f"The form contains the field {repeated[0][:80]!r} more than once. Send it once.")
        ((field, file),) = sent.files.items()
        requested = validate_form(
            form, {name: values if name == "query" else values[0] for name, values in sent.fields.items()}
        )
        upload.name = display_name(requested.name or Path(file.name).stem)
        if field == "video":
            if requested.duration is not None or requested.num_frames is not None:
                raise HttpError(
                    422, "The fields duration and num_frames apply to features. Leave them out with a video file."
                )
            await self.uploads.check_extractor()
            self.uploads.take_video(upload, file.path, requested.partial)
            return requested, None
        if requested.partial:
            raise HttpError(422, "The field partial applies to video files. Leave it out with features.")
        if requested.duration is None:
            raise HttpError(422, "Features need the field duration. Send the duration of their video in seconds.")
        dim = self.grounder.manifest.features.dim
        return requested, await self.uploads.take_features(
            upload, file.path, dim, requested.duration, requested.num_frames
        )

    async def ground_upload(self, request: Request, form: type[SentVideo], output: AnswerFormat = "json") -> Response:
        """Ground the queries of a form in the video of the same form, and delete the video; see `ground`."""
        with self.uploads.incoming() as upload:
            requested, video = await self.receive(request, upload, form)

            async def prepare() -> VideoInput:
                if upload.extraction is not None:
                    await upload.extraction
                return await self.cache.prepare(upload.load if video is None else lambda: video)

            answer = self.ground(
                upload.name, prepare, requested.query, requested.top_k, requested.always_answer, output
            )
            return await cancel_on_disconnect(request.receive, answer, self.options.timeout_s)

    def open_media(self, name: str) -> tuple[Path, int]:
        """Return the path and an open descriptor of the video file of a video; HttpError 404 if there is none."""
        path = self.entry(name).media
        with contextlib.suppress(OSError):
            if path is not None:
                return path, open_inside(path, path.parent)
        raise HttpError(
            404,
            f"The service has no video file of {name[:80]!r}. Choose a video whose `media` is not null.",
            "no_media",
        )

    async def cut_clip(self, name: str, start: float, end: float) -> int:
        """Return an open descriptor of a clip, whose file is deleted already; see `ClipCutter.cut`.

        Raises:
            HttpError: 404 without a video file (code `no_media`) or PyAV (`no_clips`), and as `ClipCutter.cut`.
        """
        if not self.writes_clips:
            raise HttpError(404, "This service cannot write clips. Install it with the extra [video].", "no_clips")
        _, media = self.open_media(name)
        try:
            with self.uploads.incoming() as upload:
                path = upload.directory / "clip.mp4"
                await self.clips.cut(media, start, end, path)
                return os.open(path, os.O_RDONLY)
        finally:
            os.close(media)

    def to_dict(self, entry: Entry) -> dict[str, Any]:
        """Return the JSON object that describes a video."""
        return {
            "id": entry.id,
            "name": entry.name,
            "duration": entry.duration or None,
            "num_frames": entry.num_frames or None,
            "media": self.keys.ticket(f"/v1/videos/{quote(entry.id, safe='')}/media") if entry.media else None,
            "state": entry.state,
            "problem": entry.problem,
        }


def has_encoder() -> bool:
    """Return whether PyAV is installed and has an encoder for clips."""
    try:
        check_encoder()
    except DeviceError:
        return False
    return True


def unknown_words(words: Sequence[str]) -> tuple[str, int]:
    """Return words as a percent-encoded JSON list of at most 2,048 bytes, and the number of omitted words."""
    free = MAX_HEADER_BYTES - len(quote("[]"))
    for count, word in enumerate(words):
        free -= len(quote(json.dumps(word) + ", "))
        if free < 0:
            return quote(json.dumps(words[:count])), len(words) - count
    return quote(json.dumps(words)), 0


def json_response(value: Any, status: int = 200) -> Response:
    """Return a JSON response; NaN, which JSON does not have, is an error."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
