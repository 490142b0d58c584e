"""A video file as its frames: decoded one by one, upright, at a constant rate, and as large as a network takes them."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.artifacts.extractor_manifest import ResizeCrop
from runtime.core.errors import VideoFileError
from runtime.core.io.input_files import check_file
from runtime.core.video import LONGEST_SECONDS, MAX_FRAME_RATE, MAX_FRAMES, MIN_FRAME_RATE
from runtime.media.container import HEADS, load_av, open_container
from runtime.media.frames import FrameResizer, orientation, upright
from runtime.media.packets import Packets, read_packets
from runtime.media.timestamps import Part, shifts

log = logging.getLogger("drn")

# Steps between frames that differ by less than this share count as one: 30 frames a second in whole milliseconds
# are 33 or 34 apart, and 60 are 16 or 17.
STEP_TOLERANCE = 0.1
# From this share of equal steps on, the others are gaps in a steady video; below, its rate varies.
STEADY = 0.9
# In a video of steady frames, a step as long as this many others is a gap.
MISSING_STEPS = 4.5
# A file that ends earlier than it says by more than this many seconds, and this share of a frame count, is truncated.
# Containers round durations, and the last frame of some has no length.
MAX_SECONDS = 0.5
MIN_FRAMES = 0.98
# Containers keep times in units of up to a millisecond.
ROUNDING = 1e-3
# Most videos have a key frame within so many seconds.
KEY_SECONDS = 12.0
# A picture that stays on for more seconds is reported: it may be a fault of the time stamps.
LONG_STILL = 600.0


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """The properties of a video file, read from its packets without decoding.

    Frames lie on a grid: number k is what is seen k / `frame_rate` seconds after the first. In a video of constant
    rate these are the frames of the file. Where the rate varies or frames are missing, the one before stays on, and
    of several in one place the first counts.

    Attributes:
        path: the file.
        num_frames: places of the grid.
        frame_rate: frames per second.
        height, width: of a frame as it is stored, before it is turned.
        quarter_turns: how often a frame is to be turned by 90 degrees counterclockwise, to stand upright.
        offset: seconds from the start of the file, as players count, to the first picture.
        length: seconds of the pictures where the file ends before the last grid place does; 0 where it does not.
        mirrored: whether left and right of a frame are to be exchanged before it is turned.
        damage: what is wrong with the file, where something is: a clause for a sentence. Empty when it is whole.
        start: time of the first frame on the file's own clock, in seconds.
        pixel_aspect: how many times as wide as high a stored pixel is shown.
        parts: parts of the file whose time stamps continue each other once they are corrected. Seconds of a footage,
            `start` included, are those after the correction.
        tick: seconds of a tick, in which `parts` count.
    """

    path: Path
    num_frames: int
    frame_rate: float
    height: int
    width: int
    quarter_turns: int = 0
    damage: str = ""
    start: float = 0.0
    pixel_aspect: float = 1.0
    parts: tuple[Part, ...] = ()
    tick: float = 0.0
    mirrored: bool = False
    offset: float = 0.0
    length: float = 0.0

    @property
    def is_continued(self) -> bool:
        """Return whether the time stamps of the file restart or jump, so that seeking by time is not possible."""
        return len(self.parts) > 1

    @property
    def duration(self) -> float:
        """Length in seconds; the last frame is as long as the others, but ends with the file."""
        return self.length or self.num_frames / self.frame_rate

    def check_whole(self, partial: bool) -> None:
        """Raise VideoFileError if the file is damaged, unless what can be decoded of it is enough."""
        if self.damage and not partial:
            raise _damaged(self.path, self.damage)


def probe(path: str | os.PathLike[str]) -> VideoFile:
    """Return what a video file holds; it is read once, and nothing but its first frame is decoded.

    Raises:
        VideoFileError: the file is missing or empty, is no video, or has no frame.
        DeviceError: PyAV is not installed.
    """
    path = Path(path)
    check_file(path, "The video", VideoFileError)
    if path.stat().st_size == 0:
        raise VideoFileError(f"The video {path} is empty (0 bytes); copy or download it again.", code="empty_file")
    with open_container(path) as (container, stream):
        unit = float(stream.time_base)
        packets = read_packets(container, stream)
        times, parts = packets.times(container, stream)
        if not len(times):
            raise VideoFileError(f"{path} has a video stream without a single frame; copy or download it again.")
        rate = _rate(times, unit) or float(stream.average_rate or stream.guessed_rate or 0)
        if not rate > 0:
            raise VideoFileError(f"{path} has no frame rate, and one frame alone has none; give a longer video.")
        damage = _truncation(container, stream, packets, parts) or packets.damage(parts)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        start = int(times[0]) * unit
        offset = _offset(container, start)
        length = 0.0 if damage or len(parts) > 1 else _length(container, start, int(times[-1]) * unit, 1 / rate)
    with open_container(path) as (container, stream):
        first = next(_decoded(container, stream, path, parts), None)
    if first is None:
        raise VideoFileError(f"{path} has a video stream of which no frame can be decoded; copy or download it again.")
    num_frames = round((int(times[-1]) - int(times[0])) * unit * rate) + 1
    if num_frames > MAX_FRAMES or num_frames / rate > LONGEST_SECONDS:
        raise VideoFileError(
            f"{path} lasts {num_frames / rate:.3g} s by its time stamps, {num_frames} frames; write them anew, for "
            "example with `ffmpeg -i FILE -c copy NEW.mkv`."
        )
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        raise VideoFileError(
            f"{path} has {num_frames} frames in {num_frames / rate:.3g} s, which is {rate:.3g} frames per second; "
            f"{MIN_FRAME_RATE} to {MAX_FRAME_RATE} are possible. Encode it at a rate in between, for example with "
            "`ffmpeg -i FILE -r 25 NEW.mp4`.",
            code="frame_rate_out_of_range",
        )
    _report(path, times, parts, unit)
    quarter_turns, mirrored = orientation(first, path)
    return VideoFile(
        path=path,
        num_frames=num_frames,
        frame_rate=rate,
        height=first.height,
        width=first.width,
        quarter_turns=quarter_turns,
        damage=damage,
        start=start,
        pixel_aspect=pixel_aspect,
        parts=parts,
        tick=unit,
        mirrored=mirrored,
        offset=offset,
        length=length,
    )


def offset_of(path: str | os.PathLike[str]) -> float:
    """Return the `offset` of a video file from its header alone; 0 where the header has none.

    Raises:
        VideoFileError: the file is no video.
        DeviceError: PyAV is not installed.
    """
    with open_container(Path(path)) as (container, stream):
        if stream.start_time is None:
            return 0.0
        return _offset(container, stream.start_time * float(stream.time_base))


def _offset(container: Any, start: float) -> float:
    """Return the seconds from the start of a file, as players count, to `start` on its own clock."""
    if container.start_time is None:
        return 0.0
    offset = start - container.start_time / 1e6
    # Header and packets round times in units of their own.
    return offset if offset > ROUNDING else 0.0


def _length(container: Any, start: float, last: float, step: float) -> float:
    """Return the seconds from `start` to the end of a file if that is within the last frame, else 0."""
    container_seconds = (container.duration or 0) / 1e6
    # Some containers count their duration from zero, and some from their start.
    for end in (container_seconds, container_seconds + (container.start_time or 0) / 1e6):
        if last + ROUNDING < end < last + step - ROUNDING:
            return end - start
    return 0.0


def _report(path: Path, times: np.ndarray, parts: Sequence[Part], unit: float) -> None:
    """Log what is odd about the time stamps of a file."""
    if len(parts) > 1:
        after = (parts[0].end - int(times[0])) * unit
        log.warning(
            "%s: the time stamps restart or jump %d times, first after %.1f s; times are those of the frames one after "
            "the other, as players show them.",
            path, len(parts) - 1, after,
        )  # fmt: skip
    steps = np.diff(times)
    if not len(steps):
        return
    longest, begin = steps.max() * unit, (times[steps.argmax()] - times[0]) * unit
    if longest > LONG_STILL:
        log.warning(
            "%s: one picture stays on for %.1f s, from %.1f s on, by the time stamps of the file.", path, longest, begin
        )
        return
    usual = float(np.median(steps))
    steady = (np.abs(steps - usual) <= np.maximum(1, STEP_TOLERANCE * usual)).mean() >= STEADY
    if steady and longest > MISSING_STEPS * usual * unit:
        # A demuxer passes over bytes that it cannot read, and reports nothing but the missing time.
        log.warning(
            "%s has no frame for %.2f s from %.2f s on, and otherwise one every %.3f s: part of the file may be "
            "missing or damaged. The frame before is used for that time.",
            path, longest, begin, usual * unit,
        )  # fmt: skip


def read_frames(
    video_file: VideoFile, framing: ResizeCrop, *, every: int = 1, partial: bool = False, threads: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the picture of each frame of the grid, or of every `every`-th from the first on: (height, width, 3) uint8.

    Frames are decoded one by one; a frame that stays on is yielded again, the same array.

    Args:
        video_file: what `probe` returned.
        framing: resizing and crop.
        every: grid places from picture to picture.
        partial: whether a damaged file is used as far as it can be decoded.
        threads: CPU threads for decoding; as many as FFmpeg likes when None.

    Raises:
        VideoFileError: the file is damaged and `partial` is not set.
    """
    video_file.check_whole(partial)
    av = load_av()
    makers: dict[tuple[int, int], FrameResizer] = {}
    reformatter = av.video.reformatter.VideoReformatter()

    def picture(frame: Any) -> np.ndarray:
        size = (frame.height, frame.width)
        if size not in makers:
            makers[size] = FrameResizer(*size, framing, video_file.quarter_turns, video_file.mirrored)
        return makers[size].of(reformatter.reformat(frame, format="rgba").to_ndarray())

    reached, waiting, shown = -1, None, None
    with open_container(video_file.path, threads) as (container, stream):
        decoded = _decoded(container, stream, video_file.path, video_file.parts, partial=partial)
        for time, frame in _timed(decoded, video_file):
            location = int(time * video_file.frame_rate + 0.5)
            if location <= reached:
                # Its place is taken, but it is on from now.
                waiting, shown = frame, None
                continue
            # Until now the frame before was on; a first frame that comes late stands for those before it too.
            before = frame if waiting is None else waiting
            for filled in range(reached + 1, location):
                if filled % every == 0:
                    shown = picture(before) if shown is None else shown
                    yield shown
            shown = None
            if location % every == 0:
                shown = picture(frame)
                yield shown
            reached, waiting = location, frame
    if not partial and reached + 1 < MIN_FRAMES * video_file.num_frames:
        raise _damaged(
            video_file.path, f"decodes to {reached + 1} frames where its packets hold {video_file.num_frames}"
        )


