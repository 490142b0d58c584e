"""Turn the time stamps of a stream, which may restart or jump, into one time line that only rises."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# A step forward of more seconds is a discontinuity in containers whose format allows them (MPEG-TS, MPEG-PS):
# ffmpeg's -dts_delta_threshold.
BROADCAST_JUMP = 10.0
# The same in other containers, where a picture may stay on for long: mpv's limit.
JUMP = 1e4
# A step back by more seconds is one at a key frame: ffmpeg's AV_TIME_BASE / 10.
SLACK = 0.1
# A step back between key frames is one from this many seconds and frames on. Decoders reorder 16 frames at most.
BACK_SECONDS, BACK_FRAMES = 1.0, 17
# A jump is a true gap if a packet of another stream lies in the middle half of it.
MIDDLE = (0.25, 0.75)


class Stamp(NamedTuple):
    """The time stamps of a packet, in ticks.

    Attributes:
        pts: when its frame is shown, where known.
        dts: when its frame is decoded, where known.
        is_key: whether it is a key frame.
        is_shown: False for what an edit list hides.
    """

    pts: int | None
    dts: int | None
    is_key: bool = False
    is_shown: bool = True

    @property
    def time(self) -> int | None:
        """The time it is shown; the time it is decoded where that alone is known."""
        return self.dts if self.pts is None else self.pts


@dataclasses.dataclass(frozen=True)
class Part:
    """Consecutive packets whose time stamps need the same correction.

    Attributes:
        first: number of its first packet, in the order of the file.
        shift: ticks to add to its time stamps.
        start, end: smallest and largest time in it, in ticks, before the correction.
    """

    first: int
    shift: int
    start: int
    end: int


def usual_step(stamps: Sequence[Stamp], default: float) -> float:
    """Return the median ticks from packet to packet in the order of the file; `default` where no step is known."""
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
    """Divide a stream where its time stamps restart or jump, and let each part continue after the one before.

    Source: `ts_discontinuity_detect` in ffmpeg's ffmpeg_demux.c; `handle_new_frame` in mpv's player/video.c.

    Args:
        stamps: of the packets, in the order of the file.
        unit: seconds of a tick.
        step: ticks from packet to packet, from `usual_step`.
        frame_ticks: ticks of a frame as the header of the file gives its rate, for packets without a time stamp.
        broadcast: whether the format of the container allows discontinuities.
        others: seconds of the packets of other streams, which separate a gap in the pictures from a jump of the clock.

    Returns:
        The parts, at least one where a time stamp is known; the shift of the first is 0.
    """
    back = max(BACK_SECONDS / unit, BACK_FRAMES * step)
    jump = max((BROADCAST_JUMP if broadcast else JUMP) / unit, 3 * step)
    sounds = np.sort(np.fromiter(others, float)) / unit
    runs: list[_Run] = []
    for number, stamp in enumerate(stamps):
        time = stamp.time
        if time is None or not stamp.is_shown:
            continue
        # A demuxer that estimates it puts it after the time of showing where time stamps restart.
        dts = stamp.dts if stamp.dts is not None and stamp.dts <= time else None
        run = runs[-1] if runs else None
        following = stamps[number + 1 : number + 1 + BACK_FRAMES]
        if (
            run is None
            or (stamp.is_key and time < run.end - SLACK / unit)
            or run.restarts(dts, back)
            or (time < run.start - jump and _jumps(time, run.start, following, jump, sounds))
            or (time > run.end + jump and _jumps(run.end, time, following, jump, sounds))
        ):
            runs.append(_Run(number, time, time))
        runs[-1].add(time, dts)
    return tuple(_joined(runs, step, frame_ticks))


@dataclasses.dataclass
class _Run:
    """Packets in a row whose time stamps neither restart nor jump; attributes as of `EnginePart`, in ticks.

    Attributes:
        decoded: largest time of decoding.
        times: of the packets that have one.
    """

    first: int
    start: int
    end: int
    decoded: int | None = None
    times: list[int] = dataclasses.field(default_factory=list)

    def restarts(self, dts: int | None, back: float) -> bool:
        """Return whether a packet is decoded more than `back` ticks before the packets so far."""
        return dts is not None and self.decoded is not None and dts < self.decoded - back

    def add(self, time: int, dts: int | None) -> None:
        self.start, self.end = min(self.start, time), max(self.end, time)
        self.times.append(time)
        if dts is not None:
            self.decoded = dts if self.decoded is None else max(self.decoded, dts)


def _joined(runs: Sequence[_Run], step: float, frame_ticks: float) -> Iterator[Part]:
    """Yield the runs as parts, each of which begins one frame after the end of the one before."""
    shift = 0
    steps = np.concatenate([np.diff(np.sort(run.times)) for run in runs] or [np.zeros(0)])
    step = float(np.median(steps)) if len(steps) else step
    for run, following in zip(runs, [*runs[1:], None]):
        yield Part(run.first, shift, run.start, run.end)
        if following is not None:
            packets, length = following.first - run.first, run.end - run.start + step
            # Where most packets have no time stamp, those after the last one that has are counted.
            if len(run.times) < packets / 2:
                length = max(run.end - run.start + frame_ticks, packets * frame_ticks)
            shift += round(run.start + length) - following.start


def _jumps(start: int, end: int, following: Sequence[Stamp], jump: float, sounds: np.ndarray) -> bool:
    """Return whether the clock jumps between two times, in ticks.

    Frames are decoded in another order than they are shown in, so that those in between may follow.

    Args:
        start, end: the times.
        following: the packets after those of the two times, as many as decoders reorder.
        jump: ticks between two frames that are a jump, unless the pictures alone have a gap.
        sounds: rising times of the packets of other streams.
    """
    # Frames after the next key frame are shown after all of these.
    reordered = [stamp.time for stamp in itertools.takewhile(lambda stamp: not stamp.is_key, following)]
    times = sorted({start, end, *(time for time in reordered if time is not None and start < time < end)})
    last, first = max(zip(times, times[1:]), key=lambda pair: pair[1] - pair[0])
    low, high = (last + share * (first - last) for share in MIDDLE)
    is_gap = np.searchsorted(sounds, high) > np.searchsorted(sounds, low)
    return first - last > jump and not is_gap


def shown_times(stamps: Sequence[Stamp], parts: Sequence[Part], frame_ticks: float) -> np.ndarray:
    """Return the times of the frames that are shown, in ticks, rising, (num_frames,) int64.

    Args:
        stamps: of the packets, in the order of the file.
        parts: from `split`.
        frame_ticks: ticks of a frame as the file's header gives its rate, for packets without a time stamp.
    """
    if not parts:
        return np.rint(np.arange(sum(stamp.is_shown for stamp in stamps)) * frame_ticks).astype(np.int64)
    known = [
        stamp.time + shift for stamp, shift in zip(stamps, shifts(parts)) if stamp.is_shown and stamp.time is not None
    ]
    count = sum(stamp.is_shown for stamp in stamps)
    span = max(known) - min(known) + frame_ticks
    # Packets without a time stamp are frames of their own in MPEG-PS, and second fields elsewhere.
    if len(known) < count and abs(count * frame_ticks - span) < abs(len(known) * frame_ticks - span):
        before = next(number for number, stamp in enumerate(stamps) if stamp.is_shown and stamp.time is not None)
        return np.rint(known[0] + (np.arange(count) - before) * frame_ticks).astype(np.int64)
    return np.sort(np.array(known, np.int64))


def shifts(parts: Sequence[Part]) -> Iterator[int]:
    """Yield the ticks to add to each packet, in the order of the file, without an end."""
    number = 0
    for part, following in zip(parts, parts[1:]):
        while number < following.first:
            yield part.shift
            number += 1
    while True:
        yield parts[-1].shift if parts else 0


class SoundShift:
    """The correction of another stream of the same file, whose packets lie before or after those of the pictures.

    Args:
        parts: of the pictures.
        unit: seconds of a tick of the pictures.
    """

    # Sound may begin before the pictures of its part, and end after them.
    AROUND = 5.0

    def __init__(self, parts: Sequence[Part], unit: float) -> None:
        self._parts = [(part.start * unit, part.end * unit, part.shift * unit) for part in parts]
        self._index = 0
        self._end: float | None = None

    def of(self, time: float) -> float:
        """Return the seconds to add to a packet, given in the order of the file, of `time` seconds."""
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
