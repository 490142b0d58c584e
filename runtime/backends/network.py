"""Run a model on encoded windows: `encode` and `run`, alike for a model that was split and one that was not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union, cast

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.backends.base import Backend, PairBackend
from runtime.core.batch import Batch, Heads, stack_segments
from runtime.core.errors import FeatureError, ModelFileError, printable_line
from runtime.core.nvtx_ranges import marked
from runtime.core.video import Segments

Encoding = Union[Segments, EncodedVideo]
"""What a model reads of one window: its `features` and `spans`."""


class UnsplitNetwork:
    """Run a model that was not split: the encoding of a window is its segments."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def encode(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> Segments:
        """Return the segments as they are."""
        del duration, name, offset
        return segments

    def check(self, video: EncodedVideo) -> None:
        """Raise ModelFileError: this model reads no encoding of a video part."""
        raise ModelFileError(
            f"{video.name} is encoded and this model is whole, so it takes features; give the query part "
            "(.query.onnx) of the model that encoded it.",
            code="query_part_required",
        )

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Encoding], encoding_index: np.ndarray
    ) -> Heads:
        """Return the heads of B queries; arguments as of `SplitNetwork.run`."""
        segments = [cast(Segments, encodings[index]) for index in encoding_index]
        return self._backend.run(Batch(tokens, lengths, *stack_segments(segments)))


class SplitNetwork:
    """Run a model that was split, whose video part encodes each window once.

    Attributes:
        video_part: SHA-256 of the file that encodes.
    """

    def __init__(self, backend: PairBackend) -> None:
        self._backend = backend
        self.video_part = next(iter(backend.manifest.video_part.values()), "")

    @marked("encode video")
    def encode(self, segments: Segments, duration: float, name: str, offset: float = 0.0) -> EncodedVideo:
        """Return the encoding of a window.

        Args:
            segments: of the window, T times D.
            duration: of the window, in seconds.
            name, offset: of its video.
        """
        features = self._backend.encode(segments.features[None].astype(np.float32, copy=False))[0]
        return EncodedVideo(features, segments.spans.astype(np.float32), duration, name, self.video_part, offset=offset)

    def check(self, video: EncodedVideo) -> None:
        """Raise FeatureError unless this model can read an encoding."""
        if video.model != self.video_part:
            raise FeatureError(
                f"{video.name} was encoded by another model (video part "
                f"{printable_line(video.model[:12]) or 'unknown'}, and {self.video_part[:12]} is wanted); encode it "
                "again with this one.",
                code="encoding_of_another_model",
            )
        manifest = self._backend.manifest
        expected = (manifest.features.dim, manifest.decoding.num_segments)
        if video.features.shape != expected:
            raise FeatureError(
                f"The encoding of {video.name} is of shape {video.features.shape} and this model takes {expected}; "
                "encode it again with this one.",
                code="shape_mismatch",
            )

    def run(
        self, tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Encoding], encoding_index: np.ndarray
    ) -> Heads:
        """Return the heads of B queries.

        Args:
            tokens: (B, L) int32 word ids, 0 past each length.
            lengths: (B,) int32.
            encodings: of V windows.
            encoding_index: (B,) int32, the window of each query.
        """
        return self._backend.ask(tokens, lengths, cast("Sequence[EncodedVideo]", encodings), encoding_index)


Network = Union[UnsplitNetwork, SplitNetwork]


def network_of(backend: Backend) -> Network:
    """Return what runs the model of a backend."""
    if backend.manifest.part == "query":
        return SplitNetwork(cast(PairBackend, backend))
    return UnsplitNetwork(backend)
