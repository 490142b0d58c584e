"""Define the timing of clips, and pool clip features into segments."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from runtime.core.errors import (
    FeatureError,
    invalid_setting,
)

Pooling = Literal["mmaction2", "drn"]

# Relative difference of clips and frames that gives a warning, and ratio and difference that give an error. Published
# files lack up to a few clips, and rounding changes short videos by one or two.
CLOCK_SLACK = 0.1
MAX_CLIP_RATIO = 1.5
MAX_CLIP_DIFFERENCE = 2


@dataclasses.dataclass(frozen=True)
class ClipTiming:
    """The frames behind a clip feature: `window` frames, one clip every `stride` frames (C3D: 16 and 8)."""

    window: int = 16
    stride: int = 8

    def __post_init__(self) -> None:
        if self.window < 1 or self.stride < 1:
            raise FeatureError(
                f"Expected a clip window and stride of at least 1 frame, got {self.window} and {self.stride}. Correct "
                "the clip timing.",
                code="invalid_clip_timing",
            )

    def __str__(self) -> str:
        return f"{self.window} frames a clip, one every {self.stride}"

    def num_clips(self, num_frames: int) -> int:
        """Return the number of complete windows in `num_frames` frames, at least one."""
        return max(1, (num_frames - self.window) // self.stride + 1)

    def num_frames(self, num_clips: int) -> int:
        """Return the number of frames in `num_clips` windows; the video may have up to `stride` - 1 more."""
        return (num_clips - 1) * self.stride + self.window

    def fits(self, num_frames: int, num_clips: int) -> bool:
        """Return whether a video of `num_frames` frames has `num_clips` clips, up to a small difference."""
        expected = self.num_clips(num_frames)
        return abs(expected - num_clips) <= max(1, CLOCK_SLACK * expected)

    def contradicts(self, num_frames: int, num_clips: int) -> bool:
        """Return whether features of `num_clips` clips must have another timing or belong to another video."""
        low, high = sorted((self.num_clips(num_frames), num_clips))
        return high > MAX_CLIP_RATIO * low and high - low > MAX_CLIP_DIFFERENCE


@dataclasses.dataclass(frozen=True)
class Segments:
    """The input of the network for one video.

    Attributes:
        features: (T, D), element-wise maximum of the clips of each segment; float32 from `Video.segments`.
        spans: (T, 2) float64, starts and ends as fractions of the video.
    """

    features: np.ndarray
    spans: np.ndarray


def pool_segments(
    features: np.ndarray, num_frames: int, num_segments: int, pooling: Pooling, clock: ClipTiming
) -> Segments:
    """Return the segments of a video; see `Video.segments` for the rules.

    Args:
        features: (num_clips, D) floats.

    Returns:
        Features (T, D) float32, and spans (T, 2) float64 as fractions of the video.
    """
    first, last, spans = segment_rows(num_frames, num_segments, pooling, clock)
    return Segments(max_over_rows(features, first, last).astype(np.float32, copy=False), spans)


def segment_rows(
    num_frames: int, num_segments: int, pooling: Pooling, clock: ClipTiming
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the clips and the spans of the segments of a video; see `Video.segments` for the rules.

    Args:
        num_segments: number of segments T.
        clock: window and stride of the clips, in frames.

    Returns:
        (T,) indices of the first clips, (T,) indices of the last clips, and (T, 2) float64 spans as fractions.
    """
    if pooling == "mmaction2":
        step = (num_frames - 1) / num_segments
        borders = (step * np.arange(num_segments + 1)).astype(np.int64)
        # T * ((N - 1) / T) may round to less than N - 1, which is the last border by definition.
        borders[-1] = num_frames - 1
        starts, ends = borders[:-1], borders[1:]
        return starts // clock.stride, ends // clock.stride, np.stack((starts, ends), 1) / num_frames
    if pooling == "drn":
        borders = np.floor(np.linspace(1, num_frames, num_segments + 1)).astype(np.int64)
        starts, ends = borders[:-1], borders[1:]
        first = starts // clock.stride
        last = np.where(ends - starts <= clock.window, first, np.maximum(first, (ends - 1) // clock.stride))
        return first, last, np.stack((starts, ends), 1) / num_frames
    raise invalid_setting("'mmaction2' or 'drn' for pooling", pooling, "correct the argument", FeatureError)


def max_over_rows(features: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the element-wise maxima over ranges of rows.

    Rows after the end are clipped to the last row, because some feature files are shorter than their frame count.

    Args:
        features: (num_clips, D) floats.
        first, last: (T,) int, first and last row of each range; the last is included.

    Returns:
        (T, D) maxima in the dtype of `features`.
    """
    end = len(features) - 1
    # NumPy compares float16 in software, ten times slower than integers of the same order.
    ordered = _sortable_float16_bits(features.view(np.int16)) if features.dtype == np.float16 else features
    rows = np.stack(
        [ordered[start : stop + 1].max(axis=0) for start, stop in zip(np.minimum(first, end), np.minimum(last, end))]
    )
    return _sortable_float16_bits(rows).view(np.float16) if features.dtype == np.float16 else rows


def _sortable_float16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the int16 bits of finite float16 as integers of the same order, and the reverse.

    All bits but the sign of negative numbers are inverted.
    """
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))
