"""Run whole and split models through one interface: encode windows, then run queries on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.base import Backend, PairBackend
from runtime.core.batch import Batch, Heads, stack_segments
from runtime.core.errors import FeatureError, ModelFileError, printable_line
from runtime.core.nvtx_ranges import marked
from runtime.core.pooling import Segments

Encoding = Union[Segments, EncodedVideo]
"""Input of a network for one window: segments (T, D), or the encoding (D, T) of a split model; and spans (T, 2)."""


class UnsplitNetwork:
    """Run a model that was not split. Its input is segments, so the encoding of a window is the segments themselves."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def encode(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> Segments:
        """Return the segments unchanged; the other arguments have no effect."""
        del duration, name, offset
        return segments

    def check(self, video: EncodedVideo) -> None:
        """Raise ModelFileError, because only split models accept encodings."""
        raise ModelFileError(
            f"{video.name} is encoded, but this model was not split and accepts features only. Give the query part "
            "(.query.onnx) of the model that encoded the video.",
            code="query_part_required",
        )

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Encoding], encoding_index: np.ndarray
    ) -> Heads:
        """Return the heads of B queries; see `SplitNetwork.run`."""
        segments = [cast(Segments, encodings[index]) for index in encoding_index]
        return self._backend.run(Batch(tokens, lengths, *stack_segments(segments)))


class SplitNetwork:
    """Run a split model, whose video part encodes each window once.

    Attributes:
        video_part: SHA-256 of the video part.
    """

    def __init__(self, backend: PairBackend) -> None:
        self._backend = backend
        self.video_part = next(iter(backend.manifest.video_part.values()), "")

    @marked("encode video")
    def encode(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> EncodedVideo:
        """Return the encoding of a window.

        Args:
            segments: (T, D) features and (T, 2) spans of the window.
            duration: duration of the window, in seconds.
            offset: seconds from the start of the video file to its first frame.
        """
        features = self._backend.encode(segments.features[None].astype(np.float32, copy=False))[0]
        return EncodedVideo(features, segments.spans.astype(np.float32), duration, name, self.video_part, offset=offset)

    def check(self, video: EncodedVideo) -> None:
        """Raise FeatureError unless this model produced an encoding."""
        if video.model != self.video_part:
            raise FeatureError(
                f"{video.name} was encoded by another model: expected video part {self.video_part[:12]}, got "
                f"{printable_line(video.model[:12]) or 'unknown'}. Encode it again with this model.",
                code="encoding_of_another_model",
            )
        manifest = self._backend.manifest
        expected = (manifest.features.dim, manifest.decoding.num_segments)
        if video.features.shape != expected:
            raise FeatureError(
                f"Expected an encoding of shape {expected} for {video.name}, got {video.features.shape}. Encode it "
                "again with this model.",
                code="shape_mismatch",
            )

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Encoding], encoding_index: np.ndarray
    ) -> Heads:
        """Return the heads of B queries.

        Args:
            tokens: (B, L) int32 word ids, 0 past each length.
            lengths: (B,) int32 lengths in tokens.
            encodings: encodings of V windows.
            encoding_index: (B,) int32 index in `encodings` of the window of each query.

        Returns:
            Heads of the queries, as `Backend.run` returns them.
        """
        return self._backend.ask(tokens, lengths, cast("Sequence[EncodedVideo]", encodings), encoding_index)


Network = Union[UnsplitNetwork, SplitNetwork]


def network_of(backend: Backend) -> Network:
    """Return the network of a backend, split or not."""
    if backend.manifest.part == "query":
        return SplitNetwork(cast(PairBackend, backend))
    return UnsplitNetwork(backend)
