"""Ground queries in videos: clip features and sentences to moments in seconds."""

from __future__ import annotations

import collections
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.backends import is_address, open_backend
from runtime.backends.base import Backend, Device
from runtime.backends.network import Encoding, network_of
from runtime.core.batch import Heads, batches_by_length, pad_queries
from runtime.core.decoding import NON_FINITE
from runtime.core.errors import (
    FeatureError,
    GroundingError,
    ModelFileError,
    QueryError,
    check_argument,
)
from runtime.core.moments import Moment
from runtime.core.nvtx_ranges import marked
from runtime.core.pooling import Segments, pool_segments
from runtime.core.prefetch import prefetch
from runtime.core.sliding_windows import Window, Windows, split_into_windows
from runtime.core.video import LARGE_FEATURE, Video
from runtime.grounding.moment_decoder import MomentDecoder
from runtime.grounding.requests import (
    VideoInput,
    check_query,
    check_request,
    check_sizes,
    check_video,
    describe_value,
    features_out_of_scale,
)
from runtime.grounding.scheduling import (
    EncodingCache,
    distinct,
    retry_in_halves,
    window_groups,
)
from runtime.grounding.video_source import VideoArguments, open_video_source

if TYPE_CHECKING:
    from runtime.backends.triton_client import ServedModel

# This file has over 500 lines because the docstrings of `Grounder` are the reference of the Python API.

log = logging.getLogger("drn")

BATCH_SIZE = 32
# 0.5 MB each at full size.
MAX_CACHED_ENCODINGS = 32


