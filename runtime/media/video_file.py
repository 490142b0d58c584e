"""Probe video files, and decode them into upright frames at a constant rate, in the size that a network takes."""

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
from runtime.core.video import MAX_DURATION_S, MAX_FRAME_RATE, MAX_FRAMES, MIN_FRAME_RATE
from runtime.media.container import MAGIC_BYTES, check_video_file, load_av, open_container
from runtime.media.frames import FrameResizer, orientation, upright
from runtime.media.packets import Packets, read_packets
from runtime.media.timestamps import Part, shifts

log = logging.getLogger("drn")

# Relative difference of steps between frames that count as equal: in whole milliseconds, frames at 30 fps are 33 or 34
# apart, and at 60 fps 16 or 17.
STEP_TOLERANCE = 0.1
# Minimum fraction of equal steps in a video of constant rate; its other steps are gaps.
CONSTANT_RATE_FRACTION = 0.9
# Minimum length of a gap in a video of constant rate, in usual steps.
GAP_STEPS = 4.5
# A file is truncated if it ends earlier than its header declares by more than these seconds, or has less than this
# fraction of the declared frames. Containers round durations, and some store no length of the last frame.
MAX_MISSING_SECONDS = 0.5
MIN_FRAME_FRACTION = 0.98
# Rounding of times in containers, in seconds.
ROUNDING = 1e-3
# Most videos have a key frame at least every so many seconds.
KEY_SECONDS = 12.0
# A frame that is displayed for longer, in seconds, is reported, because time stamps may be wrong.
LONG_STILL = 600.0


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """The properties of a video file, read from its packets without decoding.

    Frames lie on a grid: frame k is the image displayed k / `frame_rate` seconds after the first. In a video of
    constant rate these are the frames of the file. If the rate varies or frames are missing, the previous frame is
    repeated; of several frames at one grid position, the first is used.

    Attributes:
        num_frames: number of grid positions.
        height, width: size in pixels of a frame as it is stored, before rotation.
        quarter_turns: rotations by 90 degrees counterclockwise that make a frame upright.
        damage: damage of the file as a clause; empty if there is none.
        start: time of the first frame on the file's clock, in seconds.
        pixel_aspect: width of a stored pixel relative to its height.
        parts: parts of the file whose time stamps are shifted to continue each other. All times of this class, `start`
            included, are corrected times.
        tick: seconds per tick of `parts`.
        mirrored: whether left and right of a frame are exchanged before the rotation.
        offset: seconds from the start of the file, as players count, to the first frame.
        length: duration in seconds if the file ends within the last grid position; else 0.
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
        """Duration in seconds. The last frame is as long as the others, but not longer than the file."""
        return self.length or self.num_frames / self.frame_rate

    def check_undamaged(self, partial: bool) -> None:
        """Raise VideoFileError if the file is damaged and `partial` is not set."""
        if self.damage and not partial:
            raise _damaged(self.path, self.damage)


def probe(path: str | os.PathLike[str]) -> VideoFile:
    """Return the properties of a video file. All packets are read, but only the first frame is decoded.

    Raises:
        VideoFileError: the file is missing or empty, is not a video, or has no frame.
    """
    path = Path(path)
    check_video_file(path)
    if path.stat().st_size == 0:
        raise VideoFileError(f"The video {path} is empty (0 bytes). Copy or download it again.", code="empty_file")
    with open_container(path) as (container, stream):
        unit = float(stream.time_base)
        packets = read_packets(container, stream)
        times, parts = packets.times(container, stream)
        if not len(times):
            raise VideoFileError(
                f"The video stream of {path} has no frames. Copy or download it again.", code="no_frames"
            )
        rate = _rate(times, unit) or float(stream.average_rate or stream.guessed_rate or 0)
        if not rate > 0:
            raise VideoFileError(
                f"{path} has one frame and no frame rate. Give a longer video.", code="video_too_short"
            )
        damage = _truncation(container, stream, packets, parts) or packets.damage(parts)
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        start = int(times[0]) * unit
        offset = _offset(container, start)
        length = 0.0 if damage or len(parts) > 1 else _length(container, start, int(times[-1]) * unit, 1 / rate)
    with open_container(path) as (container, stream):
        first = next(_decoded(container, stream, path, parts), None)
    if first is None:
        raise VideoFileError(f"No frame of {path} can be decoded. Copy or download it again.", code="no_frames")
    num_frames = round((int(times[-1]) - int(times[0])) * unit * rate) + 1
    if num_frames > MAX_FRAMES or num_frames / rate > MAX_DURATION_S:
        raise VideoFileError(
            f"{path} has {num_frames} frames in {num_frames / rate:.3g} s by its time stamps, which exceeds "
            f"{MAX_FRAMES} frames or {MAX_DURATION_S:g} s. Rewrite the time stamps, for example with `ffmpeg -i FILE "
            "-c copy NEW.mkv`.",
            code="video_too_long",
        )
    if not MIN_FRAME_RATE <= rate <= MAX_FRAME_RATE:
        raise VideoFileError(
            f"Expected {MIN_FRAME_RATE} to {MAX_FRAME_RATE} frames per second, got {rate:.3g} from {num_frames} frames "
            f"in {num_frames / rate:.3g} s of {path}. Encode it at another rate, for example with "
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
    """Return the `offset` of a video file from its header; 0 if the header contains none."""
    with open_container(Path(path)) as (container, stream):
        if stream.start_time is None:
            return 0.0
        return _offset(container, stream.start_time * float(stream.time_base))


def _offset(container: Any, start: float) -> float:
    """Return the seconds from the start of a file, as players count, to the time `start` on its clock."""
    if container.start_time is None:
        return 0.0
    offset = start - container.start_time / 1e6
    # Header and packets round times to different units.
    return offset if offset > ROUNDING else 0.0


def _length(container: Any, start: float, last: float, step: float) -> float:
    """Return the seconds from `start` to the end of a file if the end is within the last frame, else 0."""
    container_seconds = (container.duration or 0) / 1e6
    # Some containers count their duration from zero, and others from their start.
    for end in (container_seconds, container_seconds + (container.start_time or 0) / 1e6):
        if last + ROUNDING < end < last + step - ROUNDING:
            return end - start
    return 0.0


def _report(path: Path, times: np.ndarray, parts: Sequence[Part], unit: float) -> None:
    """Log unusual time stamps of a file."""
    if len(parts) > 1:
        after = (parts[0].end - int(times[0])) * unit
        log.warning(
            "%s: the time stamps restart or jump %d times, first after %.1f s. The parts are joined without gaps, as "
            "in players.",
            path, len(parts) - 1, after,
        )  # fmt: skip
    steps = np.diff(times)
    if not len(steps):
        return
    longest, begin = steps.max() * unit, (times[steps.argmax()] - times[0]) * unit
    if longest > LONG_STILL:
        log.warning(
            "%s: one frame is displayed for %.1f s from %.1f s on, by the time stamps of the file.",
            path,
            longest,
            begin,
        )
        return
    usual = float(np.median(steps))
    is_constant = (np.abs(steps - usual) <= np.maximum(1, STEP_TOLERANCE * usual)).mean() >= CONSTANT_RATE_FRACTION
    if is_constant and longest > GAP_STEPS * usual * unit:
        # A demuxer skips bytes that it cannot read without an error.
        log.warning(
            "%s has no frame for %.2f s from %.2f s on, but otherwise one every %.3f s; part of the file may be "
            "missing or damaged. The previous frame is repeated.",
            path, longest, begin, usual * unit,
        )  # fmt: skip


def read_frames(
    video_file: VideoFile, framing: ResizeCrop, *, every: int = 1, partial: bool = False, threads: int | None = None
) -> Iterator[np.ndarray]:
    """Yield every frame of the grid, or every `every`-th, resized and cropped to (height, width, 3) uint8 RGB.

    Frames are decoded one by one. A repeated frame is yielded as the same array.

    Args:
        every: step between the yielded grid positions.
        partial: whether to accept a damaged file, and use what can be decoded.

    Raises:
        VideoFileError: the file is damaged and `partial` is not set.
    """
    video_file.check_undamaged(partial)
    av = load_av()
    resizers: dict[tuple[int, int], FrameResizer] = {}
    reformatter = av.video.reformatter.VideoReformatter()

    def resized(frame: Any) -> np.ndarray:
        size = (frame.height, frame.width)
        if size not in resizers:
            resizers[size] = FrameResizer(*size, framing, video_file.quarter_turns, video_file.mirrored)
        return resizers[size].resize(reformatter.reformat(frame, format="rgba").to_ndarray())

    last_index, last_frame, image = -1, None, None
    with open_container(video_file.path, threads) as (container, stream):
        decoded = _decoded(container, stream, video_file.path, video_file.parts, partial=partial)
        for time, frame in _timed(decoded, video_file):
            index = int(time * video_file.frame_rate + 0.5)
            if index <= last_index:
                # The grid position has a frame already, but this one fills the positions of a following gap.
                last_frame, image = frame, None
                continue
            # A first frame that is late also fills the positions before it.
            filler = frame if last_frame is None else last_frame
            for filled in range(last_index + 1, index):
                if filled % every == 0:
                    image = resized(filler) if image is None else image
                    yield image
            image = None
            if index % every == 0:
                image = resized(frame)
                yield image
            last_index, last_frame = index, frame
    if not partial and last_index + 1 < MIN_FRAME_FRACTION * video_file.num_frames:
        raise _damaged(video_file.path, f"decodes to {last_index + 1} of {video_file.num_frames} frames")


def frames_at(video_file: VideoFile, times: Sequence[float], height: int, *, partial: bool = True) -> list[np.ndarray]:
    """Return the frames displayed at some times, upright and with square pixels, each (height, width, 3) uint8 RGB.

    Decoding starts at the last key frame before each time, so that a few frames of a long video take little time. If a
    file is damaged, the last frame that can be decoded is used for later times.

    Args:
        times: increasing times in seconds from the first frame.
        height: maximum height of the result in pixels; frames are not enlarged.
    """
    results: list[np.ndarray] = []
    last = None
    for frame in _frames_at(video_file, times, partial):
        image = results[-1] if results and frame is last else _upright_image(frame, video_file, height)
        results.append(image)
        last = frame
    return results


def _frames_at(video_file: VideoFile, times: Sequence[float], partial: bool) -> Iterator[Any]:
    """Yield the frame displayed at each of the increasing times; no part is decoded twice."""
    with open_container(video_file.path) as (container, stream):
        # The key frames of a damaged file are not reliable. It is decoded from its start.
        packets = container.demux(stream) if not (video_file.damage or video_file.is_continued) else ()
        keys = np.array(sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None), np.int64)
        starts = keys * float(stream.time_base) - video_file.start
    key_of_time = np.searchsorted(starts, np.array(times) + ROUNDING, side="right") - 1
    for key in np.unique(key_of_time):
        group = [time for time, its_key in zip(times, key_of_time) if its_key == key]
        current, index = None, 0
        for time, frame in frames_from(video_file, float(starts[key]) if key > 0 else 0.0, partial=partial):
            while current is not None and index < len(group) and time > group[index] + ROUNDING:
                yield current
                index += 1
            if index == len(group):
                break
            current = frame
        for _ in group[index:]:
            assert current is not None, "probe decoded a first frame"
            yield current


def frames_from(
    video_file: VideoFile, start: float, threads: int | None = None, *, partial: bool = True
) -> Iterator[tuple[float, Any]]:
    """Yield the frames of a video as PyAV decodes them, each with its time in seconds after the first frame.

    Args:
        start: time in seconds; the first yielded frame is a key frame at or before it.
        partial: whether to skip packets that cannot be decoded.
    """
    av = load_av()
    # Formats without an index are sought by bytes, and may end up after the key frame. Then the search starts further
    # back, and at last at the start of the file. If time stamps restart, a time is not unique.
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
        f"{path} {damage}. Copy or download it again, or pass --partial to use what can be decoded.",
        code="truncated_video",
    )


def _rate(times: np.ndarray, unit: float) -> float | None:
    """Return frames per second: from the usual steps at a constant rate, else on average; None for a single frame."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        return None
    usual = np.median(steps)
    is_usual = np.abs(steps - usual) <= np.maximum(1, STEP_TOLERANCE * usual)
    chosen = steps[is_usual] if is_usual.mean() >= CONSTANT_RATE_FRACTION else steps
    return 1 / (float(chosen.mean()) * unit)


