"""Ask videos when something happens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.backends import Backend, Device, open_backend
from runtime.decoding import PUBLISHED_COUNT, decode
from runtime.errors import FeatureError, QueryError
from runtime.moments import Moment
from runtime.tensors import Heads, batches
from runtime.videos import Segments, Video

BATCH_SIZE = 32


class Grounder:
    """A model and all that stands around it: sentences and videos in, moments in seconds out."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.manifest = backend.manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> Grounder:
        """Open a model file; see `runtime.open_backend` for the arguments and errors."""
        return cls(open_backend(path, device, threads))

    def ground(self, video: Video, query: str, top_k: int = 5) -> list[Moment]:
        """Return the moments of `video` that fit `query`, best first, at most `top_k`.

        Raises:
            QueryError: the query is empty, too long, or made of unknown words only.
            FeatureError: the features are not of the width that the model takes.
        """
        return self.ground_batch([(video, query)], top_k)[0]

    def ground_batch(
        self, pairs: Sequence[tuple[Video, str]], top_k: int = 5, batch_size: int = BATCH_SIZE
    ) -> list[list[Moment]]:
        """Return for each (video, query) pair its moments, best first, in the order of the pairs.

        Pairs are independent: batching changes nothing but speed. Raises as `ground`.
        """
        queries = [self.encode_query(query) for _, query in pairs]
        segments = [self.segments(video) for video, _ in pairs]
        decoding = self.manifest.decoding
        answers: list[list[Moment]] = [[] for _ in pairs]
        for indices, heads in self.run(queries, segments, batch_size):
            picks = decode(heads, decoding, max(min(top_k, decoding.num_locations), PUBLISHED_COUNT))
            for index, rows in zip(indices, picks[:, :top_k]):
                answers[index] = in_seconds(rows, pairs[index][0].duration)
        return answers

    def run(
        self, queries: Sequence[np.ndarray], segments: Sequence[Segments], batch_size: int = BATCH_SIZE
    ) -> Iterator[tuple[np.ndarray, Heads]]:
        """Yield for each batch the positions of its pairs and their heads; see `runtime.tensors.batches`."""
        for chosen, batch in batches(queries, segments, batch_size):
            yield chosen, self.backend.run(batch)

    def encode_query(self, query: str) -> np.ndarray:
        """Return the (L,) word ids of a query that this model can take; raises QueryError otherwise."""
        tokens = self.manifest.vocabulary.encode(query)
        longest = self.manifest.max_query_length
        if len(tokens) > longest:
            raise QueryError(f"The query has {len(tokens)} tokens and this model takes 1 to {longest}; shorten it.")
        return tokens

    def segments(self, video: Video) -> Segments:
        """Return the segments of a video as this model was trained on; FeatureError if the width does not fit."""
        features = self.manifest.features
        if video.features.shape[1] != features.dim:
            raise FeatureError(
                f"The features of {video.name} are {video.features.shape[1]} wide and this model takes {features.kind} "
                f"features of width {features.dim}; extract them with the same network."
            )
        return video.segments(self.manifest.decoding.num_segments, features.pooling, features.clock)


def in_seconds(picks: np.ndarray, duration: float) -> list[Moment]:
    """Return (K, 3) picks, NaN after the last, as moments of a video of `duration` seconds."""
    return [
        Moment(float(start) * duration, float(end) * duration, float(score))
        for start, end, score in picks.tolist()
        if score == score
    ]
