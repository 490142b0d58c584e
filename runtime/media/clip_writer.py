"""Write moments of a video as mp4 files, encoded again so that they start and end at any frame."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.errors import DeviceError, VideoFileError
from runtime.core.io.atomic_files import atomic_write
from runtime.media.container import load_av, opened_container
from runtime.media.frames import upright
from runtime.media.timestamps import SoundShift
from runtime.media.video_file import ROUNDING, VideoFile, frames_from

log = logging.getLogger("drn")

# Encoders by preference, with options for high quality. B-frames are off: mp4 derives the duration from the decoding
# order, which B-frames delay by some frames, and at a variable rate these may last seconds.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "fast", "bf": "0"},
    "libopenh264": {"rc_mode": "quality"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
# Time base, a multiple of every common frame rate up to 10 microseconds; MPEG-4 supports at most 1/65535.
CLOCK = Fraction(1, 60000)
# Sample rates of AAC in Hz. Audio of another rate is resampled to the first.
AAC_RATES = (48000, 44100, 96000, 88200, 64000, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
# Bit rate per channel, and maximum bits per sample, above which AAC encoders fail.
AAC_BITS, AAC_SAMPLE_BITS = 96_000, 4
# Maximum difference in seconds between a time stamp and the end of the previous samples that is not a gap.
JITTER = 0.02
# Audio is sought so many seconds before the start of a clip.
LEAD = 0.5
MAX_SLUG_CHARS, MAX_SLUG_BYTES = 60, 160
# File systems allow names of 255 bytes, and temporary names are longer than the final ones.
MAX_NAME_BYTES = 240
COLOR_PROPERTIES = ("colorspace", "color_primaries", "color_trc", "color_range")


def clip_names(video: str, queries: Sequence[str]) -> list[str]:
    """Return the file name of each query's clip: name of the video, number, and words of the query."""
    digits = len(str(len(queries)))
    endings = [f"-{number:0{digits}}-{_slug(query)}.mp4" for number, query in enumerate(queries, 1)]
    return [_shortened(video, MAX_NAME_BYTES - len(ending.encode())) + ending for ending in endings]


def _shortened(text: str, size: int) -> str:
    """Return the first characters of a text that fit into `size` bytes of UTF-8."""
    if len(os.fsencode(text)) <= size:
        return text
    return text.encode(errors="ignore")[:size].decode(errors="ignore")


def _slug(text: str) -> str:
    """Return letters and digits of any script in lower case, with a hyphen between words."""
    plain = unicodedata.normalize("NFC", text).lower()
    words = re.sub(r"[^\w]+|_", "-", re.sub(r"(?<=\w)['’](?=\w)", "", plain)).strip("-")
    return _shortened(words[:MAX_SLUG_CHARS], MAX_SLUG_BYTES).rstrip("-") or "moment"


def check_encoder() -> str:
    """Return the name of the video encoder for clips.

    Raises:
        DeviceError: PyAV is not installed, or has none of `ENCODERS`, or no AAC.
    """
    available = load_av().codec.codecs_available
    encoder = next((name for name in ENCODERS if name in available), None)
    if encoder is None or "aac" not in available:
        raise DeviceError(
            f"Expected PyAV with AAC and {' or '.join(ENCODERS)}, but this build lacks them. Install PyAV from PyPI: "
            "`pip install '.[video]'` in the drn-deploy directory.",
            code="missing_codec",
        )
    return encoder


def write_clips(
    video_file: VideoFile,
    spans: Sequence[tuple[float, float]],
    outputs: Sequence[Path],
    threads: int | None = None,
    *,
    partial: bool = True,
) -> None:
    """Write spans of a video as mp4 files, all of them or none: H.264 and AAC, upright, with the original frame times.

    A clip starts with the frame displayed at the start of its span and ends with the last frame that starts before its
    end; it has at least one frame.

    Args:
        outputs: one path per span.
        threads: CPU threads; None leaves the number to FFmpeg.

    Raises:
        VideoFileError: a span has no frame that can be decoded, or a damaged one and `partial` is not set.
    """
    encoder = check_encoder()
    if not encoder.endswith("264"):
        log.warning("This PyAV has no H.264 encoder. Clips are written as %s.", encoder)
    with contextlib.ExitStack() as stack:
        for (start, end), output in zip(spans, outputs):
            temporary = stack.enter_context(atomic_write(output))
            _write(video_file, start, end, temporary, encoder, threads, partial)


