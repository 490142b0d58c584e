"""Answer requests inside Triton: ground sentences in clip features by the code that grounds files.

A request holds B videos of equally many clips, as rows, and Q sentences about each of them.

    QUERY (B, Q) text · FEATURES (B, num_clips, D) · DURATION (B, 1) seconds · NUM_FRAMES (B, 1), TOP_K (B, 1),
    WINDOWS (B, 3), ALWAYS_ANSWER (B, 1), all four optional
      -> MOMENTS (B, Q, K, 3) start and end in seconds, and score, best first · COUNT (B, Q) how many of K are moments

Those past the count are zeros: JSON, in which Triton answers HTTP, has no NaN.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts.onnx_metadata import MISMATCH
from runtime.backends.triton_backend import FrontConfig, open_networks
from runtime.backends.triton_protocol import (
    ABOUT_FILE,
    ALWAYS_ANSWER,
    COUNT,
    DURATION,
    FEATURES,
    MOMENTS,
    NO_WINDOWS,
    NUM_FRAMES,
    QUERY,
    TOP_K,
    WINDOWS,
)
from runtime.core.errors import GroundingError, ModelFileError, QueryError, ServerError
from runtime.core.io.digests import sha256
from runtime.core.io.text_files import read_text
from runtime.core.lru_cache import LruCache
from runtime.core.moments import Moment
from runtime.core.sliding_windows import Windows
from runtime.core.video import Origin, Video
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput

DEFAULT_TOP_K = 5
# Features of cached videos: 1.9 MB for half a minute of C3D.
MAX_CACHED_BYTES = 256 << 20
# How long the first request waits for networks that are still being loaded.
LOAD_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class _FrontRequest:
    """A request that can be answered: B videos, Q sentences and the most moments about each, and for all of them how
    videos are cut and whether a sentence that fits nothing in its video gets moments too."""

    videos: list[Video]
    queries: list[list[str]]
    top_k: list[int]
    how: tuple[Windows | None, bool]

    def pairs(self) -> list[tuple[Video, str]]:
        return [(video, query) for video, queries in zip(self.videos, self.queries) for query in queries]


class Front:
    """Answers the requests that Triton brings, those that come together in one batch.

    Args:
        pb: `triton_python_backend_utils`, which exists only inside Triton.
        args: what Triton passes to a model at its start.
        directory: of this version of the model, with `about.json`.
    """

    def __init__(self, pb: Any, args: Mapping[str, str], directory: Path) -> None:
        self._pb = pb
        # A new version is brought in while the old one answers; each asks the network that it was written with.
        self._version = int(args["model_version"])
        path = directory / ABOUT_FILE
        self._about = FrontConfig.from_json(read_text(path, "a description of the model", ModelFileError), str(path))
        _check_files(self._about, directory)
        self._grounder = Grounder(open_networks(self._about, self._call))
        self._videos = _VideoCache(MAX_CACHED_BYTES)
        self._waits = True

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response for each request, in their order. One that cannot be answered fails alone."""
        responses: list[Any] = [None] * len(requests)
        together: dict[tuple[Windows | None, bool], list[tuple[int, _FrontRequest]]] = {}
        for index, request in enumerate(requests):
            try:
                requested = self._read(request)
                together.setdefault(requested.how, []).append((index, requested))
            except GroundingError as error:
                responses[index] = self._refusal(error)
        for group in together.values():
            for index, response in self._answer(group):
                responses[index] = response
        return responses

    def _answer(self, group: Sequence[tuple[int, _FrontRequest]]) -> Iterator[tuple[int, Any]]:
        """Yield the positions of requests and their responses; all want it in one way."""
        grounder = copy.copy(self._grounder)
        grounder.windows, always = group[0][1].how
        most = max(max(requested.top_k) for _, requested in group)
        try:
            pairs = [
                (self._videos.subject(video, grounder), query)
                for _, requested in group
                for video, query in requested.pairs()
            ]
            result = iter(grounder.ground_batch(pairs, most, self._about.batch, presence=not always))
        except GroundingError as error:
            if len(group) == 1:
                yield group[0][0], self._refusal(error)
                return
            for one in group:
                yield from self._answer([one])
            return
        for index, requested in group:
            # The best k are the first k of the best K.
            answers = [[next(result)[:k] for _ in queries] for queries, k in zip(requested.queries, requested.top_k)]
            yield index, self._response(answers)

    def _read(self, request: Any) -> _FrontRequest:
        """Return what a request asks; GroundingError if it cannot be answered."""
        given = {name: self._input(request, name) for name in (QUERY, FEATURES, DURATION)}
        num_frames, top_k = (self._optional(request, name) for name in (NUM_FRAMES, TOP_K))
        queries = [[_text(query) for query in row] for row in given[QUERY]]
        if not queries or not queries[0]:
            raise QueryError(f"The request holds no sentence; send at least one in {QUERY}.", code="no_words")
        for query in dict.fromkeys(query for row in queries for query in row):
            self._grounder.encode_query(query)
        name = request.request_id() or "the video"
        videos = []
        for row, features in enumerate(given[FEATURES]):
            counted = self._grounder.manifest.features.clock.num_frames(len(features))
            frames = counted if num_frames is None else int(num_frames[row, 0])
            videos.append(self._videos.video(features, frames, float(given[DURATION][row, 0]), name))
        most = [DEFAULT_TOP_K] * len(videos) if top_k is None else [int(value) for value in top_k[:, 0]]
        if min(most) < 1:
            raise QueryError(f"{TOP_K} must be at least 1, and {min(most)} was given.", code="invalid_argument")
        return _FrontRequest(
            videos, queries, most, (self._windows(request), self._one(request, ALWAYS_ANSWER) == (True,))
        )

    def _windows(self, request: Any) -> Windows | None:
        sizes = self._one(request, WINDOWS)
        if sizes is None:
            return self._grounder.windows
        return None if sizes == NO_WINDOWS else Windows(*sizes)

    def _one(self, request: Any, name: str) -> tuple[Any, ...] | None:
        """Return what is the same for all rows of a request, if it is given."""
        given = self._optional(request, name)
        if given is None:
            return None
        if len(distinct := {tuple(row) for row in given.tolist()}) > 1:
            raise QueryError(f"All rows of a request have the same {name}; send others in a request of their own.")
        return distinct.pop()

    def _input(self, request: Any, name: str) -> np.ndarray:
        """Return an input; Triton answers requests without it by itself."""
        return self._pb.get_input_tensor_by_name(request, name).as_numpy()

    def _optional(self, request: Any, name: str) -> np.ndarray | None:
        tensor = self._pb.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def _response(self, answers: Sequence[Sequence[Sequence[Moment]]]) -> Any:
        counts = np.array([[len(moments) for moments in row] for row in answers], np.int32)
        # At least one row, so that no answer has a size of 0.
        moments = np.zeros((*counts.shape, max(1, counts.max()), 3), np.float64)
        for location, row in zip(moments, answers):
            for rows, result in zip(location, row):
                if result:
                    rows[: len(result)] = [(moment.start, moment.end, moment.score) for moment in result]
        tensor = self._pb.Tensor
        return self._pb.InferenceResponse(output_tensors=[tensor(MOMENTS, moments), tensor(COUNT, counts)])

    def _refusal(self, error: GroundingError) -> Any:
        kinds = self._pb.TritonError
        kind = kinds.INTERNAL if isinstance(error, ServerError) else kinds.INVALID_ARG
        return self._pb.InferenceResponse(error=kinds(str(error), kind))

    def _wait(self) -> None:
        """Return when the networks are loaded, or after a minute; then the call will say why it fails.

        Triton loads them at the same time as the front, which may be ready first and take the place of the version
        before it. It cannot be waited for there: asked while it starts, Triton 2.51 may crash.
        """
        until = time.monotonic() + LOAD_SECONDS
        for name in filter(None, (self._about.video_network, self._about.network)):
            while not self._pb.is_model_ready(model_name=name, model_version=str(self._version)):
                if time.monotonic() > until:
                    return
                time.sleep(0.05)

    def _call(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run another model of this server; ServerError if it fails."""
        pb = self._pb
        if self._waits:
            self._wait()
            self._waits = False
        request = pb.InferenceRequest(
            model_name=model,
            model_version=self._version,
            requested_output_names=list(outputs),
            inputs=[pb.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
            # What a GPU computed is wanted here as an array.
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            said = " ".join(response.error().message().split()).rstrip(".")
            raise ServerError(f"{model}, version {self._version}, did not answer: {said}.")
        # Copied: an encoding lives longer than the response.
        return [np.array(pb.get_output_tensor_by_name(response, name).as_numpy()) for name in outputs]


def _check_files(about: FrontConfig, directory: Path) -> None:
    """Raise ModelFileError if a network of this version is not the file that the repository was written with.

    Triton itself reads the networks. Where it was given a copy of the front alone, they are not there to be read.
    """
    for name, digest in about.files.items():
        model, file = name.split("/")
        path = directory.parent.parent / model / directory.name / file
        if path.is_file() and sha256(path) != digest:
            raise ModelFileError(
                f"{path} is not the file that {directory} was written with: it is damaged, or was replaced. Write the "
                "repository again with `python -m export.triton`.",
                code=MISMATCH,
            )


class _VideoCache:
    """Store the last videos by their content, so that each is pooled and encoded once.

    Comparing takes a tenth of the time of a hash.

    Args:
        max_bytes: of their features; their encodings take less than a third more.
    """

    def __init__(self, max_bytes: int) -> None:
        # By id, with what a split model encodes each to, by the windows.
        self._videos: LruCache[int, tuple[Video, dict[Windows | None, VideoInput]]] = LruCache(max_bytes)

    def video(self, features: np.ndarray, num_frames: int, duration: float, name: str) -> Video:
        """Return the stored video of these features, (num_clips, D), or else a new one that is stored.

        Raises:
            FeatureError: as `Video`.
        """
        for key, (known, _) in self._videos.items():
            same = (known.num_frames, known.duration, known.features.shape) == (num_frames, duration, features.shape)
            if same and np.array_equal(known.features[0], features[0]) and np.array_equal(known.features, features):
                self._videos.get(key)
                return known
        # A request's memory is the server's, and ends with it.
        origin = Origin(f"Correct {NUM_FRAMES}, or send {FEATURES} with this clip timing.")
        video = Video(np.array(features), num_frames, duration, name, origin)
        self._videos.put(id(video), (video, {}), video.features.nbytes)
        return video

    def subject(self, video: Video, grounder: Grounder) -> VideoInput:
        """Return a video, or its encoded windows if a split model grounds it in windows.

        A `Grounder` itself stores the encodings of videos that are not cut.

        Raises:
            ServerError: as the call of the network.
        """
        if not grounder.is_pair or not grounder.cut(video):
            return video
        _, encoded = self._videos.get(id(video)) or (video, {})
        if grounder.windows not in encoded:
            encoded[grounder.windows] = grounder.encode(video)
        return encoded[grounder.windows]


def _text(value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise QueryError(f"A query should be UTF-8 text, and byte {error.start} of one is not.") from error
