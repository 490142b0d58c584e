"""Split a long video into overlapping windows, and merge the proposals of the windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import Proposals
from runtime.core.errors import GroundingError, from_fields, invalid_setting
from runtime.core.pooling import ClipTiming
from runtime.core.video import MAX_DURATION_S

# Quantile of the durations of training videos and moments that sets length and overlap of windows.
QUANTILE = 0.95


@dataclasses.dataclass(frozen=True)
class Windows:
    """The length and overlap of the windows of long videos, in seconds; stored in the manifest of a model.

    Attributes:
        longest: maximum duration of a video that is not split: the longest training video.
        length: duration of a window: the 95 % quantile of the durations of the training videos.
        overlap: overlap of adjacent windows: the 95 % quantile of the durations of the training moments, so that a
            moment of this duration is in one window; at most half of `length`.
    """

    longest: float
    length: float
    overlap: float

    def __post_init__(self) -> None:
        sizes = (self.longest, self.length, self.overlap)
        if not all(isinstance(size, (int, float)) for size in sizes) or not (
            0 < self.length <= self.longest <= MAX_DURATION_S and 0 <= self.overlap <= self.length / 2
        ):
            expected = f"0 < length <= longest <= {MAX_DURATION_S:g} and 0 <= overlap <= length / 2 in seconds"
            actual = {"length": self.length, "longest": self.longest, "overlap": self.overlap}
            raise invalid_setting(expected, actual, "correct --window and --overlap")

    @classmethod
    def of(cls, videos: Sequence[float], moments: Sequence[float]) -> Windows:
        """Return the windows of a model that is trained on videos and moments of these durations, in seconds."""
        length = float(np.quantile(videos, QUANTILE))
        return cls(float(max(videos)), length, min(float(np.quantile(moments, QUANTILE)), length / 2))

    def __str__(self) -> str:
        return f"in windows of {self.length:g} s that share {self.overlap:g} s, above {self.longest:g} s"

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Windows:
        """Return the windows in the result of `to_dict`; ModelFileError for other values."""
        return from_fields(cls, value)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a video that is grounded separately.

    Attributes:
        first, last: indices of its first and last clip.
        num_frames: length in frames.
        start, duration: start in the video and length in seconds.
    """

    first: int
    last: int
    num_frames: int
    start: float
    duration: float

    @property
    def end(self) -> float:
        """Return the end of the window in the video, in seconds."""
        return self.start + self.duration


def resolve_windows(own: Windows | None, length: float | None, overlap: float | None) -> Windows | None:
    """Return the windows of long videos after the options of a command are applied; None if videos are not split.

    Args:
        length: duration of a window in seconds, instead of that of the model; 0 to not split videos.
        overlap: overlap in seconds. With None, that of the model applies, up to half of the length.

    Raises:
        GroundingError: an overlap without any length (code `missing_option`), or of videos that are not split
            (`conflicting_options`).
    """
    if length == 0 and overlap is not None:
        raise GroundingError(
            f"--window 0 turns windows off, but --overlap is {overlap:g}. Remove one.", code="conflicting_options"
        )
    if length == 0:
        return None
    if length is not None:
        default = min(own.overlap if own else length, length / 2)
        return Windows(length, length, default if overlap is None else overlap)
    if overlap is None:
        return own
    if own is None:
        raise GroundingError(
            "--overlap needs a window length, and this model does not record one. Add --window SECONDS.",
            code="missing_option",
        )
    return dataclasses.replace(own, overlap=overlap)


def split_into_windows(
    num_clips: int, num_frames: int, duration: float, windows: Windows, clock: ClipTiming
) -> list[Window]:
    """Return the windows of a video in time order, which together contain all its clips.

    All have the same number of clips. The last window ends with the video, so it may overlap more than the others. A
    video that is no longer than a window is one window with all its frames.

    Args:
        num_clips, num_frames, duration: clips, frames and seconds of the video; clips after the last frame are ignored.
        windows: length and overlap of windows, rounded to clips (the overlap upwards).
    """
    num_clips = min(num_clips, clock.num_clips(num_frames))
    rate = num_frames / duration
    # A window of one clip could be a single frame, which cannot be divided into segments.
    length = max(2, clock.num_clips(round(windows.length * rate)))
    if num_clips <= length:
        return [Window(0, num_clips - 1, num_frames, 0.0, duration)]
    step = max(1, length - int(np.ceil(windows.overlap * rate / clock.stride)))
    # Frames after the last clip belong to the last window only if they are too few for another clip.
    covered = clock.num_frames(num_clips)
    end = num_frames if num_frames - covered < clock.stride else covered
    cuts = []
    for first in (*range(0, num_clips - length, step), num_clips - length):
        start, last = first * clock.stride, first + length - 1
        frames = end - start if last == num_clips - 1 else clock.num_frames(length)
        cuts.append(Window(first, last, frames, start / rate, frames / rate))
    return cuts


class WindowProposals:
    """Collect the proposals of windows, and merge those of a query and a video when all its windows are complete.

    Until NMS, spans are multiples of the duration of the first window, because NMS depends on durations as fractions of
    the input of the network. Scores are comparable: they are probabilities of one network for parts of similar length.

    Args:
        windows: windows of the video of each of N pairs of a video and a query; empty for a video that is not split.
    """

    def __init__(self, windows: Sequence[Sequence[Window]]) -> None:
        self._windows = windows
        self._parts: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}

    def add(
        self, pairs: Sequence[int], window_index: Sequence[int], proposals: Proposals
    ) -> tuple[Sequence[int], Proposals]:
        """Add the proposals of B windows.

        Args:
            pairs: B indices of pairs.
            window_index: B indices of windows in their videos.
            proposals: B rows, with spans as fractions of the window.

        Returns:
            The pairs whose windows are complete now, and their proposals, with spans as multiples of the duration of
            the first window.
        """
        windows = self._windows
        if all(len(windows[pair]) <= 1 for pair in pairs):
            return pairs, proposals
        complete = []
        for pair, index, spans, scores in zip(pairs, window_index, proposals.spans, proposals.scores):
            window, unit = windows[pair][index], windows[pair][0].duration
            likely = scores > -np.inf
            start, scale = np.float32(window.start / unit), np.float32(window.duration / unit)
            parts = self._parts.setdefault(pair, {})
            parts[index] = spans[likely] * scale + start, scores[likely]
            if len(parts) == len(windows[pair]):
                complete.append(pair)
        return complete, _concatenate([self._parts.pop(pair) for pair in complete])


def _concatenate(parts: Sequence[Mapping[int, tuple[np.ndarray, np.ndarray]]]) -> Proposals:
    """Return the proposals of each pair, in time order of its windows, padded with scores of -inf."""
    rows = [[np.concatenate(arrays) for arrays in zip(*(row[index] for index in sorted(row)))] for row in parts]
    size = max((len(scores) for _, scores in rows), default=0)
    merged = Proposals(np.zeros((len(rows), size, 2), np.float32), np.full((len(rows), size), -np.inf, np.float32))
    for index, (spans, scores) in enumerate(rows):
        merged.spans[index, : len(spans)] = spans
        merged.scores[index, : len(scores)] = scores
    return merged
