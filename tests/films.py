"""Videos made for tests, small and quick, with everything about them known."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av: Any = pytest.importorskip("av", reason="PyAV makes and reads the videos of these tests")

MILLISECOND = Fraction(1, 1000)
CODECS = {".mkv": "ffv1", ".webm": "libvpx", ".mpg": "mpeg2video", ".vob": "mpeg2video", ".flv": "flv"}


def scene(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return (count, height, width, 3) uint8 frames: coloured quarters, the top left bright red, and a moving bar."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, : height // 2, : width // 2, 0] = 250
    frames[:, height // 2 :, width // 2 :, 2] = 200
    for number, frame in enumerate(frames):
        frame[height // 2 :, number % (width - 4) : number % (width - 4) + 4, 1] = 160
        frame[: height // 2, width // 2 :] = number * 7 % 256
    return frames


def film(
    path: Path,
    frames: np.ndarray | int = 40,
    *,
    rate: int | Fraction = 25,
    times: Sequence[int] | None = None,
    turned: int | None = None,
    options: dict[str, str] | None = None,
    sound: float = 0,
) -> Path:
    """Write frames as a video: lossless FFV1 in .mkv, VP8 in .webm, MPEG-2 in .mpg and .vob, MPEG-4 in all else.

    Args:
        path: where; its ending chooses the container.
        frames: as of `scene`, or how many of those.
        rate: frames a second, where there are no `times`.
        times: of each frame, in milliseconds.
        turned: degrees counterclockwise that players are to turn it by.
        options: of the container.
        sound: seconds of silence beside it.
    """
    frames = scene(frames) if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = CODECS.get(path.suffix, "mpeg4")
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        if turned is not None:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip(f"PyAV {av.__version__} cannot write that a video is turned")
            stream.set_display_rotation(turned)
        if sound:
            _silence(container, sound)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _silence(container: Any, seconds: float) -> None:
    stream = container.add_stream("pcm_s16le" if container.format.name != "mp4" else "aac", rate=16000)
    stream.layout = "mono"
    for start in range(0, int(seconds * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def oriented(path: Path, matrix: Sequence[float], frames: np.ndarray | int = 40) -> Path:
    """Write an mp4 with a display matrix (a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    content = film(path, frames).read_bytes()
    stored, rotated = (
        struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        for a, b, c, d in ((65536, 0, 0, 65536), [round(value * 65536) for value in matrix])
    )
    offset = content.index(stored, content.index(b"tkhd"))
    path.write_bytes(content[:offset] + rotated + content[offset + len(rotated) :])
    return path


def joined(path: Path, *sources: Path) -> Path:
    """Write the bytes of files one after the other, as `cat` does."""
    path.write_bytes(b"".join(source.read_bytes() for source in sources))
    return path


def trimmed(source: Path, path: Path, seconds: float) -> Path:
    """Write an mp4 without the first seconds, by an edit list, as `ffmpeg -ss -c copy` does."""
    options = {"avoid_negative_ts": "disabled", "movflags": "faststart"}
    with av.open(str(source)) as reader, av.open(str(path), "w", options=options) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                shift = round(seconds / float(packet.time_base))
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                writer.mux(packet)
    return path


def holed(source: Path, path: Path, number: int) -> Path:
    """Write a file of which the second half of a packet is zeros."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as reader:
        packets = [packet for packet in reader.demux(reader.streams.video[0]) if packet.size]
        start, size = packets[number].pos, packets[number].size
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(content)
    return path


def sound_only(path: Path) -> Path:
    """Write a second of silence, without pictures."""
    with av.open(str(path), "w") as container:
        _silence(container, 1)
    return path


def truncated(source: Path, path: Path, share: float = 0.6) -> Path:
    """Write the first part of a file."""
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
