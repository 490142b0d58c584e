"""Correct the time stamps of a stream, which may restart or jump, into one increasing time line."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# A larger step forward, in seconds, is a discontinuity in formats that allow them (MPEG-TS, MPEG-PS). The value is
# ffmpeg's -dts_delta_threshold.
BROADCAST_JUMP = 10.0
# The same in other formats, where a frame may be displayed for long. The value is mpv's.
JUMP = 1e4
# A larger step back at a key frame, in seconds, is a restart. The value is ffmpeg's AV_TIME_BASE / 10.
SLACK = 0.1
# A step back of at least so many seconds and frames is a restart anywhere. Decoders reorder at most 16 frames.
BACK_SECONDS, BACK_FRAMES = 1.0, 17
# A jump is a gap of the video if a packet of another stream is in the middle half of it.
MIDDLE = (0.25, 0.75)


class Stamp(NamedTuple):
    """The time stamps of a packet, in ticks.

    Attributes:
        is_shown: False for frames that an edit list hides.
    """

    pts: int | None
    dts: int | None
    is_key: bool = False
    is_shown: bool = True

    @property
    def time(self) -> int | None:
        """The presentation time, or else the decoding time."""
        return self.dts if self.pts is None else self.pts


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive packets whose time stamps need the same correction.

    Attributes:
        first: index of its first packet, in file order.
        shift: ticks to add to its time stamps.
        start, end: smallest and largest time before the correction, in ticks.
    """

    first: int
    shift: int
    start: int
    end: int


def usual_step(stamps: Sequence[Stamp], default: float) -> float:
    """Return the median step between packets in file order, in ticks.

    Args:
        default: result in ticks if no step is known.
    """
    times = [stamp.dts if stamp.dts is not None else stamp.pts for stamp in stamps if stamp.is_shown]
    known = np.array([time for time in times if time is not None], np.int64)
    steps = np.abs(np.diff(known))
    steps = steps[steps > 0]
    return float(np.median(steps)) if len(steps) else default


def split(
    stamps: Sequence[Stamp],
    unit: float,
    step: float,
    frame_ticks: float,
    *,
    broadcast: bool = False,
    others: Iterable[float] = (),
) -> tuple[Part, ...]:
    """Split a stream where its time stamps restart or jump, and shift each part to the end of the previous one.

    Source: `ts_discontinuity_detect` in ffmpeg's ffmpeg_demux.c; `handle_new_frame` in mpv's player/video.c.

    Args:
        unit: seconds per tick.
        step: ticks between packets, as `usual_step` returns them.
        frame_ticks: ticks per frame at the frame rate of the header, for packets without a time stamp.
        broadcast: whether the container format allows discontinuities.
        others: times of the packets of other streams in seconds, which distinguish a gap of the video from a jump of
            the clock.

    Returns:
        The parts; at least one if a time stamp is known. The shift of the first part is 0.
    """
    back = max(BACK_SECONDS / unit, BACK_FRAMES * step)
    jump = max((BROADCAST_JUMP if broadcast else JUMP) / unit, 3 * step)
    other_times = np.sort(np.fromiter(others, float)) / unit
    runs: list[_Run] = []
    for index, stamp in enumerate(stamps):
        time = stamp.time
        if time is None or not stamp.is_shown:
            continue
        # Where time stamps restart, some demuxers estimate a decoding time after the presentation time.
        dts = stamp.dts if stamp.dts is not None and stamp.dts <= time else None
        run = runs[-1] if runs else None
        following = stamps[index + 1 : index + 1 + BACK_FRAMES]
        if (
            run is None
            or (stamp.is_key and time < run.end - SLACK / unit)
            or run.restarts(dts, back)
            or (time < run.start - jump and _jumps(time, run.start, following, jump, other_times))
            or (time > run.end + jump and _jumps(run.end, time, following, jump, other_times))
        ):
            runs.append(_Run(index, time, time))
        runs[-1].add(time, dts)
    return tuple(_joined(runs, step, frame_ticks))


@dataclasses.dataclass
class _Run:
    """Consecutive packets whose time stamps neither restart nor jump.

    Attributes:
        max_dts: largest decoding time, in ticks.
        start, end: smallest and largest time, in ticks.
    """

    first: int
    start: int
    end: int
    max_dts: int | None = None
    times: list[int] = dataclasses.field(default_factory=list)

    def restarts(self, dts: int | None, back: float) -> bool:
        """Return whether a decoding time is more than `back` ticks before the largest one so far."""
        return dts is not None and self.max_dts is not None and dts < self.max_dts - back

    def add(self, time: int, dts: int | None) -> None:
        self.start, self.end = min(self.start, time), max(self.end, time)
        self.times.append(time)
        if dts is not None:
            self.max_dts = dts if self.max_dts is None else max(self.max_dts, dts)


