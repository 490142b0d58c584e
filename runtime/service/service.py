"""One model, its videos, and the queue before it: what the routes ask of."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from runtime.backends.base import Device
from runtime.core.errors import GroundingError, QueryError
from runtime.core.names import near_name
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.formatting import Answer
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.service.batching import Batcher, BatchOptions
from runtime.service.http_errors import HttpError, unknown_video
from runtime.service.middleware import ApiKeys, GateOptions, cancel_on_disconnect
from runtime.service.multipart import read_form
from runtime.service.prometheus import Telemetry
from runtime.service.schemas import SentVideo, validate_form
from runtime.service.uploads import Upload, UploadOptions, Uploads, shown_name, storing
from runtime.service.video_cache import Entry, VideoCache, VideoCatalog, check_windows

# Of the header that names unknown words: proxies refuse responses whose headers exceed 4 to 8 KiB in all.
MAX_HEADER_BYTES = 2048


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """The limits of one request.

    Attributes:
        timeout_s: seconds until a request is given up.
        most_queries: sentences of one request.
        longest_query: characters of a sentence.
        cache_bytes: of videos that stay ready.
        batching: how sentences wait for each other.
        gate: who may ask, and how much.
        uploads: how much clients may leave here.
    """

    timeout_s: float = 30.0
    most_queries: int = 64
    longest_query: int = 500
    cache_bytes: int = 512 << 20
    batching: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    gate: GateOptions = dataclasses.field(default_factory=GateOptions)
    uploads: UploadOptions = dataclasses.field(default_factory=UploadOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.most_queries <= self.batching.queue_size:
            raise GroundingError(
                f"--queue-size must hold one whole request of {self.most_queries} sentences, and is "
                f"{self.batching.queue_size}; choose a larger one.",
                code="invalid_option",
            )


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
        self.library = VideoCatalog(data, media)
        self.batcher = Batcher(grounder, options.batching, self.telemetry.batch)
        self.shelf = VideoCache(grounder, self.batcher, options.cache_bytes, self.telemetry)
        self.uploads = Uploads(
            options.uploads, grounder.manifest.features.clock, extractor, device, threads, self.shelf.forget
        )
        self.keys = ApiKeys(options.gate.api_key)
        self.draining = False
        self.telemetry.model(
            {"name": model, "digest": digest, "precision": grounder.manifest.precision, "part": grounder.manifest.part}
        )
        self.telemetry.gauge("queue_pairs", "Sentences that wait.", lambda: self.batcher.depth)
        self.telemetry.gauge("video_cache_bytes", "Memory of videos that are ready.", lambda: self.shelf.bytes)
        self.telemetry.gauge("upload_bytes", "Disk that uploads take.", lambda: self.uploads.bytes)

    def close(self) -> None:
        """Finish what was taken, and end; nothing stays on the disk."""
        self.draining = True
        self.batcher.close()
        self.shelf.close()
        self.uploads.close()

    async def sweep(self) -> None:
        """Remove uploads that nobody asks any more."""
        self.uploads.sweep()

    async def ground(
        self, name: str, ready: Callable[[], Awaitable[VideoInput]], queries: list[str], top_k: int
    ) -> Response:
        """Answer as `infer --format json` prints it; a header names the words that the model does not know.

        Args:
            name: of the video, in the answer.
            ready: returns the video as the model takes it.
            queries: sentences.
            top_k: most moments for each.

        Raises:
            Refusal: the model cannot take a sentence. That is seen before any is asked, so that it fails nobody else.
        """
        unheard = self._unheard(queries)
        subject = await ready()
        check_windows(len(self.grounder.cut(subject)), len(queries))
        result = await self.batcher.ask([(subject, query) for query in queries], top_k)
        answers = [
            Answer(query, name, subject.duration + subject.offset, moments).to_dict()
            for query, moments in zip(queries, result)
        ]
        response = json_response(answers)
        if unheard:
            shown, omitted = unknown_words(list(unheard))
            response.headers["drn-unknown-words"] = shown
            if omitted:
                response.headers["drn-unknown-words-omitted"] = str(omitted)
        return response

    def _unheard(self, queries: list[str]) -> Counter[str]:
        unheard: Counter[str] = Counter()
        for number, query in enumerate(queries, 1):
            try:
                self.grounder.encode_query(query, unheard)
            except QueryError as error:
                which = f"Sentence {number}: " if len(queries) > 1 else ""
                raise HttpError(422, which + str(error), "invalid_query") from error
        return unheard

    async def subject(self, name: str) -> VideoInput:
        """Return a video as the model takes it; Refusal if it is not known."""
        if name in self.library:
            return await self.shelf.subject(name, lambda: self.library.load(name), self.library.stamp(name))
        upload = self.upload(name)
        extraction = upload.extraction
        if extraction is not None:
            await asyncio.wait((extraction,))
            # It may have been removed meanwhile, and its extraction cancelled.
            upload = self.upload(name)
            extraction.result()
        return await self.shelf.subject(name, upload.load)

    def upload(self, name: str) -> Upload:
        """Return an upload by its id; Refusal if there is none."""
        upload = self.uploads.get(name)
        if upload is None:
            raise unknown_video(name, near_name(self.library.folded_names, name))
        return upload

    def entry(self, name: str) -> Entry:
        return self.library.entry(name) if name in self.library else self.upload(name).entry

    async def receive(self, request: Request, upload: Upload, form: type[SentVideo]) -> tuple[Any, Video | None]:
        """Take a form with one file into an upload.

        Returns:
            The fields, and the video if features came. If it was a video file, its extraction is under way.
        """

        def place(field: str) -> Path:
            if field not in ("features", "video"):
                raise HttpError(422, f"The form has a file {field[:80]!r}; send one called features or video.")
            if field == "video" and not self.uploads.takes_videos:
                raise HttpError(
                    422, "This service takes no video files, as it was started without --extractor; send features."
                )
            return upload.directory / f"{field}.sent"

        with storing():
            sent = await read_form(
                request.headers["content-type"],
                request.stream(),
                place,
                lambda size: self.uploads.spend(upload, size),
            )
        if len(sent.files) != 1:
            raise HttpError(422, f"The form has {len(sent.files)} files; send one, called features or video.")
        many = [name for name, values in sent.fields.items() if len(values) > 1 and name != "query"]
        if many:
            raise HttpError(422, f"The field {many[0][:80]!r} is there more than once; send it once.")
        ((field, file),) = sent.files.items()
        requested = validate_form(
            form, {name: values if name == "query" else values[0] for name, values in sent.fields.items()}
        )
        upload.name = shown_name(requested.name or Path(file.name).stem)
        if field == "video":
            if requested.duration is not None or requested.num_frames is not None:
                raise HttpError(
                    422, "A video file contains its duration and frames; leave duration and num_frames out."
                )
            await self.uploads.check_extractor()
            self.uploads.take_video(upload, file.path, requested.partial)
            return requested, None
        if requested.partial:
            raise HttpError(422, "The field partial applies to video files; leave it out when you send features.")
        if requested.duration is None:
            raise HttpError(422, "Features need a duration, the length of their video in seconds; send it as a field.")
        dim = self.grounder.manifest.features.dim
        return requested, await self.uploads.take_features(
            upload, file.path, dim, requested.duration, requested.num_frames
        )

    async def ground_upload(self, request: Request, form: type[SentVideo]) -> Response:
        """Answer a form of a video and sentences, and forget the video."""
        with self.uploads.incoming() as upload:
            requested, video = await self.receive(request, upload, form)

            async def ready() -> VideoInput:
                if upload.extraction is not None:
                    await upload.extraction
                return await self.shelf.prepared(upload.load if video is None else lambda: video)

            answer = self.ground(upload.name, ready, requested.query, requested.top_k)
            return await cancel_on_disconnect(request.receive, answer, self.options.timeout_s)

    def shown(self, entry: Entry) -> dict[str, Any]:
        """Return a video as a list shows it."""
        return {
            "id": entry.id,
            "name": entry.name,
            "duration": entry.duration or None,
            "num_frames": entry.num_frames or None,
            "media": self.keys.ticket(f"/v1/videos/{quote(entry.id, safe='')}/media") if entry.media else None,
            "state": entry.state,
            "problem": entry.problem,
        }


def unknown_words(words: Sequence[str]) -> tuple[str, int]:
    """Return words as a percent-encoded JSON list of at most 2,048 bytes, and how many of them are left out."""
    room = MAX_HEADER_BYTES - len(quote("[]"))
    for count, word in enumerate(words):
        # The separator and the quotation marks are percent-encoded too.
        room -= len(quote(json.dumps(word) + ", "))
        if room < 0:
            return quote(json.dumps(words[:count])), len(words) - count
    return quote(json.dumps(words)), 0


def json_response(value: Any, status: int = 200) -> Response:
    # NaN is an error: JSON has none.
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")
