"""Split a long video into overlapping windows, and merge what is proposed in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import Proposals
from runtime.core.errors import GroundingError, ModelFileError, check_argument, excerpt, one_line
from runtime.core.video import LONGEST_SECONDS, ClipTiming

# Of the training videos' and the training moments' durations.
QUANTILE = 0.95


@dataclasses.dataclass(frozen=True)
class Windows:
    """The length and overlap of the windows of long videos, in seconds; stored in the manifest of a model.

    Attributes:
        longest: a video up to this is grounded whole: the longest of the training videos.
        length: of a window: 95 % of the training videos are no longer.
        overlap: what neighbouring windows share: 95 % of the training moments are no longer, and so lie whole in some
            window; at most half of `length`.
    """

    longest: float
    length: float
    overlap: float

    def __post_init__(self) -> None:
        sizes = (self.longest, self.length, self.overlap)
        if not all(isinstance(size, (int, float)) for size in sizes) or not (
            0 < self.length <= self.longest <= LONGEST_SECONDS and 0 <= self.overlap <= self.length / 2
        ):
            raise ModelFileError(
                f"Windows of {excerpt(self.length)} s that share {excerpt(self.overlap)} s, for videos above "
                f"{excerpt(self.longest)} s, cannot be "
                "cut: a window is longer than 0 s, shares at most half of itself, and is no longer than what is cut.",
                code="invalid_setting",
            )

    @classmethod
    def of(cls, videos: Sequence[float], moments: Sequence[float]) -> Windows:
        """Return the windows of a model that learns from videos and moments of these durations, in seconds."""
        length = float(np.quantile(videos, QUANTILE))
        return cls(float(max(videos)), length, min(float(np.quantile(moments, QUANTILE)), length / 2))

    def __str__(self) -> str:
        return f"in windows of {self.length:g} s that share {self.overlap:g} s, above {self.longest:g} s"

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Windows:
        check_argument("value", value, Mapping, "what `to_dict` returns", ModelFileError)
        try:
            return cls(**value)
        except TypeError as error:
            raise ModelFileError(
                f"Expected what `to_dict` returns: {one_line(error)}. Export the model again."
            ) from error


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a video that is grounded like a video of its own.

    Attributes:
        first, last: its clips, last included.
        num_frames: its length in frames.
        start, duration: where it starts in the video and how long it is, in seconds.
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
    """Return how long videos are cut: the model's own windows, but for a length and an overlap that were asked for, in
    seconds. A length of 0 asks for whole videos; without an overlap the model's is taken, or half of the length."""
    if length == 0:
        return None
    if length is not None:
        shared = min(own.overlap if own else length, length / 2) if overlap is None else overlap
        return Windows(length, length, shared)
    if overlap is None:
        return own
    if own is None:
        raise GroundingError(
            "This model does not record the length of its training videos and grounds any video whole; --overlap needs "
            "--window SECONDS too.",
            code="missing_option",
        )
    return dataclasses.replace(own, overlap=overlap)


def split_into_windows(
    num_clips: int, num_frames: int, duration: float, windows: Windows, clock: ClipTiming
) -> list[Window]:
    """Return the windows of a video in time order; between them they hold all its clips.

    All are of one length, in clips, and the last one ends where the video ends, so that it shares more with the one
    before than the others do. A video that is no longer than a window is one window, of all its frames.

    Args:
        num_clips, num_frames, duration: of the video; clips beyond its frames do not count.
        windows: how long a window is and how much it shares, rounded to clips (what is shared upwards).
        clock: how clips lie on frames.
    """
    num_clips = min(num_clips, clock.num_clips(num_frames))
    rate = num_frames / duration
    # A window of one clip could be a single frame, which cannot be divided.
    length = max(2, clock.num_clips(round(windows.length * rate)))
    if num_clips <= length:
        return [Window(0, num_clips - 1, num_frames, 0.0, duration)]
    step = max(1, length - int(np.ceil(windows.overlap * rate / clock.stride)))
    # The frames after the last clip, too few for one more; a file that lacks clips has no answer beyond them.
    covered = clock.num_frames(num_clips)
    end = num_frames if num_frames - covered < clock.stride else covered
    cuts = []
    for first in (*range(0, num_clips - length, step), num_clips - length):
        start, last = first * clock.stride, first + length - 1
        frames = end - start if last == num_clips - 1 else clock.num_frames(length)
        cuts.append(Window(first, last, frames, start / rate, frames / rate))
    return cuts


class WindowProposals:
    """Collect the proposals of windows, and merge those of each query about a video once all its windows are there.

    Spans are counted in durations of the first window of the video until NMS is done: NMS treats long proposals
    otherwise than short ones, as fractions of what the network saw. Scores are comparable as they are: probabilities
    of one network, each for a part of like length.

    Args:
        windows: of the video of each of N pairs of a video and a query; empty for a video that is not cut.
    """

    def __init__(self, windows: Sequence[Sequence[Window]]) -> None:
        self._windows = windows
        self._parts: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}

    def add(
        self, pairs: Sequence[int], window_index: Sequence[int], proposals: Proposals
    ) -> tuple[Sequence[int], Proposals]:
        """Add the proposals of B windows, in fractions of the window.

        Args:
            pairs: indices of the pairs, B of them.
            window_index: of the window in its video, B of them.
            proposals: of B rows.

        Returns:
            The pairs all of whose windows have been added now, and their proposals, in durations of the first window.
        """
        windows = self._windows
        if all(len(windows[pair]) <= 1 for pair in pairs):
            return pairs, proposals
        complete = []
        for pair, index, spans, scores in zip(pairs, window_index, proposals.spans, proposals.scores):
            window, unit = windows[pair][index], windows[pair][0].duration
            # A window in which nothing is likely adds nothing.
            likely = scores > -np.inf
            start, scale = np.float32(window.start / unit), np.float32(window.duration / unit)
            parts = self._parts.setdefault(pair, {})
            parts[index] = spans[likely] * scale + start, scores[likely]
            if len(parts) == len(windows[pair]):
                complete.append(pair)
        return complete, _concatenate([self._parts.pop(pair) for pair in complete])


def _concatenate(parts: Sequence[Mapping[int, tuple[np.ndarray, np.ndarray]]]) -> Proposals:
    """Return the proposals of each pair, those of its windows in time order, padded to one number by scores of -inf."""
    rows = [[np.concatenate(arrays) for arrays in zip(*(row[index] for index in sorted(row)))] for row in parts]
    most = max((len(scores) for _, scores in rows), default=0)
    merged = Proposals(np.zeros((len(rows), most, 2), np.float32), np.full((len(rows), most), -np.inf, np.float32))
    for index, (spans, scores) in enumerate(rows):
        merged.spans[index, : len(spans)] = spans
        merged.scores[index, : len(scores)] = scores
    return merged