def _joined(runs: Sequence[_Run], step: float, frame_ticks: float) -> Iterator[Part]:
    """Yield the runs as parts, each of which starts one frame after the end of the previous one."""
    shift = 0
    steps = np.concatenate([np.diff(np.sort(run.times)) for run in runs] or [np.zeros(0)])
    step = float(np.median(steps)) if len(steps) else step
    for run, following in zip(runs, [*runs[1:], None]):
        yield Part(run.first, shift, run.start, run.end)
        if following is not None:
            packets, length = following.first - run.first, run.end - run.start + step
            # If most packets have no time stamp, the length follows from their number.
            if len(run.times) < packets / 2:
                length = max(run.end - run.start + frame_ticks, packets * frame_ticks)
            shift += round(run.start + length) - following.start


def _jumps(start: int, end: int, following: Sequence[Stamp], jump: float, other_times: np.ndarray) -> bool:
    """Return whether the clock jumps between two times, in ticks.

    Files store frames in decoding order, so that frames of the time in between may follow.

    Args:
        following: the next packets, as many as decoders reorder.
        jump: minimum step of a jump, in ticks.
        other_times: increasing times of the packets of other streams.
    """
    # Frames after the next key frame are displayed after all of these.
    reordered = [stamp.time for stamp in itertools.takewhile(lambda stamp: not stamp.is_key, following)]
    times = sorted({start, end, *(time for time in reordered if time is not None and start < time < end)})
    last, first = max(zip(times, times[1:]), key=lambda pair: pair[1] - pair[0])
    low, high = (last + fraction * (first - last) for fraction in MIDDLE)
    is_gap = np.searchsorted(other_times, high) > np.searchsorted(other_times, low)
    return first - last > jump and not is_gap


def shown_times(stamps: Sequence[Stamp], parts: Sequence[Part], frame_ticks: float) -> np.ndarray:
    """Return the increasing times of the displayed frames, (num_frames,) int64, in ticks.

    Args:
        frame_ticks: ticks per frame at the frame rate of the header, for packets without a time stamp.
    """
    count = sum(stamp.is_shown for stamp in stamps)
    if not parts:
        return np.rint(np.arange(count) * frame_ticks).astype(np.int64)
    known = [
        stamp.time + shift for stamp, shift in zip(stamps, shifts(parts)) if stamp.is_shown and stamp.time is not None
    ]
    span = max(known) - min(known) + frame_ticks
    # Packets without a time stamp are separate frames in MPEG-PS, and second fields elsewhere.
    if len(known) < count and abs(count * frame_ticks - span) < abs(len(known) * frame_ticks - span):
        before = next(index for index, stamp in enumerate(stamps) if stamp.is_shown and stamp.time is not None)
        return np.rint(known[0] + (np.arange(count) - before) * frame_ticks).astype(np.int64)
    return np.sort(np.array(known, np.int64))


def shifts(parts: Sequence[Part]) -> Iterator[int]:
    """Yield the ticks to add to each packet in file order, without end."""
    index = 0
    for part, following in zip(parts, parts[1:]):
        yield from itertools.repeat(part.shift, following.first - index)
        index = following.first
    yield from itertools.repeat(parts[-1].shift if parts else 0)


class SoundShift:
    """Correct the time stamps of the audio stream by the parts of the video stream.

    Args:
        unit: seconds per tick of the video stream.
    """

    # Audio may start before the first frame of its part and end after the last, by so many seconds.
    AROUND = 5.0

    def __init__(self, parts: Sequence[Part], unit: float) -> None:
        self._parts = [(part.start * unit, part.end * unit, part.shift * unit) for part in parts]
        self._index = 0
        self._end: float | None = None

    def shift_at(self, time: float) -> float:
        """Return the seconds to add to the time stamp of the next audio packet in file order, given in seconds too."""
        restarts = self._end is not None and time < self._end - BACK_SECONDS
        if restarts or not self._fits(self._index, time):
            following = range(self._index + 1, len(self._parts))
            result = next((index for index in following if self._fits(index, time)), None)
            if result is not None:
                self._index, self._end = result, None
        self._end = time if self._end is None else max(self._end, time)
        return self._parts[self._index][2] if self._parts else 0.0

    def _fits(self, index: int, time: float) -> bool:
        if index >= len(self._parts):
            return False
        start, end, _ = self._parts[index]
        return start - self.AROUND <= time <= end + self.AROUND
