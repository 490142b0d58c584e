"""Moments as video files of their own: encoded again, so that they begin and end at a frame, not at a key frame."""

from __future__ import annotations

import contextlib
import heapq
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

# The first that is there is taken. Quality before size: a clip is looked at, and is short. No B-frames: mp4 takes a
# film's length from the order of decoding, which they shift by some frames, and where the rate varies these may last
# seconds.
ENCODERS = {
    "libx264": {"crf": "18", "preset": "fast", "bf": "0"},
    "libopenh264": {"rc_mode": "quality"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}
# Ticks a second, of every common frame rate a multiple to 10 microseconds; MPEG-4 takes no more than 65535.
CLOCK = Fraction(1, 60000)
# Rates that AAC has, in samples a second; others become the first.
AAC_RATES = (48000, 44100, 96000, 88200, 64000, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
# Bits a second of a channel, at most so many of a sample: low rates have no use for more, and AAC refuses it.
AAC_BITS, AAC_SAMPLE_BITS = 96_000, 4
# Sound whose time stamps differ by less than this many seconds from where the last ended goes on without a gap.
JITTER = 0.02
# Sound is sought so much before where it is needed.
LEAD = 0.5
LONGEST_SLUG, LONGEST_SLUG_BYTES = 60, 160
# File systems take names of up to 255 bytes, and a file that is being written has a longer one.
MAX_NAME_LENGTH = 240


def clip_names(video: str, queries: Sequence[str]) -> list[str]:
    """Return the file name of each query's clip: video, number, and the words that a name can contain."""
    digits = len(str(len(queries)))
    endings = [f"-{number:0{digits}}-{_slug(query)}.mp4" for number, query in enumerate(queries, 1)]
    return [_shortened(video, MAX_NAME_LENGTH - len(ending.encode())) + ending for ending in endings]


def _shortened(text: str, size: int) -> str:
    """Return the first characters of a text, those that fit into `size` bytes."""
    if len(os.fsencode(text)) <= size:
        return text
    return text.encode(errors="ignore")[:size].decode(errors="ignore")


def _slug(text: str) -> str:
    """Return letters and digits of any script, in lower case, with a hyphen between words."""
    plain = unicodedata.normalize("NFC", text).lower()
    words = re.sub(r"[^\w]+|_", "-", re.sub(r"(?<=\w)['’](?=\w)", "", plain)).strip("-")
    return _shortened(words[:LONGEST_SLUG], LONGEST_SLUG_BYTES).rstrip("-") or "moment"


def check_encoder() -> str:
    """Return the name of the video encoder that clips are written with.

    Raises:
        DeviceError: PyAV is missing, or has none of `ENCODERS`, or no AAC.
    """
    there = load_av().codec.codecs_available
    result = next((name for name in ENCODERS if name in there), None)
    if result is None or "aac" not in there:
        raise DeviceError(
            f"Clips are written as {' or '.join(ENCODERS)} with AAC, and this PyAV was built without; install PyAV "
            "from PyPI: `pip install '.[video]'` in the drn-deploy directory.",
            code="missing_codec",
        )
    return result


def write_clips(
    video_file: VideoFile,
    spans: Sequence[tuple[float, float]],
    outputs: Sequence[Path],
    threads: int | None = None,
    *,
    partial: bool = True,
) -> None:
    """Write parts of a video as mp4 files, all of them or none: H.264 and AAC, upright, at the frames' own times.

    A part begins with the frame that is on at its start and ends with the last that begins before its end, at least
    one.

    Args:
        video_file: what `probe` returned.
        spans: starts and ends in seconds after the first frame.
        outputs: the file of each.
        threads: CPU threads; as many as FFmpeg likes when None.
        partial: whether damaged frames are written as they are decoded.

    Raises:
        DeviceError: there is no encoder.
        VideoFileError: a part holds no frame that can be decoded, or a damaged one and `partial` is not set.
        OutputError: a file cannot be written.
    """
    encoder = check_encoder()
    if not encoder.endswith("264"):
        log.warning("This PyAV has no H.264 encoder; clips are written as %s.", encoder)
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
            f"No frame of {video_file.path} can be decoded from {start:.1f} s on; copy or download it again."
        )
    sound = _AudioTrack(video_file, start, end)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as clip:
        pictures = _video_stream(clip, encoder, video_file, first, threads)
        streams = [_timed(pictures, _chained(first, frames))]
        if sound.rate:
            voices = clip.add_stream("aac", rate=sound.rate)
            voices.layout = sound.layout
            voices.bit_rate = min(AAC_BITS, AAC_SAMPLE_BITS * sound.rate) * sound.channels
            streams.append(_timed(voices, sound.frames()))
        for _, stream, frame in heapq.merge(*streams, key=lambda entry: entry[0]):
            clip.mux(stream.encode(frame))
        for stream in clip.streams:
            clip.mux(stream.encode())


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _timed(stream: Any, frames: Iterator[Any]) -> Iterator[tuple[float, Any, Any]]:
    for frame in frames:
        yield float(frame.pts * frame.time_base), stream, frame


def _video_stream(clip: Any, encoder: str, video_file: VideoFile, first: Any, threads: int | None) -> Any:
    """Add a stream of pictures like `first`, with its colours and the shape of its pixels."""
    rate = Fraction(video_file.frame_rate).limit_denominator(1001)
    stream = clip.add_stream(encoder, rate=rate, options=ENCODERS[encoder])
    stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
    context = stream.codec_context
    context.time_base = CLOCK
    # How long each frame stays on, without which the last has no end.
    context.flags |= load_av().codec.context.Flags.frame_duration
    if threads is not None:
        context.thread_count = threads
    for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
        setattr(context, name, getattr(first, name))
    aspect = Fraction(video_file.pixel_aspect).limit_denominator(255)
    context.sample_aspect_ratio = 1 / aspect if video_file.quarter_turns % 2 else aspect
    return stream


def _frames_in_span(
    video_file: VideoFile, start: float, end: float, threads: int | None, partial: bool
) -> Iterator[tuple[float, float, Any]]:
    """Yield seconds from `start` at which each frame comes on and goes off, and the frame."""
    shown = None
    last_off = max(end - start, 1 / video_file.frame_rate)
    for time, frame in frames_from(video_file, start, threads, partial=partial):
        # Of those that come on before the start the last is on at it.
        if shown is not None and time > start + ROUNDING:
            over = time >= end - ROUNDING
            yield max(shown[0] - start, 0.0), last_off if over else time - start, shown[1]
            if over:
                return
        shown = time, frame
    if shown is not None:
        yield max(shown[0] - start, 0.0), last_off, shown[1]


def _upright(video_file: VideoFile, seen: Iterator[tuple[float, float, Any]]) -> Iterator[Any]:
    """Yield frames as encoders take them: yuv420p of one even size, turned upright, with their times on `CLOCK`."""
    av = load_av()
    size: dict[str, int] = {}
    last = -1
    for on, off, frame in seen:
        # Colours are in pairs of pixels.
        size = size or {"width": max(2, frame.width & ~1), "height": max(2, frame.height & ~1)}
        plain = frame.reformat(**size, format="yuv420p", interpolation="BICUBIC")
        if video_file.quarter_turns or video_file.mirrored:
            planes = _turned(plain.to_ndarray(), video_file.quarter_turns, video_file.mirrored)
            turned = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
                setattr(turned, name, getattr(plain, name))
            plain = turned
        # The encoder chooses its own key frames.
        plain.pict_type = av.video.frame.PictureType.NONE
        pts = max(round(on / CLOCK), last + 1)
        plain.pts, plain.time_base, last = pts, CLOCK, pts
        plain.duration = max(1, round(off / CLOCK) - pts)
        yield plain


def _turned(planes: np.ndarray, quarter_turns: int, mirrored: bool) -> np.ndarray:
    """Return a yuv420p picture, (height * 3 / 2, width) uint8, mirrored and turned as by `upright`."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    parts = planes[:height], *planes[height:].reshape(2, height // 2, width // 2)
    turned = [upright(part, quarter_turns, mirrored) for part in parts]
    return np.ascontiguousarray(np.concatenate([part.reshape(-1, turned[0].shape[1]) for part in turned]))


class _AudioTrack:
    """The sound of a part of a video, from its first sample to its last without a gap.

    Attributes:
        rate: samples a second as they will be encoded; 0 where there is no sound.
        layout: mono or stereo.
    """

    def __init__(self, video_file: VideoFile, start: float, end: float) -> None:
        self._footage, self._start, self._end = video_file, start, end
        self.rate, self.layout = 0, ""
        with opened_container(video_file.path) as container:
            for stream in container.streams.audio[:1]:
                if stream.codec_context is None or not stream.codec_context.sample_rate:
                    log.warning("The sound of %s cannot be decoded here, and is left out.", video_file.path)
                    continue
                rate = stream.codec_context.sample_rate
                self.rate = rate if rate in AAC_RATES else AAC_RATES[0]
                # Surround is mixed down: a clip is for watching anywhere.
                self.layout = "mono" if stream.codec_context.layout.nb_channels == 1 else "stereo"

    @property
    def channels(self) -> int:
        return 1 if self.layout == "mono" else 2

    def frames(self) -> Iterator[Any]:
        """Yield what is heard, with its times from the start of the part."""
        av = load_av()
        done = 0
        for samples in self._joined():
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts, frame.time_base = self.rate, done, Fraction(1, self.rate)
            done += samples.shape[1]
            yield frame

    def _joined(self) -> Iterator[np.ndarray]:
        """Yield (channels, samples) pieces that follow each other; silence fills what is missing."""
        done, total = 0, round((self._end - self._start) * self.rate)
        for time, samples in self._decoded():
            begin = round((time - self._start) * self.rate)
            if done and abs(begin - done) < JITTER * self.rate:
                begin = done
            while done < min(begin, total):
                # A long silence in pieces of a second.
                piece = min(begin, total, done + self.rate) - done
                yield np.zeros((self.channels, piece), np.float32)
                done += piece
            retained = samples[:, max(done - begin, 0) : max(total - begin, 0)]
            if retained.shape[1]:
                yield retained
                done += retained.shape[1]
            if done >= total:
                return

    def _decoded(self) -> Iterator[tuple[float, np.ndarray]]:
        """Yield seconds after the first picture, and (channels, samples) float32."""
        av = load_av()
        resampler = av.AudioResampler(format="fltp", layout=self.layout, rate=self.rate)
        with opened_container(self._footage.path) as container:
            stream = container.streams.audio[0]
            with contextlib.suppress(av.FFmpegError):
                if self._start > LEAD and not self._footage.is_continued:
                    clock = self._footage.start + self._start - LEAD
                    container.seek(int(clock / float(stream.time_base)), stream=stream)
            try:
                for frame in self._frames(container, stream):
                    for plain in resampler.resample(frame):
                        if plain.pts is not None:
                            yield float(plain.pts * plain.time_base) - self._footage.start, plain.to_ndarray()
            except av.FFmpegError as error:
                log.warning("The sound of %s ends early: %s.", self._footage.path, error.strerror or error)

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the frames of a stream of sound, their time stamps corrected as those of the pictures are."""
        correction = SoundShift(self._footage.parts, self._footage.tick)
        for packet in container.demux(stream):
            if self._footage.is_continued and packet.pts is not None:
                shift = correction.of(packet.pts * float(packet.time_base))
                packet.pts += round(shift / float(packet.time_base))
                packet.dts = packet.pts
            yield from packet.decode()
