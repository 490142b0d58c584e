"""Ground queries in videos: from features and sentences to moments in seconds."""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.backends import is_address, open_backend
from runtime.backends.base import Backend, Device, QueryServer
from runtime.backends.network import Encoding, network_of
from runtime.core.batch import Heads, batches_by_length, pad_queries
from runtime.core.decoding import NON_FINITE
from runtime.core.errors import (
    FeatureError,
    GroundingError,
    ModelFileError,
    QueryError,
    ShapeError,
    check_argument,
    excerpt,
)
from runtime.core.moments import Moment
from runtime.core.nvtx_ranges import marked
from runtime.core.prefetch import prefetch
from runtime.core.sliding_windows import Window, Windows, split_into_windows
from runtime.core.video import LARGE_FEATURE, Segments, Video, pool_segments
from runtime.grounding.moment_decoder import MomentDecoder
from runtime.grounding.requests import VideoInput, _kind, check_query, check_request, check_video
from runtime.grounding.scheduling import EncodingCache, WindowGroup, distinct, retry_in_halves

log = logging.getLogger("drn")

BATCH_SIZE = 32
# Encodings of videos that may be queried again: 0.5 MB each at full size.
MAX_CACHED_ENCODINGS = 32


class Grounder:
    """Ground queries in videos with one model.

    Every video is a list of windows. A video longer than any of the training videos is split into overlapping ones if
    the model has windows; any other is one window. A model that was split encodes each window once: call `encode`, or
    pass the same `Video` again.

    Attributes:
        backend: runs the network.
        network: encodes windows with the backend and runs queries on them.
        manifest: of the model.
        windows: how long videos are split; those of the model at first. With None every video is one window, as in the
            published code.
    """

    def __init__(self, backend: Backend) -> None:
        if not hasattr(backend, "manifest"):
            raise ModelFileError(
                f"Expected a backend, got {_kind(backend)}. Open a model with Grounder.load.", code="invalid_argument"
            )
        self.backend = backend
        self.manifest = backend.manifest
        self.windows = backend.manifest.windows
        self.network = network_of(backend)
        self._encodings = EncodingCache(MAX_CACHED_ENCODINGS)
        # Set if a server grounds the queries.
        self._server: QueryServer | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Grounder:
        """Open a model file, or a model behind Triton; see `runtime.open_backend` for the arguments and errors."""
        if is_address(path):
            from runtime.backends.triton_client import connect

            backend, server = connect(path, device, threads)
            grounder = cls(backend)
            grounder._server = server
            return grounder
        return cls(open_backend(path, device, threads))

    @property
    def is_pair(self) -> bool:
        """Return whether the model is split, so that videos can be encoded once."""
        return self.manifest.part == "query"

    def ground(self, video: VideoInput, query: str, top_k: int = 5, *, presence: bool = True) -> list[Moment]:
        """Return the moments of `video` that fit `query`, best first, at most `top_k`.

        A model with a threshold (`Presence`) returns no moments if the best one scores below it, unless `presence` is
        False.

        Raises:
            QueryError: the query is empty, too long, or made of unknown words only.
            FeatureError: the features are not of the width that the model takes, or another model encoded them.
            ModelFileError: the video is encoded and the model was not split.
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
        """Return for each (video, query) pair its moments, best first, in the order of the pairs.

        Pairs are independent: batching changes nothing but speed. A sentence, and with a model that was split a
        video, is encoded once however many pairs it is in. Raises as `ground`, and GroundingError (code
        `invalid_argument`) if `pairs` are no pairs, `top_k` is below 0, or `batch_size` is below 1.
        """
        check_request(pairs, top_k, batch_size)
        # A server accepts features, but no encodings.
        if self._server is not None and all(isinstance(video, Video) for video, _ in pairs):
            return self._ground_on_server(cast("Sequence[tuple[Video, str]]", pairs), top_k, presence)
        if len(pairs) == 1 and not self.cut(pairs[0][0]):
            return self._ground_one(*pairs[0], top_k, presence)
        tokens = {query: self.encode_query(query) for query in dict.fromkeys(query for _, query in pairs)}
        videos = {id(video): video for video, _ in pairs}
        cuts = {key: self.cut(video) for key, video in videos.items()}
        windows = [cuts[id(video)] for video, _ in pairs]
        decoder = MomentDecoder([video for video, _ in pairs], windows, self.manifest, top_k, presence=presence)
        for group in self._groups(pairs, windows, batch_size):
            queries = [tokens[pairs[pair][1]] for pair in group.pairs]
            for rows, heads in self.run(queries, group.encodings, batch_size):
                indices = [group.pairs[row] for row in rows]
                try:
                    decoder.add(indices, [group.windows[row] for row in rows], heads)
                except ModelFileError as error:
                    raise self.cause_of(error, [(pairs[i][0], tokens[pairs[i][1]]) for i in indices]) from error
        return decoder.moments

    def _ground_one(self, video: VideoInput, query: str, top_k: int, presence: bool) -> list[list[Moment]]:
        """Return what `ground_batch` does for one query about a video of one window.

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

    def _groups(
        self, pairs: Sequence[tuple[VideoInput, str]], windows: Sequence[Sequence[Window]], batch_size: int
    ) -> Iterator[WindowGroup]:
        """Yield the windows of all pairs, as many as are in memory together.

        Videos of one window, whose encodings are cached, form one group. Of a longer video as many windows as fill a
        batch are encoded at a time, at least one.

        Args:
            pairs: N videos and queries.
            windows: of the video of each pair; empty if it is one window.
            batch_size: queries that go through the network together.
        """
        single = [pair for pair, cut in enumerate(windows) if not cut]
        videos = {id(pairs[pair][0]): pairs[pair][0] for pair in single}
        encoded = {key: self._encoding(video) for key, video in videos.items()}
        yield WindowGroup(single, [0] * len(single), [encoded[id(pairs[pair][0])] for pair in single])
        pairs_of_video: dict[int, list[int]] = {}
        for pair, cut in enumerate(windows):
            if cut:
                pairs_of_video.setdefault(id(pairs[pair][0]), []).append(pair)
        for several in pairs_of_video.values():
            encodings = enumerate(self._encode_windows(pairs[several[0]][0], windows[several[0]]))
            while part := list(itertools.islice(encodings, max(1, batch_size // len(several)))):
                yield WindowGroup(
                    several * len(part),
                    [index for index, _ in part for _ in several],
                    [encoding for _, encoding in part for _ in several],
                )

    def _ground_on_server(self, pairs: Sequence[tuple[Video, str]], top_k: int, presence: bool) -> list[list[Moment]]:
        """Return the moments of each pair, with one request for each video.

        Raises:
            ServerError: the server cannot be reached, or fails.
        """
        assert self._server is not None
        for query in dict.fromkeys(query for _, query in pairs):
            # Check, and warn of unknown words, before anything is sent.
            self.encode_query(query)
        videos = {id(video): video for video, _ in pairs}
        for video in videos.values():
            self.check_fits(video)
        windows: Windows | Literal["model"] | None = "model" if self.windows == self.manifest.windows else self.windows
        answers: list[list[Moment]] = [[] for _ in pairs]
        for key, video in videos.items():
            indices = [index for index, (other, _) in enumerate(pairs) if id(other) == key]
            queries = [pairs[index][1] for index in indices]
            results = self._server.ground(video, queries, top_k, windows=windows, always=not presence)
            for index, moments in zip(indices, results):
                answers[index] = moments
        return answers

    def cut(self, video: VideoInput) -> Sequence[Window]:
        """Return the windows into which a video is split, in time order; none if the entire video is one window."""
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
        """Run the network on queries, in batches of like query length.

        A batch that does not fit the memory of its device is run once more in halves. On a GPU the next batch is put
        together and run while the caller decodes this one.

        Args:
            queries: N times (L,) word ids.
            videos: what each query is about: an encoding, or segments for a model that was not split. One that comes
                several times is in a batch once.
            batch_size: maximum number of queries in a batch.

        Yields:
            The positions of the queries of a batch, (B,), and their heads.
        """
        batches = self._batches(queries, videos, batch_size)
        answers = ((rows, retry_in_halves(run_rows, len(rows))) for rows, run_rows in batches)
        # One batch alone would pay for a thread and gain nothing; on a CPU the network uses every core itself.
        overlaps = len(queries) > batch_size and str(getattr(self.backend, "device", "cpu")).startswith("cuda")
        yield from prefetch(answers) if overlaps else answers

    def _batches(
        self, queries: Sequence[np.ndarray], videos: Sequence[Encoding], batch_size: int
    ) -> Iterator[tuple[np.ndarray, Callable[[slice], Heads]]]:
        """Yield for each batch the positions of its queries, and a function that runs a part of them."""
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
        """Run the network for each batch size and query length, so that no query pays for what a new size costs.

        An engine makes an execution context for each size and captures it in a CUDA graph; ONNX Runtime and PyTorch
        search kernels on a GPU. On a CPU, and for models behind Triton, nothing is run: a new size costs nothing there.
        Sizes that are padded to the same shape are run once. An engine keeps the contexts of 64 shapes; of more, those
        of the smallest batches stay. Of a split model the encoding of one video is run too.

        Args:
            batches: numbers of queries in a batch, each at least 1.
            lengths: query lengths in tokens, each at least 1.
            progress: called with the number of shapes that are done and their total, before and after each.

        Returns:
            The number of shapes that were run; 0 where there is nothing to warm.

        Raises:
            ShapeError: a size is below 1, or beyond what the model takes. Nothing was run.
            DeviceMemoryError: the device has no memory for all of them; those done before stay.
            DeviceError: the model was closed, or the device failed.
        """
        for name, given in (("batches", batches), ("lengths", lengths)):
            check_argument(name, given, Sequence, "a list of integers", ShapeError)
            for size in given:
                check_argument(name, size, numbers.Integral, "integers", ShapeError)
        longest = self.manifest.max_query_length
        if min((*batches, *lengths), default=1) < 1 or max(lengths, default=1) > longest:
            raise ShapeError(
                f"Batches of {excerpt(list(batches))} queries of {excerpt(list(lengths))} tokens were given. Give "
                f"batches of at least 1, and 1 to {longest} tokens, which this model takes."
            )
        if not batches or not lengths:
            return 0
        warm = getattr(self.backend, "warm", None)
        if warm is not None:
            return int(warm(batches, lengths, progress))
        if not str(getattr(self.backend, "device", "cpu")).startswith("cuda"):
            return 0
        sizes = [(batch, length) for batch in sorted(set(batches)) for length in sorted(set(lengths))]
        for done, (batch, length) in enumerate(sizes):
            progress(done, len(sizes))
            self._run_once(batch, length)
        progress(len(sizes), len(sizes))
        return len(sizes)

    def _run_once(self, batch: int, length: int) -> None:
        """Run the network on a batch of queries of one length, all about one video of zeros."""
        segments, width = self.manifest.decoding.num_segments, self.manifest.features.dim
        zeros = Segments(np.zeros((segments, width), np.float32), np.zeros((segments, 2), np.float32))
        encoding = self.network.encode(zeros, 1.0, "zeros")
        for _ in self.run([np.zeros(length, np.int32)] * batch, [encoding] * batch, batch):
            pass

    def encode(self, video: VideoInput, *, prepare: bool = False) -> EncodedVideo | EncodedWindows:
        """Encode a video window by window; `ground` takes the encoding instead of the video.

        Args:
            video: a video; an encoding of this model is returned as it is.
            prepare: has no effect. Version 0.1 computed more before the first query, for a gain too small to keep.

        Raises:
            FeatureError: the features are not of the width that the model takes.
            ModelFileError: the model was not split.
        """
        check_video(video)
        if prepare:
            log.warning("prepare=True no longer has an effect. Leave it out.")
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
        """Return the encoding of pooled segments; see `encode`."""
        self._require_split()
        return cast(EncodedVideo, self.network.encode(segments, duration, name, offset))

    def _require_split(self) -> None:
        if not self.is_pair:
            raise ModelFileError(
                "This model is whole and encodes no video by itself; export it with `python -m export.to_onnx --split` "
                "and give the query part (.query.onnx).",
                code="query_part_required",
            )

    @marked("encode query")
    def encode_query(
        self, query: str, unheard: collections.Counter[str] | None = None, *, check_content: bool = True
    ) -> np.ndarray:
        """Return the (L,) word ids of a query that this model can take; raises QueryError otherwise.

        `unheard` counts words that the model does not know, in place of a warning, and `check_content` is turned off
        for sentences of data sets; see `Vocabulary.encode`.
        """
        check_query(query)
        tokens = self.manifest.vocabulary.encode(query, unheard, check_content)
        longest = self.manifest.max_query_length
        if len(tokens) > longest:
            raise QueryError(
                f"The query has {len(tokens)} tokens and this model takes 1 to {longest}; shorten it.",
                code="query_too_long",
            )
        return tokens

    def segments(self, video: Video) -> Segments:
        """Return the segments of a video as this model was trained on; FeatureError if its features do not fit."""
        # `Video.segments` checks all else once; this is done for every query.
        self.check_width(video)
        features = self.manifest.features
        return video.segments(self.manifest.decoding.num_segments, features.pooling, features.clock)

    def cause_of(
        self, error: ModelFileError, pairs: Sequence[tuple[VideoInput | Segments, np.ndarray]]
    ) -> GroundingError:
        """Return the error to raise where heads are not finite: features of another scale, if zeros give finite heads.

        Args:
            error: of decoding; others are returned as they are.
            pairs: videos, and (L,) word ids of queries about them.
        """
        if error.code != NON_FINITE:
            return error
        subjects = {id(subject): subject for subject, _ in pairs}.values()
        inputs = [part for subject in subjects for part in self._inputs_of(subject)]
        largest = max(float(np.abs(part.features).max()) for part in inputs)
        if self.manifest.precision != "fp32" and largest < LARGE_FEATURE:
            return error
        shape = (self.manifest.decoding.num_segments, self.manifest.features.dim)
        zeros = self.network.encode(Segments(np.zeros(shape, np.float32), inputs[0].spans), 1.0, "zeros")
        for _, query in pairs:
            for _, heads in self.run([query], [zeros]):
                if not all(np.isfinite(values).all() for values in vars(heads).values()):
                    return error
        inputs_name = "encodings" if isinstance(inputs[0], EncodedVideo) else "features"
        return FeatureError(
            f"The model's output is not finite for {inputs_name} as large as {largest:.3g}, but it is for zeros. So "
            "the model is not damaged, but the features have another scale than those that it was trained on "
            f"({self.manifest.features.kind}); extract them again as for training.",
            code="features_out_of_scale",
        )

    def _inputs_of(self, subject: VideoInput | Segments) -> Sequence[Segments | EncodedVideo]:
        """Return what the network takes of a video: its segments, or the encodings of its windows."""
        if isinstance(subject, EncodedWindows):
            return subject.parts
        return [self.segments(subject) if isinstance(subject, Video) else subject]

    def check_fits(self, video: Video) -> None:
        """Raise FeatureError unless this model can use the features of a video: width, clip timing, content."""
        check_argument("video", video, Video, "a Video", FeatureError)
        self.check_width(video)
        video.check(self.manifest.features.clock)

    def check_width(self, video: Video) -> None:
        """Raise FeatureError unless the features of a video, (num_clips, D), are as wide as this model takes them."""
        features = self.manifest.features
        if video.features.shape[1] != features.dim:
            raise FeatureError(
                f"The features of {video.name} are {video.features.shape[1]} wide and this model takes {features.kind} "
                f"features of width {features.dim}; extract them with the same network.",
                code="feature_width_mismatch",
            )

    def _check_encodings(self, video: EncodedVideo | EncodedWindows) -> None:
        """Raise FeatureError or ModelFileError unless this model can read the encodings of a video."""
        for part in video.parts if isinstance(video, EncodedWindows) else (video,):
            self.network.check(part)