def _truncation(container: Any, stream: Any, packets: Packets, parts: Sequence[Part]) -> str:
    """Return the difference between the header and the content of a file as a clause; empty if there is none."""
    # An edit list may remove stored frames, and the index then omits them, but the header counts them.
    indexed = len(getattr(stream, "index_entries", ())) or stream.frames
    expected, stored = min(stream.frames, indexed), len(packets.stamps)
    if stored < MIN_FRAME_FRACTION * expected - 1:
        return f"is cut off: its header declares {expected} frames, and it contains {stored}"
    # FFmpeg skips data around the header of a second FLV file, and data after a file of the other formats.
    if _has_second_file(container, 1 if container.format.name == "flv" else packets.last_byte):
        return "consists of several files, of which FFmpeg does not read the last"
    # Some containers count from the first frame and others from zero. Only an end before both is too early.
    declared = (container.duration or 0) / 1e6
    # The clock of MPEG-TS restarts after 26.5 h, and FFmpeg assigns negative times to the packets before.
    end = packets.end - min(0.0, (container.start_time or 0) / 1e6)
    if len(parts) < 2 and 0 < end < declared - max(MAX_MISSING_SECONDS, (1 - MIN_FRAME_FRACTION) * declared):
        return f"is cut off: its header declares {declared:.1f} s, and it ends after {end:.1f} s"
    return ""