def _write(
    video_file: VideoFile, start: float, end: float, path: Path, encoder: str, threads: int | None, partial: bool
) -> None:
    av = load_av()
    frames = _upright(video_file, _frames_in_span(video_file, start, end, threads, partial))
    first = next(frames, None)
    if first is None:
        raise VideoFileError(
            f"No frame of {video_file.path} can be decoded from {start:.1f} s on. Copy or download it again.",
            code="no_frames",
        )
    audio = _AudioTrack(video_file, start, end)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as clip:
        video_stream = _add_video_stream(clip, encoder, video_file, first, threads)
        streams = [_timed(video_stream, itertools.chain([first], frames))]
        if audio.rate:
            audio_stream = clip.add_stream("aac", rate=audio.rate)
            audio_stream.layout = audio.layout
            audio_stream.bit_rate = min(AAC_BITS, AAC_SAMPLE_BITS * audio.rate) * audio.channels
            streams.append(_timed(audio_stream, audio.frames()))
        for _, stream, frame in heapq.merge(*streams, key=lambda entry: entry[0]):
            clip.mux(stream.encode(frame))
        for stream in clip.streams:
            clip.mux(stream.encode())


def _timed(stream: Any, frames: Iterator[Any]) -> Iterator[tuple[float, Any, Any]]:
    """Yield the time of each frame in seconds, its stream, and the frame."""
    for frame in frames:
        yield float(frame.pts * frame.time_base), stream, frame


def _add_video_stream(clip: Any, encoder: str, video_file: VideoFile, first: Any, threads: int | None) -> Any:
    """Add a stream for frames of the size and the colors of `first`."""
    rate = Fraction(video_file.frame_rate).limit_denominator(1001)
    stream = clip.add_stream(encoder, rate=rate, options=ENCODERS[encoder])
    stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
    context = stream.codec_context
    context.time_base = CLOCK
    # Without durations of frames, the last frame has no end.
    context.flags |= load_av().codec.context.Flags.frame_duration
    if threads is not None:
        context.thread_count = threads
    for name in COLOR_PROPERTIES:
        setattr(context, name, getattr(first, name))
    aspect = Fraction(video_file.pixel_aspect).limit_denominator(255)
    context.sample_aspect_ratio = 1 / aspect if video_file.quarter_turns % 2 else aspect
    return stream


def _frames_in_span(
    video_file: VideoFile, start: float, end: float, threads: int | None, partial: bool
) -> Iterator[tuple[float, float, Any]]:
    """Yield the times in seconds from `start` at which the display of each frame starts and ends, and the frame."""
    current = None
    last_end = max(end - start, 1 / video_file.frame_rate)
    for time, frame in frames_from(video_file, start, threads, partial=partial):
        # The last frame before the start is displayed at the start.
        if current is not None and time > start + ROUNDING:
            is_last = time >= end - ROUNDING
            yield max(current[0] - start, 0.0), last_end if is_last else time - start, current[1]
            if is_last:
                return
        current = time, frame
    if current is not None:
        yield max(current[0] - start, 0.0), last_end, current[1]


def _upright(video_file: VideoFile, timed_frames: Iterator[tuple[float, float, Any]]) -> Iterator[Any]:
    """Yield upright yuv420p frames of one even size for the encoder, with their times on `CLOCK`."""
    av = load_av()
    size: dict[str, int] = {}
    last = -1
    for start, end, frame in timed_frames:
        # yuv420p stores one color per 2 x 2 pixels.
        size = size or {"width": max(2, frame.width & ~1), "height": max(2, frame.height & ~1)}
        plain = frame.reformat(**size, format="yuv420p", interpolation="BICUBIC")
        if video_file.quarter_turns or video_file.mirrored:
            planes = _rotated(plain.to_ndarray(), video_file.quarter_turns, video_file.mirrored)
            rotated = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            for name in COLOR_PROPERTIES:
                setattr(rotated, name, getattr(plain, name))
            plain = rotated
        # The encoder chooses its own key frames.
        plain.pict_type = av.video.frame.PictureType.NONE
        pts = max(round(start / CLOCK), last + 1)
        plain.pts, plain.time_base, last = pts, CLOCK, pts
        plain.duration = max(1, round(end / CLOCK) - pts)
        yield plain