def frames_at(video_file: VideoFile, times: Sequence[float], height: int, *, partial: bool = True) -> list[np.ndarray]:
    """Return what is seen at some times, upright and in its true shape: (height, width, 3) uint8 each.

    Decoding starts at the last key frame before, so that a few frames of a long video cost little. Of a damaged file
    the last frame that can be decoded stands for what comes after it.

    Args:
        video_file: what `probe` returned.
        times: in seconds from the first frame, rising.
        height: of the pictures, in pixels; none is made larger than it is stored.
        partial: whether damaged frames are shown as they are decoded.

    Raises:
        VideoFileError: a frame on the way is damaged and `partial` is not set.
    """
    results: list[np.ndarray] = []
    last = None
    for frame in _frames_at(video_file, times, partial):
        # A frame that stays on for several of the times is one picture.
        picture = results[-1] if results and frame is last else _small(frame, video_file, height)
        results.append(picture)
        last = frame
    return results


def _frames_at(video_file: VideoFile, times: Sequence[float], partial: bool) -> Iterator[Any]:
    """Yield the frame that is on at each of the rising times; no part is decoded twice."""
    with open_container(video_file.path) as (container, stream):
        # Of a damaged file nothing is sure but its start.
        packets = container.demux(stream) if not (video_file.damage or video_file.is_continued) else ()
        keys = np.array(sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None), np.int64)
        starts = keys * float(stream.time_base) - video_file.start
    after = np.searchsorted(starts, np.array(times) + ROUNDING, side="right") - 1
    for key in np.unique(after):
        expected = [time for time, its_key in zip(times, after) if its_key == key]
        shown, location = None, 0
        for time, frame in frames_from(video_file, float(starts[key]) if key > 0 else 0.0, partial=partial):
            while shown is not None and location < len(expected) and time > expected[location] + ROUNDING:
                yield shown
                location += 1
            if location == len(expected):
                break
            shown = frame
        for _ in expected[location:]:
            assert shown is not None, "look found a first frame"
            yield shown


