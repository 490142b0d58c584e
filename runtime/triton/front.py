"""Answer requests inside Triton: ground queries in clip features, with the same code as outside.

A request contains B videos with the same number of clips, one per row, and Q queries about each of them.

    QUERY (B, Q) text · FEATURES (B, num_clips, D) · DURATION (B, 1) seconds · NUM_FRAMES (B, 1), TOP_K (B, 1),
    WINDOWS (B, 3), ALWAYS_ANSWER (B, 1), all four optional
      -> MOMENTS (B, Q, K, 3) start and end in seconds, and score, best first · COUNT (B, Q) how many of K are moments

Moments beyond the count are zeros, because JSON, the format of Triton's HTTP responses, has no NaN.
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
# Memory for features of cached videos; half a minute of C3D takes 1.9 MB.
MAX_CACHED_BYTES = 256 << 20
# Maximum time that the first request waits until the networks are loaded.
LOAD_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class _FrontRequest:
    """A valid request.

    Attributes:
        top_k: maximum number of moments per query, for each video.
        settings: windows of all videos, and whether queries without a match get moments too.
    """

    videos: list[Video]
    queries: list[list[str]]
    top_k: list[int]
    settings: tuple[Windows | None, bool]

    def pairs(self) -> list[tuple[Video, str]]:
        """Return the pairs of a video and a query: all queries of the first video, then those of the next."""
        return [(video, query) for video, queries in zip(self.videos, self.queries) for query in queries]


class Front:
    """Answer the requests of Triton; requests that arrive together are batched.

    Args:
        pb: `triton_python_backend_utils`, which exists only inside Triton.
        directory: directory of this version of the model, with `about.json`.

    Raises:
        ModelFileError: `about.json` is invalid, or a network is not the file that it records.
    """

    def __init__(self, pb: Any, args: Mapping[str, str], directory: Path) -> None:
        self._pb = pb
        # During an update two versions run at the same time. Each calls the networks of its own version.
        self._version = int(args["model_version"])
        path = directory / ABOUT_FILE
        self._about = FrontConfig.from_json(read_text(path, "a description of the model", ModelFileError), str(path))
        _check_files(self._about, directory)
        self._grounder = Grounder(open_networks(self._about, self._call))
        self._videos = _VideoCache(MAX_CACHED_BYTES)
        self._is_first_call = True

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response for each request, in order. A request that fails does not affect the others."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[Windows | None, bool], list[tuple[int, _FrontRequest]]] = {}
        for index, request in enumerate(requests):
            try:
                requested = self._read(request)
                groups.setdefault(requested.settings, []).append((index, requested))
            except GroundingError as error:
                responses[index] = self._error_response(error)
        for group in groups.values():
            for index, response in self._answer(group):
                responses[index] = response
        return responses

    def _answer(self, group: Sequence[tuple[int, _FrontRequest]]) -> Iterator[tuple[int, Any]]:
        """Yield the indices and responses of requests with the same settings."""
        grounder = copy.copy(self._grounder)
        grounder.windows, always_answer = group[0][1].settings
        max_top_k = max(max(requested.top_k) for _, requested in group)
        try:
            pairs = [
                (self._videos.windowed(video, grounder), query)
                for _, requested in group
                for video, query in requested.pairs()
            ]
            result = iter(grounder.ground_batch(pairs, max_top_k, self._about.batch, presence=not always_answer))
        except GroundingError as error:
            if len(group) == 1:
                yield group[0][0], self._error_response(error)
                return
            for entry in group:
                yield from self._answer([entry])
            return
        for index, requested in group:
            # The best k moments are the first k of the best K.
            answers = [[next(result)[:k] for _ in queries] for queries, k in zip(requested.queries, requested.top_k)]
            yield index, self._response(answers)

    def _read(self, request: Any) -> _FrontRequest:
        """Return a validated request; GroundingError if it is invalid."""
        # Triton itself rejects requests without a required input.
        query_rows, feature_rows, durations = (self._input(request, name) for name in (QUERY, FEATURES, DURATION))
        num_frames, top_k = (self._input(request, name) for name in (NUM_FRAMES, TOP_K))
        queries = [[_text(query) for query in row] for row in query_rows]
        if not queries or not queries[0]:
            raise QueryError(f"The request has no query. Send at least one in {QUERY}.", code="no_words")
        for query in dict.fromkeys(query for row in queries for query in row):
            self._grounder.encode_query(query)
        name = request.request_id() or "the video"
        videos = []
        for row, features in enumerate(feature_rows):
            estimated = self._grounder.manifest.features.clock.num_frames(len(features))
            frames = estimated if num_frames is None else int(num_frames[row, 0])
            videos.append(self._videos.video(features, frames, float(durations[row, 0]), name))
        limits = [DEFAULT_TOP_K] * len(videos) if top_k is None else [int(value) for value in top_k[:, 0]]
        if min(limits) < 1:
            raise QueryError(
                f"Expected {TOP_K} of at least 1, got {min(limits)}. Correct the request.", code="invalid_argument"
            )
        always_answer = self._common_value(request, ALWAYS_ANSWER) == (True,)
        return _FrontRequest(videos, queries, limits, (self._windows(request), always_answer))

    def _windows(self, request: Any) -> Windows | None:
        sizes = self._common_value(request, WINDOWS)
        if sizes is None:
            return self._grounder.windows
        return None if sizes == NO_WINDOWS else Windows(*sizes)

    def _common_value(self, request: Any, name: str) -> tuple[Any, ...] | None:
        """Return the value of an optional input that all rows must share; None without the input."""
        rows = self._input(request, name)
        if rows is None:
            return None
        if len(distinct := {tuple(row) for row in rows.tolist()}) > 1:
            raise QueryError(
                f"Expected the same {name} in all rows, got {len(distinct)} values. Send one request per value.",
                code="invalid_argument",
            )
        return distinct.pop()

    def _input(self, request: Any, name: str) -> Any:
        """Return an input as an array; None if the request lacks it."""
        tensor = self._pb.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def _response(self, answers: Sequence[Sequence[Sequence[Moment]]]) -> Any:
        counts = np.array([[len(moments) for moments in row] for row in answers], np.int32)
        # Triton clients cannot read an output with an axis of size 0.
        moments = np.zeros((*counts.shape, max(1, counts.max()), 3), np.float64)
        for video, video_answers in enumerate(answers):
            for query, result in enumerate(video_answers):
                if result:
                    moments[video, query, : len(result)] = [(best.start, best.end, best.score) for best in result]
        tensor = self._pb.Tensor
        return self._pb.InferenceResponse(output_tensors=[tensor(MOMENTS, moments), tensor(COUNT, counts)])

    def _error_response(self, error: GroundingError) -> Any:
        codes = self._pb.TritonError
        code = codes.INTERNAL if isinstance(error, ServerError) else codes.INVALID_ARG
        return self._pb.InferenceResponse(error=codes(str(error), code))

    def _wait(self) -> None:
        """Wait until the networks are loaded, at most a minute; the call that follows reports a failure.

        Triton loads networks and front at the same time, and the front may be ready first and replace its previous
        version. The constructor cannot wait, because Triton 2.51 may crash if a model queries others while it loads.
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
        if self._is_first_call:
            self._wait()
            self._is_first_call = False
        request = pb.InferenceRequest(
            model_name=model,
            model_version=self._version,
            requested_output_names=list(outputs),
            inputs=[pb.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            reason = " ".join(response.error().message().split()).rstrip(".")
            raise ServerError(f"{model}, version {self._version}, failed: {reason}. See the log of Triton.")
        # Encodings of videos outlive the memory of the response.
        return [np.array(pb.get_output_tensor_by_name(response, name).as_numpy()) for name in outputs]


def _check_files(about: FrontConfig, directory: Path) -> None:
    """Raise ModelFileError if a network of this version differs from the digest in `about.json`.

    Networks that are missing are skipped, because some deployments copy only the front to this machine.
    """
    for name, digest in about.files.items():
        model, file = name.split("/")
        path = directory.parent.parent / model / directory.name / file
        if path.is_file() and sha256(path) != digest:
            raise ModelFileError(
                f"{path} changed since {directory} was written. Write the repository again with `python -m "
                "export.triton`.",
                code=MISMATCH,
            )


class _VideoCache:
    """Cache recent videos by their content, so that each is pooled and encoded once.

    Contents are compared directly, which takes a tenth of the time of a hash.

    Args:
        max_bytes: maximum size of the features; encodings add less than a third.
    """

    def __init__(self, max_bytes: int) -> None:
        # By `id`: the video, and its encodings by windows.
        self._videos: LruCache[int, tuple[Video, dict[Windows | None, VideoInput]]] = LruCache(max_bytes)

    def video(self, features: np.ndarray, num_frames: int, duration: float, name: str) -> Video:
        """Return the cached video with these features, or else add a new one.

        Args:
            features: (num_clips, D) floats.
        """
        for key, (known, _) in self._videos.items():
            same = (known.num_frames, known.duration, known.features.shape) == (num_frames, duration, features.shape)
            if same and np.array_equal(known.features[0], features[0]) and np.array_equal(known.features, features):
                self._videos.get(key)
                return known
        # The memory of a request is freed after the response.
        origin = Origin(f"Correct {NUM_FRAMES}, or send {FEATURES} with this clip timing.")
        video = Video(np.array(features), num_frames, duration, name, origin)
        self._videos.put(id(video), (video, {}), video.features.nbytes)
        return video

    def windowed(self, video: Video, grounder: Grounder) -> VideoInput:
        """Return the encoded windows of a video if a split model grounds it in windows, else the video.

        A `Grounder` itself caches the encodings of videos without windows.
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
        raise QueryError(
            f"Expected queries in UTF-8, got another encoding at byte {error.start}. Encode them in UTF-8.",
            code="invalid_argument",
        ) from error