class Grounder:
    """Find the moments of a video that a sentence describes.

    Load a model once, then call `ground` for each query, or `ground_batch` for many. Several threads may share a
    grounder. Videos are passed as clip features (`Video`), which `python -m runtime.extract` computes from video files.

    Videos longer than those of the training data are split into overlapping windows if the model has `windows`; the
    windows are grounded separately, and their proposals are merged before NMS. A split model encodes each video once:
    the encodings of the 32 `Video` objects used last are cached, and `encode` returns one to store.

    Args:
        backend: runs the network; `Grounder.load` opens one from a file.

    Attributes:
        backend: backend that runs the network.
        network: encodes windows and runs queries on them.
        manifest: manifest of the model: vocabulary, features, decoding.
        windows: length and overlap of the windows of long videos; None for no windows, as in the published code.

    Example:
        grounder = Grounder.load("drn.onnx", device="cpu")
        video = Video.load("3MSZA.npy", duration=30.96, num_frames=928)  # (num_clips, D) float32
        moments = grounder.ground(video, "person turns the light on", top_k=5)
        print(moments[0].start, moments[0].end, moments[0].score)  # seconds, seconds, [0, 1]
    """

    def __init__(self, backend: Backend) -> None:
        if not hasattr(backend, "manifest"):
            raise ModelFileError(
                f"Expected a backend, got {describe_value(backend)}. Open a model with Grounder.load.",
                code="invalid_argument",
            )
        self.backend = backend
        self.manifest = backend.manifest
        self.windows = backend.manifest.windows
        self.network = network_of(backend)
        self._encodings = EncodingCache(MAX_CACHED_ENCODINGS)
        # A Triton server that grounds complete queries; None if the network runs in this process.
        self._server: ServedModel | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Grounder:
        """Open a model.

        Args:
            path: a model file (`.onnx`, `.engine`, `.pt`), the query part of a split model, or the address of a model
                served by Triton, `triton://HOST:PORT/MODEL`.
            device: `auto`, `cpu` or `cuda`; `auto` selects a GPU if the library supports one.
            threads: CPU threads of the network; the library's default when None.

        Returns:
            A grounder, ready for queries. See `warm` to move one-time costs to the start of a service.

        Raises:
            ModelFileError: the file is missing, damaged, or no model of this toolkit.
            DeviceError: the library or the device is missing.
            ServerError: the Triton server cannot be reached, or has not loaded the model.

        Example:
            grounder = Grounder.load("drn.fp16.engine", device="cuda")
        """
        if is_address(path):
            from runtime.backends.triton_client import connect

            backend, server = connect(path, device, threads)
            grounder = cls(backend)
            grounder._server = server
            return grounder
        return cls(open_backend(path, device, threads))

    @property
    def is_pair(self) -> bool:
        """Return whether the model was split, so that `encode` can be used."""
        return self.manifest.part == "query"

    def ground(self, video: VideoInput, query: str, top_k: int = 5, *, presence: bool = True) -> list[Moment]:
        """Return the moments of a video that a query describes.

        Args:
            video: clip features, (num_clips, D), or what `encode` returned.
            query: a sentence, such as "person opens the door". Unknown words are treated as the vocabulary says, with
                a warning.
            top_k: maximum number of moments; at least 0.
            presence: whether to return no moments if the best score is below the model's `Presence` threshold. Has no
                effect on models without one.

        Returns:
            At most `top_k` moments in seconds of the video file, best first, scores in [0, 1]. If no location is
            likely, one moment that covers the entire video.

        Raises:
            QueryError: the query is empty, too long, or has no known content word.
            FeatureError: the features do not have the width of the model, or another model encoded the video.
            ModelFileError: the video is encoded, but the model was not split.
            DeviceError: the network could not run.
            ServerError: the Triton server cannot be reached, or fails.

        Example:
            for moment in grounder.ground(video, "person opens the door", top_k=3):
                print(f"{moment.start:.1f} s to {moment.end:.1f} s, score {moment.score:.2f}")
        """
        return self.ground_batch([(video, query)], top_k, presence=presence)[0]

    def ground_batch(
        self,
        pairs: Sequence[tuple[VideoInput, str]],
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        *,
        presence: bool = True,
    ) -> list[list[Moment]]:
        """Return the moments of each (video, query) pair.

        Batching affects speed only. Each distinct sentence is encoded once, and by a split model each distinct `Video`
        object.

        Args:
            pairs: N videos and sentences; see `ground`.
            top_k: maximum number of moments of each pair; at least 0.
            batch_size: maximum number of queries that run together; at least 1.
            presence: whether to return no moments for a pair whose best score is below the model's `Presence`
                threshold.

        Returns:
            N lists of moments, in the order of the pairs; see `ground`.

        Raises:
            GroundingError: an argument has a wrong type or size (code `invalid_argument`); otherwise as `ground`.

        Example:
            queries = ["person opens the door", "person sits down"]
            per_query = grounder.ground_batch([(video, query) for query in queries], top_k=1)
        """
        check_request(pairs, top_k, batch_size)
        # A server accepts features, but no encodings.
        if self._server is not None and all(isinstance(video, Video) for video, _ in pairs):
            return self._ground_on_server(cast("Sequence[tuple[Video, str]]", pairs), top_k, presence)
        if len(pairs) == 1 and not self.cut(pairs[0][0]):
            return self._ground_one(*pairs[0], top_k, presence)
        tokens = {query: self.encode_query(query) for query in dict.fromkeys(query for _, query in pairs)}
        windows_of = {id(video): self.cut(video) for video in {id(video): video for video, _ in pairs}.values()}
        windows = [windows_of[id(video)] for video, _ in pairs]
        decoder = MomentDecoder([video for video, _ in pairs], windows, self.manifest, top_k, presence=presence)
        for group in window_groups(pairs, windows, self._encoding, self._encode_windows, batch_size):
            queries = [tokens[pairs[pair][1]] for pair in group.pairs]
            for rows, heads in self.run(queries, group.encodings, batch_size):
                indices = [group.pairs[row] for row in rows]
                try:
                    decoder.add(indices, [group.windows[row] for row in rows], heads)
                except ModelFileError as error:
                    raise self.cause_of(error, [(pairs[i][0], tokens[pairs[i][1]]) for i in indices]) from error
        return decoder.moments

    def ground_video(
        self,
        path: str | os.PathLike[str],
        queries: Sequence[str],
        extractor: str | os.PathLike[str],
        top_k: int = 5,
        *,
        partial: bool = False,
        presence: bool = True,
    ) -> list[list[Moment]]:
        """Return the moments of each query in a video file. Its features are extracted once, and cached on disk.

        Args:
            path: a video file.
            queries: N sentences; see `ground`.
            extractor: `.onnx` or `.engine` file of the extractor that the training features come from.
            top_k, presence: see `ground`.
            partial: whether to accept a damaged file, and use the frames that can be decoded.

        Returns:
            N lists of moments; see `ground`.

        Raises:
            VideoFileError: the file cannot be decoded.
            ModelFileError: the extractor is missing or damaged, or its features are not those of the model.
            GroundingError: otherwise as `ground`. Queries are checked before the extraction.

        Example:
            moments, = grounder.ground_video("clip.mp4", ["person opens the door"], "c3d.onnx")
        """
        for query in dict.fromkeys(queries):
            self.encode_query(query, collections.Counter())
        arguments = VideoArguments(video=os.fspath(path), extractor=Path(extractor), partial=partial)
        video = open_video_source(arguments, self.manifest.features).video
        return self.ground_batch([(video, query) for query in queries], top_k, presence=presence)

    def _ground_one(self, video: VideoInput, query: str, top_k: int, presence: bool) -> list[list[Moment]]:
        """Return the result of `ground_batch` for one query about a video of one window.

        Forming groups and batches would take 45 of 211 us (benchmarks.host, AMD EPYC, 2 cores shared with other work,
        Python 3.11.7, 2026-11-30).
        """
        tokens, encoding = self.encode_query(query), self._encoding(video)
        lengths, index = np.array([len(tokens)], np.int32), np.zeros(1, np.int32)
        heads = self._run_rows(tokens[None], lengths, [encoding], index, slice(1))
        decoder = MomentDecoder([video], [()], self.manifest, top_k, presence=presence)
        try:
            decoder.add([0], [0], heads)
        except ModelFileError as error:
            raise self.cause_of(error, [(video, tokens)]) from error
        return decoder.moments

    def _ground_on_server(self, pairs: Sequence[tuple[Video, str]], top_k: int, presence: bool) -> list[list[Moment]]:
        """Return the moments of each pair, with one request for each video; ServerError if that fails."""
        assert self._server is not None
        moments: list[list[Moment]] = [[] for _ in pairs]
        for query in dict.fromkeys(query for _, query in pairs):
            # Check queries and warn of unknown words before the first request.
            self.encode_query(query)
        videos, index = distinct([video for video, _ in pairs])
        for video in videos:
            self.check_fits(video)
        windows: Windows | Literal["model"] | None = "model" if self.windows == self.manifest.windows else self.windows
        for number, video in enumerate(videos):
            rows = np.flatnonzero(index == number).tolist()
            queries = [pairs[row][1] for row in rows]
            results = self._server.ground(video, queries, top_k, windows=windows, always=not presence)
            for row, result in zip(rows, results):
                moments[row] = result
        return moments

    def cut(self, video: VideoInput) -> Sequence[Window]:
        """Return the windows into which a video is split.

        Args:
            video: a video, or an encoding of one.

        Returns:
            Windows in order of time, each with its clips and its `start` and `end` in seconds; empty if the entire
            video is one window.

        Raises:
            FeatureError: `video` is no video.
        """
        check_video(video)
        if isinstance(video, EncodedWindows):
            return video.windows
        if isinstance(video, EncodedVideo) or self.windows is None or video.duration <= self.windows.longest:
            return ()
        clock = self.manifest.features.clock
        return split_into_windows(len(video.features), video.num_frames, video.duration, self.windows, clock)

    def _encode_windows(self, video: VideoInput, windows: Sequence[Window]) -> Iterator[Encoding]:
        """Yield the encodings of the windows of a video, each computed when it is taken."""
        if isinstance(video, Video):
            self.check_fits(video)
            features, num_segments = self.manifest.features, self.manifest.decoding.num_segments
            for window in windows:
                clips = video.features[window.first : window.last + 1]
                segments = pool_segments(clips, window.num_frames, num_segments, features.pooling, features.clock)
                yield self.network.encode(segments, window.duration, video.name)
        else:
            self._check_encodings(video)
            yield from cast(EncodedWindows, video).parts

    def _encoding(self, video: VideoInput) -> Encoding:
        """Return the encoding of a video that is one window."""
        if not isinstance(video, Video):
            self._check_encodings(video)
            return cast(EncodedVideo, video)
        encoding = self._encodings.get(video)
        if encoding is None:
            encoding = self.network.encode(self.segments(video), video.duration, video.name, video.offset)
            self._encodings.put(video, encoding)
        return encoding

    def run(
        self,
        queries: Sequence[np.ndarray],
        videos: Sequence[Encoding],
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[np.ndarray, Heads]]:
        """Run the network on queries, in batches of similar query length, without decoding.

        A batch that does not fit the device is run in two halves. On a GPU, the next batch runs while the caller
        decodes this one.

        Args:
            queries: N arrays (L,) of int32 word ids; see `encode_query`.
            videos: N encodings, one for each query: what `encode` returns, or `segments` for a model that was not
                split. A batch contains each distinct object once.
            batch_size: maximum number of queries in a batch.

        Yields:
            Indices of the queries of a batch, (B,), and their heads: `matching_logits` (B, P), `boundary_distances`
            (B, P, 2) and `iou_logits` (B, P), float32.

        Raises:
            ShapeError: a query is too long for an engine.
            DeviceError: the network could not run.
        """
        batches = self._batches(queries, videos, batch_size)
        results = ((rows, retry_in_halves(run_rows, len(rows))) for rows, run_rows in batches)
        # A single batch gains nothing from a thread, and on a CPU the network uses all cores.
        overlaps = len(queries) > batch_size and str(getattr(self.backend, "device", "cpu")).startswith("cuda")
        yield from prefetch(results) if overlaps else results

    def _batches(
        self, queries: Sequence[np.ndarray], videos: Sequence[Encoding], batch_size: int
    ) -> Iterator[tuple[np.ndarray, Callable[[slice], Heads]]]:
        """Yield for each batch the indices of its queries, and a function that runs a part of them."""
        for rows in batches_by_length(queries, batch_size):
            tokens, lengths = pad_queries([queries[i] for i in rows])
            encodings, index = distinct([videos[i] for i in rows])
            yield rows, functools.partial(self._run_rows, tokens, lengths, encodings, index)

    @marked("network")
    def _run_rows(
        self, tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Encoding], index: np.ndarray, rows: slice
    ) -> Heads:
        return self.network.run(tokens[rows], lengths[rows], encodings, index[rows])

    def warm(
        self,
        batches: Sequence[int],
        lengths: Sequence[int],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Run the network for each batch size and query length, so that later queries do not pay for a new shape.

        At a new shape, an engine creates an execution context and captures a CUDA graph, and ONNX Runtime and PyTorch
        search kernels on a GPU. On a CPU and for models behind Triton nothing is run. Sizes that are padded to the
        same shape are run once; a split model also encodes a video. An engine stores the contexts of 64 shapes; those
        of the smallest batches remain.

        Args:
            batches: batch sizes, each at least 1.
            lengths: query lengths in tokens, each from 1 to the maximum of the model.
            progress: called with the number of finished shapes and their total, before each shape and at the end.

        Returns:
            The number of shapes that were run; 0 if nothing needs warming.

        Raises:
            ShapeError: a size is out of range. Nothing was run.
            DeviceMemoryError: the device has no memory for all shapes; the finished ones remain warm.
            DeviceError: the model was closed, or the device failed.

        Example:
            grounder.warm(batches=[1, 8], lengths=range(1, 13))
        """
        check_sizes(batches, lengths, self.manifest.max_query_length)
        if not batches or not lengths:
            return 0
        warm = getattr(self.backend, "warm", None)
        if warm is not None:
            return int(warm(batches, lengths, progress))
        if not str(getattr(self.backend, "device", "cpu")).startswith("cuda"):
            return 0
        shapes = [(batch, length) for batch in sorted(set(batches)) for length in sorted(set(lengths))]
        for done, (batch, length) in enumerate(shapes):
            progress(done, len(shapes))
            encoding = self._encode_zeros()
            for _ in self.run([np.zeros(length, np.int32)] * batch, [encoding] * batch, batch):
                pass
        progress(len(shapes), len(shapes))
        return len(shapes)

    def _encode_zeros(self, spans: np.ndarray | None = None) -> Encoding:
        """Return the encoding of a window whose features are zeros; of (T, 2) spans, zeros too when None."""
        num_segments, dim = self.manifest.decoding.num_segments, self.manifest.features.dim
        spans = np.zeros((num_segments, 2), np.float32) if spans is None else spans
        return self.network.encode(Segments(np.zeros((num_segments, dim), np.float32), spans), 1.0, "zeros")

    def encode(self, video: VideoInput, *, prepare: bool = False) -> EncodedVideo | EncodedWindows:
        """Encode a video with a split model, so that later queries run the query part only.

        Args:
            video: clip features, (num_clips, D). An encoding of this model is returned unchanged.
            prepare: deprecated, has no effect.

        Returns:
            The encoding, to pass to `ground` in place of the video or to `save`: (D, T) float32 features of the
            entire video, or of each window of a long one.

        Raises:
            FeatureError: the features do not have the width of the model.
            ModelFileError: the model was not split.

        Example:
            encoded = grounder.encode(video)
            encoded.save("3MSZA.npz")
            moments = grounder.ground(EncodedVideo.load("3MSZA.npz"), "person opens the door")
        """
        check_video(video)
        if prepare:
            log.warning("prepare=True has no effect. Remove the argument.")
        if not isinstance(video, Video):
            self._check_encodings(video)
            return video
        windows = self.cut(video)
        if not windows:
            return self.encode_segments(self.segments(video), video.duration, video.name, video.offset)
        self._require_split()
        parts = cast("Iterator[EncodedVideo]", self._encode_windows(video, windows))
        return EncodedWindows(tuple(parts), tuple(windows), video.duration, video.name, video.offset)

    def encode_segments(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> EncodedVideo:
        """Return the encoding of one window with a split model.

        Args:
            segments: segments of the window, as `segments` returns them: features (T, D) and spans (T, 2).
            duration: duration of the window, in seconds.
            name: name of the video.
            offset: seconds from the start of the video file to its first frame.

        Raises:
            ModelFileError: the model was not split.
        """
        self._require_split()
        return cast(EncodedVideo, self.network.encode(segments, duration, name, offset))

    def _require_split(self) -> None:
        if not self.is_pair:
            raise ModelFileError(
                "This model was not split, so it cannot encode videos. Export it with `python -m export.to_onnx "
                "--split` and give the query part (.query.onnx).",
                code="query_part_required",
            )

    @marked("encode query")
    def encode_query(
        self,
        query: str,
        unknown_words: collections.Counter[str] | None = None,
        unheard: collections.Counter[str] | None = None,
        *,
        check_content: bool = True,
    ) -> np.ndarray:
        """Return the word ids of a query.

        Args:
            query: a sentence.
            unknown_words: counts the unknown words instead of a warning, so that a caller can report those of many
                queries together.
            unheard: deprecated name of `unknown_words`.
            check_content: whether to reject queries without a known content word. Turn it off for sentences of data
                sets, because the published code accepts them.

        Returns:
            (L,) int32 word ids, L from 1 to the maximum query length of the model.

        Raises:
            QueryError: the query is empty, too long, or has no known content word.
        """
        check_query(query)
        tokens = self.manifest.vocabulary.encode(
            query, unheard if unknown_words is None else unknown_words, check_content
        )
        max_length = self.manifest.max_query_length
        if len(tokens) > max_length:
            raise QueryError(
                f"Expected a query of 1 to {max_length} tokens, got {len(tokens)}. Shorten the query.",
                code="query_too_long",
            )
        return tokens

    def segments(self, video: Video) -> Segments:
        """Pool the clip features of a video to T segments, as for the training of this model.

        Args:
            video: clip features, (num_clips, D).

        Returns:
            Segments: features (T, D) and spans (T, 2), start and end of each as fractions of the video.

        Raises:
            FeatureError: the features do not fit the model.
        """
        # `Video.segments` caches its other checks; this one runs for every query.
        self.check_width(video)
        features = self.manifest.features
        return video.segments(self.manifest.decoding.num_segments, features.pooling, features.clock)

    def cause_of(
        self, error: ModelFileError, pairs: Sequence[tuple[VideoInput | Segments, np.ndarray]]
    ) -> GroundingError:
        """Return the error to raise if heads are not finite.

        If the heads are finite for zeros, the features have another scale than those of the training.

        Args:
            error: error of decoding; errors with another code are returned unchanged.
            pairs: the videos of the batch, and (L,) word ids of the queries about them.

        Returns:
            A FeatureError (code `features_out_of_scale`), or `error`.
        """
        if error.code != NON_FINITE:
            return error
        inputs = [part for video in distinct([video for video, _ in pairs])[0] for part in self._network_inputs(video)]
        largest = max(float(np.abs(part.features).max()) for part in inputs)
        if self.manifest.precision != "fp32" and largest < LARGE_FEATURE:
            return error
        zeros = self._encode_zeros(inputs[0].spans)
        heads = (heads for _, query in pairs for _, heads in self.run([query], [zeros]))
        if not all(np.isfinite(values).all() for output in heads for values in vars(output).values()):
            return error
        return features_out_of_scale(inputs, largest, self.manifest.features.kind)

    def _network_inputs(self, video: VideoInput | Segments) -> Sequence[Segments | EncodedVideo]:
        """Return the segments of a video, or the encodings of its windows."""
        if isinstance(video, EncodedWindows):
            return video.parts
        return [self.segments(video) if isinstance(video, Video) else video]

    def check_fits(self, video: Video) -> None:
        """Raise FeatureError unless the features of a video fit this model: width, clip timing and values."""
        check_argument("video", video, Video, "a Video", FeatureError)
        self.check_width(video)
        video.check(self.manifest.features.clock)

    def check_width(self, video: Video) -> None:
        """Raise FeatureError unless the features of a video, (num_clips, D), have the width D of this model."""
        features = self.manifest.features
        if video.features.shape[1] != features.dim:
            raise FeatureError(
                f"Expected {features.kind} features of width {features.dim} for {video.name}, got width "
                f"{video.features.shape[1]}. Extract them with the network that the model was trained on.",
                code="feature_width_mismatch",
            )

    def _check_encodings(self, video: EncodedVideo | EncodedWindows) -> None:
        """Raise FeatureError or ModelFileError unless this model accepts the encodings of a video."""
        for part in video.parts if isinstance(video, EncodedWindows) else (video,):
            self.network.check(part)
