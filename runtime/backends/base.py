"""Define what runs a network: the protocols of backends, and devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import Batch, Heads
from runtime.core.moments import Moment
from runtime.core.sliding_windows import Windows
from runtime.core.video import Video

Device = Literal["auto", "cpu", "cuda"]


MAX_THREADS = 1024


class Backend(Protocol):
    """Something that runs the network."""

    @property
    def manifest(self) -> Manifest:
        """Return the manifest of the model."""

    def run(self, batch: Batch) -> Heads:
        """Return the heads of every query of the batch, in its order."""


class PairBackend(Backend, Protocol):
    """Something that runs a network cut in two: videos are encoded once and asked often.

    Its manifest is that of the query part: `part` is "query", `locate_video_part` names the other. `run` answers as the
    whole model would (`run_pair`).
    """

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return (V, D, T) encoded features of (V, T, D) float32 segments."""

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries, (B, L) and (B,) int32, each about the video that `video_index`, (B,), says."""


class QueryServer(Protocol):
    """A server that answers whole queries: it encodes, runs and decodes where the network is."""

    def ground(
        self,
        video: Video,
        queries: Sequence[str],
        top_k: int,
        *,
        windows: Windows | Literal["model"] | None,
        always: bool,
    ) -> Iterator[list[Moment]]:
        """Yield for each query at most `top_k` moments in seconds, best first.

        Args:
            video: its clip features, (num_clips, D).
            queries: sentences.
            top_k: maximum number of moments for each query.
            windows: how the video is cut; "model" for what the model says, None for not at all.
            always: whether a query gets moments although the model's threshold says that none fits.
        """


def run_pair(pair: PairBackend, batch: Batch) -> Heads:
    """Return what a whole model would: for callers that hold batches of segments, and share no video."""
    features = pair.encode(batch.segment_features)
    videos = [EncodedVideo(encoded, spans, 1.0) for encoded, spans in zip(features, batch.segment_spans)]
    return pair.ask(batch.query_tokens, batch.query_length, videos, np.arange(len(batch), dtype=np.int32))
