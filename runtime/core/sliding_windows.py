"""A video longer than any the model learnt from is cut into overlapping windows, and their answers become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import Decoding, Proposals, apply_nms
from runtime.core.errors import GroundingError, ModelFileError, check_argument, one_line
from runtime.core.video import LONGEST_SECONDS, ClipTiming

# Of the training videos' and the training moments' durations.
QUANTILE = 0.95


@dataclasses.dataclass(frozen=True)
class Windows:
    """How long videos are cut, in seconds. Travels in the manifest of a model.

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
                f"Windows of {self.length} s that share {self.overlap} s, for videos above {self.longest} s, cannot be "
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
        """Where it ends in the video, in seconds."""
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
    """What the windows of one video propose for Q queries, until all have been asked.

    Only likely proposals are kept, so that a window in which nothing is likely adds nothing. Scores are comparable as
    they are: probabilities of one network, each for a part of like length.

    Args:
        queries: Q.
        windows: of the video.

    Attributes:
        unit: seconds of a window. Spans are counted in it until NMS is done, which treats long proposals otherwise than
            short ones, as shares of what the network saw.
    """

    def __init__(self, queries: int, windows: Sequence[Window]) -> None:
        self._windows = windows
        self.unit = windows[0].duration
        self._found: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(queries)]

    def add(self, query: int, window: int, spans: np.ndarray, scores: np.ndarray) -> None:
        """Take what a window proposes for a query: (P, 2) fractions of the window, and (P,); see `Proposals`."""
        likely = scores > -np.inf
        location = self._windows[window]
        start, scale = np.float32(location.start / self.unit), np.float32(location.duration / self.unit)
        self._found[query][window] = (spans[likely] * scale + start, scores[likely])

    def picks(self, decoding: Decoding, count: int) -> Iterator[np.ndarray]:
        """Yield for each query the picks of one NMS over what all windows propose, (K, 3), in multiples of `unit`; see
        `decode`. None are left where no window holds a likely location."""
        for result in self._found:
            parts = [result[window] for window in sorted(result)]
            spans, scores = (np.concatenate(values) for values in zip(*parts))
            yield apply_nms(Proposals(spans[None], scores[None]), decoding, min(count, len(scores)))[0]