def _has_second_file(container: Any, start: int) -> bool:
    """Return whether another file of the same format starts in this one at byte `start` or later."""
    head = MAGIC_BYTES.get(container.format.name)
    if head is None or start >= os.path.getsize(container.name):
        return False
    # The bytes before are not mapped, because a mapping counts toward a memory limit.
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        open(container.name, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, offset=first) as content,
    ):
        return head.search(content, start - first) is not None


def _timed(frames: Iterator[Any], video_file: VideoFile) -> Iterator[tuple[float, Any]]:
    """Yield each frame with its seconds after the first; a frame without a time follows the previous one."""
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
    """Yield the frames of a stream with corrected time stamps.

    Args:
        parts: parts with their shifts; with several parts, the container must be at its start.
        partial: whether to accept damage: packets that cannot be decoded are skipped, and frames that the decoder
            marks as corrupt are yielded.
        sought: whether the container was sought to a time. Frames before the first key frame then lack their
            references, which is not damage.
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
            # The decoder would invent the missing part of the frame.
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if not (partial or (sought and not started)):
                raise _damaged(path, f"contains a frame that cannot be decoded ({error.strerror or error})") from error
            log.debug("%s: skipped a packet: %s", path, error)
            continue
        for frame in frames:
            # A recording may start between key frames. Its first frames then lack their references.
            started = started or frame.key_frame
            if frame.is_corrupt and started and not partial:
                raise _damaged(path, "contains frames that the decoder reports as corrupt")
            yield frame


def _upright_image(frame: Any, video_file: VideoFile, height: int) -> np.ndarray:
    """Return a decoded frame as an upright RGB image of at most `height` pixels, with square pixels."""
    stored_height, stored_width = frame.height, frame.width * video_file.pixel_aspect
    scale = min(1.0, height / (stored_width if video_file.quarter_turns % 2 else stored_height))
    size = {"width": max(1, round(stored_width * scale)), "height": max(1, round(stored_height * scale))}
    image = frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(upright(image, video_file.quarter_turns, video_file.mirrored))