def frames_from(
    video_file: VideoFile, start: float, threads: int | None = None, *, partial: bool = True
) -> Iterator[tuple[float, Any]]:
    """Yield the frames of a video as PyAV decodes them, each with its seconds after the first.

    Args:
        video_file: what `probe` returned.
        start: seconds; the first frame is that of a key frame at or before it.
        threads: CPU threads for decoding; as many as FFmpeg likes when None.
        partial: whether what cannot be decoded is passed over.

    Raises:
        VideoFileError: the file is damaged from the first frame on, and `partial` is not set.
    """
    av = load_av()
    # Some containers are sought by bytes and land where they like, after the key frame for example; then it is tried
    # from further back, and at last from the start of the file. Where time stamps restart, a time is in several places.
    for target in (start, start - KEY_SECONDS, 0.0) if not video_file.is_continued else (0.0,):
        with open_container(video_file.path, threads) as (container, stream):
            if target > 0:
                try:
                    container.seek(int((video_file.start + target) / float(stream.time_base) + 1e-6), stream=stream)
                except av.FFmpegError:
                    continue
            reached = target <= 0
            sought = target > 0
            decoded = _decoded(container, stream, video_file.path, video_file.parts, partial=partial, sought=sought)
            for time, frame in _timed(decoded, video_file):
                if not reached and (frame.time is None or time > start + ROUNDING):
                    break
                reached = reached or frame.key_frame
                if reached:
                    yield time, frame
            if reached:
                return


