"""Ask videos when something happens."""

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
from runtime.backends.base import Backend, Device, PairBackend, QueryServer
from runtime.core.batch import Batch, Heads, batches, batches_by_length, collate, pad_queries
from runtime.core.decoding import NON_FINITE, decode, score_proposals
from runtime.core.errors import (
    FeatureError,
    GroundingError,
    ModelFileError,
    QueryError,
    ShapeError,
    check_argument,
    excerpt,
    printable_line,
)
from runtime.core.moments import Moment, to_moments
from runtime.core.nvtx_ranges import marked
from runtime.core.prefetch import prefetch
from runtime.core.sliding_windows import Window, WindowProposals, Windows, split_into_windows
from runtime.core.video import LARGE_FEATURE, Segments, Video, pool_segments
from runtime.grounding.requests import VideoInput, _kind, check_query, check_request, check_video
from runtime.grounding.scheduling import EncodingCache, retry_in_halves

log = logging.getLogger("drn")

BATCH_SIZE = 32
# Encodings kept for videos that are asked again: 0.5 MB each at full size.
MAX_CACHED_ENCODINGS = 32


class Grounder:
    """A model with what it needs: sentences and videos in, moments in seconds out.

    A model that was split encodes a video once: `encode` it, or pass the same `Video` again.

    A video longer than any of the training videos is grounded in overlapping windows whose answers are merged, if the
    model has windows.

    Attributes:
        windows: how long videos are cut: the model's own. May be set to others, or to None: every video is then
            grounded whole, as the published code does.
    """

    def __init__(self, backend: Backend) -> None:
        if not hasattr(backend, "manifest"):
            raise ModelFileError(
                f"Expected a backend, got {_kind(backend)}. Open a model with Grounder.load.", code="invalid_argument"
            )
        self.backend = backend
        self.manifest = backend.manifest
        self.windows = backend.manifest.windows
        self._encodings = EncodingCache(MAX_CACHED_ENCODINGS)
        # A server that answers whole queries; None where they are answered here.
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
        """Whether the model was split, so that videos can be encoded once."""
        return self.manifest.part == "query"

    def ground(self, video: VideoInput, query: str, top_k: int = 5, *, presence: bool = True) -> list[Moment]:
        """Return the moments of `video` that fit `query`, best first, at most `top_k`.

        None are returned only by a model that carries a threshold for it (`Presence`), where the best scores below it;
        with `presence` False it answers always.

        Raises:
            QueryError: the query is empty, too long, or made of unknown words only.
            FeatureError: the features are not of the width that the model takes, or another model encoded them.
            ModelFileError: the video is encoded and the model is whole.
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
            return [self._ground_one(*pairs[0], top_k, presence)]
        tokens = {query: self.encode_query(query) for query in dict.fromkeys(query for _, query in pairs)}
        videos = {id(video): video for video, _ in pairs}
        cuts = {key: self.cut(video) for key, video in videos.items()}
        seen = {key: self._seen(video) for key, video in videos.items() if not cuts[key]}
        decoding, threshold = self.manifest.decoding, self._threshold(presence)
        answers: list[list[Moment]] = [[] for _ in pairs]
        whole = [index for index, (video, _) in enumerate(pairs) if id(video) in seen]
        requested = [tokens[pairs[index][1]] for index in whole], [seen[id(pairs[index][0])] for index in whole]
        for indices, heads in self.run(*requested, batch_size):
            try:
                picks = self._picks(heads, top_k, threshold)
            except ModelFileError as error:
                raise self.cause_of(error, [(pairs[whole[i]][0], requested[0][i]) for i in indices]) from error
            for index, rows in zip(indices, picks):
                answers[whole[index]] = moments_of(rows, pairs[whole[index]][0])
        for key in videos.keys() - seen.keys():
            chosen = [index for index, (video, _) in enumerate(pairs) if id(video) == key]
            result = self._ask_windows(
                videos[key], cuts[key], [tokens[pairs[index][1]] for index in chosen], batch_size
            )
            for index, picks in zip(chosen, result.picks(decoding, top_k)):
                moments = to_moments(picks, result.unit, videos[key].offset)
                if threshold is not None and not (moments and moments[0].score >= threshold):
                    continue
                # As published: where nothing is likely, the whole video with score 1.
                offset = videos[key].offset
                answers[index] = moments or [Moment(offset, offset + videos[key].duration, 1.0)]
        return answers

    def _ground_one(self, video: VideoInput, query: str, top_k: int, presence: bool) -> list[Moment]:
        """Return the moments of one pair, without what puts many together: a GPU answers faster than that takes."""
        tokens, seen = self.encode_query(query), self._seen(video)
        heads = self._run_one(tokens, seen)
        try:
            picks = self._picks(heads, top_k, self._threshold(presence))
        except ModelFileError as error:
            raise self.cause_of(error, [(video, tokens)]) from error
        return moments_of(picks[0], video)

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

    @marked("network")
    def _run_one(self, tokens: np.ndarray, seen: Segments | EncodedVideo) -> Heads:
        if self.is_pair:
            length = np.array([len(tokens)], np.int32)
            return self._pair.ask(tokens[None], length, [cast(EncodedVideo, seen)], np.zeros(1, np.int32))
        return self.backend.run(collate([tokens], [cast(Segments, seen)]))

    def _threshold(self, presence: bool) -> float | None:
        """Return the score below which a video has no moment; None if it is answered always."""
        return self.manifest.presence.threshold if presence and self.manifest.presence else None

    @marked("decode")
    def _picks(self, heads: Heads, top_k: int, threshold: float | None) -> np.ndarray:
        """Return the best `top_k` of each query, (B, K, 3), NaN after the last; nothing where all are too unlikely."""
        decoding = self.manifest.decoding
        picks = decode(heads, decoding, min(top_k, decoding.num_locations))
        if threshold is not None:
            # The whole video with score 1, which is returned where nothing is likely, is no answer.
            picks[score_proposals(heads, decoding).scores.max(axis=1) < threshold] = np.nan
        return picks

    def cut(self, video: VideoInput) -> Sequence[Window]:
        """Return the windows in which a video is grounded; none if it is grounded whole."""
        check_video(video)
        if isinstance(video, EncodedWindows):
            return video.windows
        if isinstance(video, EncodedVideo) or self.windows is None or video.duration <= self.windows.longest:
            return ()
        clock = self.manifest.features.clock
        return split_into_windows(len(video.features), video.num_frames, video.duration, self.windows, clock)

    def _ask_windows(
        self, video: VideoInput, windows: Sequence[Window], queries: Sequence[np.ndarray], batch_size: int
    ) -> WindowProposals:
        """Ask every window every query. No more windows are held at a time than fit into a batch, at least one."""
        result = WindowProposals(len(queries), windows)
        seen = self._seen_windows(video, windows)
        together = max(1, batch_size // len(queries))
        for start in range(0, len(windows), together):
            part = list(itertools.islice(seen, together))
            requested = [(query, window) for window in range(len(part)) for query in range(len(queries))]
            subjects = [part[window] for _, window in requested]
            for rows, heads in self.run([queries[query] for query, _ in requested], subjects, batch_size):
                try:
                    proposals = score_proposals(heads, self.manifest.decoding)
                except ModelFileError as error:
                    raise self.cause_of(error, [(video, queries[0])]) from error
                for row, spans, scores in zip(rows, proposals.spans, proposals.scores):
                    query, window = requested[row]
                    result.add(query, start + window, spans, scores)
        return result

    def _seen_windows(self, video: VideoInput, windows: Sequence[Window]) -> Iterator[Segments | EncodedVideo]:
        """Yield the windows of a video as the backend takes them, each made when it is asked for."""
        if not isinstance(video, Video):
            yield from cast(EncodedWindows, self._checked(video)).parts
            return
        self.check_fits(video)
        features, num_segments = self.manifest.features, self.manifest.decoding.num_segments
        for window in windows:
            clips = video.features[window.first : window.last + 1]
            segments = pool_segments(clips, window.num_frames, num_segments, features.pooling, features.clock)
            yield self.encode_segments(segments, window.duration, video.name) if self.is_pair else segments

    def run(
        self,
        queries: Sequence[np.ndarray],
        videos: Sequence[Segments | EncodedVideo],
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[tuple[np.ndarray, Heads]]:
        """Yield for each batch the positions of its pairs and their heads.

        `videos` are segments, or for a model that was split encodings; each is in a batch once. A batch that does
        not fit the memory of its device is asked once more in halves.

        On a GPU the next batch is put together and asked while the caller decodes this one.
        """
        answers = (
            (chosen, retry_in_halves(ask, len(chosen))) for chosen, ask in self._batches(queries, videos, batch_size)
        )
        # One batch alone would pay for a thread and gain nothing; on a CPU the network uses every core itself.
        overlaps = len(queries) > batch_size and str(getattr(self.backend, "device", "cpu")).startswith("cuda")
        yield from prefetch(answers) if overlaps else answers

    def _batches(
        self, queries: Sequence[np.ndarray], videos: Sequence[Segments | EncodedVideo], batch_size: int
    ) -> Iterator[tuple[np.ndarray, Callable[[slice], Heads]]]:
        """Yield for each batch the positions of its pairs, and what answers a part of them."""
        if not self.is_pair:
            for chosen, batch in batches(queries, cast("Sequence[Segments]", videos), batch_size):
                yield chosen, functools.partial(self._run_part, batch)
            return
        encoded = cast("Sequence[EncodedVideo]", videos)
        for rows in batches_by_length(queries, batch_size):
            distinct = {id(encoded[i]): encoded[i] for i in rows}
            locations = {key: index for index, key in enumerate(distinct)}
            video_index = np.array([locations[id(encoded[i])] for i in rows], np.int32)
            requested = (*pad_queries([queries[i] for i in rows]), list(distinct.values()), video_index)
            yield rows, functools.partial(self._ask_part, *requested)

    @marked("network")
    def _run_part(self, batch: Batch, part: slice) -> Heads:
        if part == slice(0, len(batch)):
            return self.backend.run(batch)
        return self.backend.run(Batch(*(value[part] for value in vars(batch).values())))

    @marked("network")
    def _ask_part(
        self, tokens: np.ndarray, lengths: np.ndarray, videos: list[EncodedVideo], index: np.ndarray, part: slice
    ) -> Heads:
        return self._pair.ask(tokens[part], lengths[part], videos, index[part])

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
            batches: numbers of queries that are asked together, each at least 1.
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
        seen = self.encode_segments(zeros, 1.0, "zeros") if self.is_pair else zeros
        for _ in self.run([np.zeros(length, np.int32)] * batch, [seen] * batch, batch):
            pass

    def encode(self, video: VideoInput, *, prepare: bool = False) -> EncodedVideo | EncodedWindows:
        """Return what the model's video part makes of a video: `ground` takes it in the video's place, without
        computing it again. A video that is grounded in windows is encoded window by window.

        Args:
            video: a video; an encoding of this model is returned as it is.
            prepare: has no effect. Version 0.1 computed more before the first query, for a gain too small to keep.

        Raises:
            FeatureError: the features are not of the width that the model takes.
            ModelFileError: the model is whole.
        """
        check_video(video)
        if prepare:
            log.warning("prepare=True no longer has an effect. Leave it out.")
        if not isinstance(video, Video):
            return self._checked(video)
        windows = self.cut(video)
        if not windows:
            return self.encode_segments(self.segments(video), video.duration, video.name, video.offset)
        parts = cast("Iterator[EncodedVideo]", self._seen_windows(video, windows))
        return EncodedWindows(tuple(parts), tuple(windows), video.duration, video.name, video.offset)

    @marked("encode video")
    def encode_segments(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> EncodedVideo:
        """Return the encoding of pooled segments; see `encode`."""
        if not self.is_pair:
            raise ModelFileError(
                "This model is whole and encodes no video by itself; export it with `python -m export.to_onnx --split` "
                "and give the query part (.query.onnx).",
                code="query_part_required",
            )
        features = self._pair.encode(segments.features[None].astype(np.float32, copy=False))[0]
        return EncodedVideo(features, segments.spans.astype(np.float32), duration, name, self._model, offset=offset)

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

    @property
    def _pair(self) -> PairBackend:
        return cast(PairBackend, self.backend)

    @property
    def _model(self) -> str:
        """SHA-256 of the video part."""
        return next(iter(self.manifest.video_part.values()), "")

    def _seen(self, video: VideoInput) -> Segments | EncodedVideo:
        """Return a video as the backend takes it."""
        if not isinstance(video, Video):
            return cast(EncodedVideo, self._checked(video))
        if not self.is_pair:
            return self.segments(video)
        return self._encodings.get(video) or self._encodings.put(video, cast(EncodedVideo, self.encode(video)))

    def cause_of(
        self, error: ModelFileError, pairs: Sequence[tuple[VideoInput | Segments, np.ndarray]]
    ) -> GroundingError:
        """Return the error to raise where heads are not finite: features of another scale, if zeros give finite heads.

        Args:
            error: of decoding; others are returned as they are.
            pairs: what was asked: videos, and (L,) word ids.
        """
        if error.code != NON_FINITE:
            return error
        results = {
            id(subject): self.segments(subject) if isinstance(subject, Video) else subject
            for subject, _ in pairs
            if isinstance(subject, (Video, Segments))
        }
        if not results:
            return error
        largest = max(float(np.abs(segments.features).max()) for segments in results.values())
        if self.manifest.precision != "fp32" and largest < LARGE_FEATURE:
            return error
        zeros = [Segments(np.zeros_like(part.features), part.spans) for part in results.values()][:1]
        seen = [self.encode_segments(part, 1.0, "zeros") if self.is_pair else part for part in zeros]
        for _, query in pairs:
            for _, heads in self.run([query], seen):
                if not all(np.isfinite(values).all() for values in vars(heads).values()):
                    return error
        return FeatureError(
            f"The model's output is not finite for features as large as {largest:.3g}, but it is for zeros. So the "
            "model is not damaged, but the features have another scale than those that it was trained on "
            f"({self.manifest.features.kind}); extract them again as for training.",
            code="features_out_of_scale",
        )

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

    def _checked(self, video: EncodedVideo | EncodedWindows) -> EncodedVideo | EncodedWindows:
        """Return an encoding that this model can read, or say why it cannot."""
        for part in video.parts if isinstance(video, EncodedWindows) else (video,):
            self._check_encoding(part)
        return video

    def _check_encoding(self, video: EncodedVideo) -> None:
        if not self.is_pair:
            raise ModelFileError(
                f"{video.name} is encoded and this model is whole, so it takes features; give the query part "
                "(.query.onnx) of the model that encoded it.",
                code="query_part_required",
            )
        if video.model != self._model:
            raise FeatureError(
                f"{video.name} was encoded by another model (video part "
                f"{printable_line(video.model[:12]) or 'unknown'}, and {self._model[:12]} is wanted); encode it again "
                "with this one.",
                code="encoding_of_another_model",
            )
        expected = (self.manifest.features.dim, self.manifest.decoding.num_segments)
        if video.features.shape != expected:
            raise FeatureError(
                f"The encoding of {video.name} is of shape {video.features.shape} and this model takes {expected}; "
                "encode it again with this one.",
                code="shape_mismatch",
            )


def moments_of(picks: np.ndarray, video: VideoInput) -> list[Moment]:
    """Return (K, 3) picks, NaN after the last, as moments of a video, in the time of players."""
    return to_moments(picks, video.duration, video.offset)