def _rotated(planes: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """Return a yuv420p image, (height * 3 / 2, width) uint8, mirrored and rotated as by `upright`."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    parts = planes[:height], *planes[height:].reshape(2, height // 2, width // 2)
    rotated = [upright(part, quarter_turns, mirrored) for part in parts]
    return np.ascontiguousarray(np.concatenate([part.reshape(-1, rotated[0].shape[1]) for part in rotated]))


class _AudioTrack:
    """The audio of a span of a video, without gaps.

    Attributes:
        rate: sample rate of the output in Hz; 0 if there is no audio.
        layout: mono or stereo.
    """

    def __init__(self, video_file: VideoFile, start: float, end: float) -> None:
        self._video_file, self._start, self._end = video_file, start, end
        self.rate, self.layout = 0, ""
        with opened_container(video_file.path) as container:
            for stream in container.streams.audio[:1]:
                if stream.codec_context is None or not stream.codec_context.sample_rate:
                    log.warning("The audio of %s cannot be decoded and is omitted.", video_file.path)
                    continue
                rate = stream.codec_context.sample_rate
                self.rate = rate if rate in AAC_RATES else AAC_RATES[0]
                # Surround audio is mixed down, so that every player supports the clip.
                self.layout = "mono" if stream.codec_context.layout.nb_channels == 1 else "stereo"

    @property
    def channels(self) -> int:
        """Number of channels of the output."""
        return 1 if self.layout == "mono" else 2

    def frames(self) -> Iterator[Any]:
        """Yield audio frames for the encoder, with times from the start of the span."""
        av = load_av()
        done = 0
        for samples in self._joined():
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts, frame.time_base = self.rate, done, Fraction(1, self.rate)
            done += samples.shape[1]
            yield frame

    def _joined(self) -> Iterator[np.ndarray]:
        """Yield consecutive (channels, samples) pieces; gaps are filled with silence."""
        done, total = 0, round((self._end - self._start) * self.rate)
        for time, samples in self._decoded():
            start = round((time - self._start) * self.rate)
            if done and abs(start - done) < JITTER * self.rate:
                start = done
            while done < min(start, total):
                # Long silence is yielded in pieces of a second.
                silence = min(start, total, done + self.rate) - done
                yield np.zeros((self.channels, silence), np.float32)
                done += silence
            piece = samples[:, max(done - start, 0) : max(total - start, 0)]
            if piece.shape[1]:
                yield piece
                done += piece.shape[1]
            if done >= total:
                return

    def _decoded(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield seconds after the first video frame, and (channels, samples) float32."""
        av = load_av()
        resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        with opened_container(self._video_file.path) as container:
            stream = container.streams.audio[0]
            with contextlib.suppress(av.FFmpegError):
                if self._start > LEAD and not self._video_file.is_continued:
                    clock = self._video_file.start + self._start - LEAD
                    container.seek(int(clock / float(stream.time_base)), stream=stream)
            try:
                for frame in self._frames(container, stream):
                    for plain in resampler.resample(frame):
                        if plain.pts is not None:
                            yield float(plain.pts * plain.time_base) - self._video_file.start, plain.to_ndarray()
            except av.FFmpegError as error:
                log.warning("The audio of %s ends early: %s.", self._video_file.path, error.strerror or error)

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the frames of an audio stream, with the time stamps corrected as those of the video stream."""
        correction = SoundShift(self._video_file.parts, self._video_file.tick)
        for packet in container.demux(stream):
            if self._video_file.is_continued and packet.pts is not None:
                shift = correction.shift_at(packet.pts * float(packet.time_base))
                packet.pts += round(shift / float(packet.time_base))
                packet.dts = packet.pts
            yield from packet.decode()