def _damaged(path: Path, damage: str) -> VideoFileError:
    return VideoFileError(
        f"{path} {damage}; copy or download it again, or pass --partial to use what can be decoded.",
        code="truncated_video",
    )


def _rate(times: np.ndarray, unit: float) -> float | None:
    """Return frames per second: of the steady steps where nearly all are alike, else on average; None for one frame."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        return None
    usual = np.median(steps)
    alike = np.abs(steps - usual) <= np.maximum(1, STEP_TOLERANCE * usual)
    chosen = steps[alike] if alike.mean() >= STEADY else steps
    return 1 / (float(chosen.mean()) * unit)


def _truncation(container: Any, stream: Any, packets: Packets, parts: Sequence[Part]) -> str:
    """Return how much less is there than the file says, as a clause; empty when all is there."""
    # An edit list may leave stored frames out, and the index after it; the header counts them all the same.
    indexed = len(getattr(stream, "index_entries", ())) or stream.frames
    expected, stored = min(stream.frames, indexed), len(packets.stamps)
    if stored < MIN_FRAMES * expected - 1:
        return f"is cut off: it says {expected} frames and holds {stored}"
    # FFmpeg skips what lies around the head of a second FLV file, and of other formats what lies after one.
    if _restarts(container, 1 if container.format.name == "flv" else packets.last_byte):
        return "consists of several files, of which FFmpeg does not read the last"
    # Some containers count from the first frame and some from zero, so that only an end before both is too early.
    container_seconds = (container.duration or 0) / 1e6
    # The clock of MPEG-TS starts again after 26.5 h, and FFmpeg counts what comes before that from below zero.
    reached = packets.reached - min(0.0, (container.start_time or 0) / 1e6)
    if len(parts) < 2 and 0 < reached < container_seconds - max(MAX_SECONDS, (1 - MIN_FRAMES) * container_seconds):
        return f"is cut off: it says {container_seconds:.1f} s and ends after {reached:.1f} s"
    return ""


def _restarts(container: Any, start: int) -> bool:
    """Return whether another file of the same format begins in this one at byte `start`."""
    head = HEADS.get(container.format.name)
    if head is None or start >= os.path.getsize(container.name):
        return False
    # What lies before is not mapped: a mapping counts as memory where that is limited.
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        open(container.name, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, offset=first) as content,
    ):
        return head.search(content, start - first) is not None


def _timed(frames: Iterator[Any], video_file: VideoFile) -> Iterator[tuple[float, Any]]:
    """Yield the seconds of each frame after the first, and the frame; one without a time follows the one before."""
    time = -1 / video_file.frame_rate
    for frame in frames:
        time = time + 1 / video_file.frame_rate if frame.time is None else frame.time - video_file.start
        yield time, frame


def _decoded(
    container: Any,
    stream: Any,
    path: Path,
    parts: Sequence[Part] = (),
    *,
    partial: bool = True,
    sought: bool = False,
) -> Iterator[Any]:
    """Yield the frames of a stream, their time stamps corrected.

    Args:
        container, stream: from `open_container`.
        path: the file, for messages.
        parts: parts of the file whose time stamps are corrected; the container is at its start where there are several.
        partial: whether damage is passed over: packets that cannot be decoded are left out, and frames that the decoder
            reports as damaged are yielded as a player shows them.
        sought: whether the container was sought to a time. What comes before the first key frame then lacks the frames
            it refers to, and is no damage.

    Raises:
        VideoFileError: the file is damaged and `partial` is not set.
    """
    av = load_av()
    packets = container.demux(stream)
    started = False
    corrections = shifts(parts)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            if partial:
                return
            raise _damaged(path, f"cannot be read to its end ({error.strerror or error})") from error
        if packet is None:
            return
        shift = next(corrections) if packet.size else 0
        if shift:
            packet.pts = packet.pts if packet.pts is None else packet.pts + shift
            packet.dts = packet.dts if packet.dts is None else packet.dts + shift
        if packet.is_corrupt and partial:
            # The decoder would make up what is missing of its frame.
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if not (partial or (sought and not started)):
                raise _damaged(path, f"holds a frame that cannot be decoded ({error.strerror or error})") from error
            log.debug("%s: passed over a packet: %s", path, error)
            continue
        for frame in frames:
            # A recording may begin between key frames, and its first frames then lack what they refer to.
            started = started or frame.key_frame
            if frame.is_corrupt and started and not partial:
                raise _damaged(path, "holds frames that the decoder reports as damaged")
            yield frame


def _small(frame: Any, video_file: VideoFile, height: int) -> np.ndarray:
    """Return a decoded frame as a picture of `height`, turned upright, its pixels made square."""
    tall, wide = frame.height, frame.width * video_file.pixel_aspect
    share = min(1.0, height / (wide if video_file.quarter_turns % 2 else tall))
    size = {"width": max(1, round(wide * share)), "height": max(1, round(tall * share))}
    picture = frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(upright(picture, video_file.quarter_turns, video_file.mirrored))
