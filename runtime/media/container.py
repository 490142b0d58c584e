"""Open video containers with PyAV, and reject files that refer to other files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.core.errors import VideoFileError, importing, one_line, reading
from runtime.core.io.input_files import check_file
from runtime.core.names import similar_names

# Magic bytes by FFmpeg's format name, to detect a second file appended to the first, which FFmpeg does not read.
MAGIC_BYTES = {
    "flv": re.compile(rb"FLV\x01[\x00-\x07]\x00\x00\x00\x09\x00\x00\x00\x00"),
    "matroska,webm": re.compile(rb"\x1a\x45\xdf\xa3.{1,8}\x42\x86\x81\x01", re.DOTALL),
    "mov,mp4,m4a,3gp,3g2,mj2": re.compile(rb"\x00\x00\x00[\x10-\xff]ftyp[0-9A-Za-z ]{4}"),
    "avi": re.compile(rb"RIFF.{4}AVI LIST", re.DOTALL),
}

# Demuxers of FFmpeg that open further files or network addresses, because they call `io_open` or open another format
# (libavformat 62). `mlv` opens files of related names. The digest of such a file does not determine the frames.
REFERRING_FORMATS = frozenset(
    ("avisynth", "concat", "dash", "dvdvideo", "hls", "image2", "imf", "lavfi", "mlv",
     "rtp", "rtsp", "sap", "sdp", "vapoursynth", "vobsub", "webm_dash_manifest")
)  # fmt: skip

# Codecs of cover pictures, which some writers store as a video stream without marking it.
PICTURE_CODECS = frozenset({"mjpeg", "png", "bmp", "gif", "webp", "tiff", "jpeg2000", "jpegxl"})


def check_video_file(path: Path) -> None:
    """Raise VideoFileError unless a video is a file that can be read; for a missing one, name similar files."""
    advice = "check the path"
    if not os.path.exists(path):
        with contextlib.suppress(OSError, ValueError):
            similar = similar_names(os.listdir(path.parent), path.name)
            advice += f"; similar names in this directory are {similar}" if similar else ""
    check_file(path, "The video", VideoFileError, advice)


def check_one_file(path: str | os.PathLike[str]) -> None:
    """Raise VideoFileError if FFmpeg cannot open a video, or if it refers to other files."""
    with opened_container(Path(path)):
        pass


def load_av() -> Any:
    """Import PyAV without FFmpeg's log messages; DeviceError if it is not installed."""
    with importing("PyAV, which decodes videos,", "video"):
        import av
    # FFmpeg logs a message for every damaged frame otherwise.
    av.logging.set_level(None)
    return av


@contextlib.contextmanager
def open_container(path: Path, threads: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a video file, and yield its container and its first video stream that is not a cover picture.

    Args:
        threads: CPU threads for decoding; None leaves the number to FFmpeg.

    Raises:
        VideoFileError: FFmpeg cannot open the file, its format refers to other files, or it has no video stream that
            can be decoded.
    """
    with reading(path, "a video", VideoFileError, "copy or download it again"), opened_container(path) as container:
        stream = first_video_stream(container, path)
        try:
            # These checks are off by default. The decoder marks frames that fail as corrupt.
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+careful"}
            stream.thread_type = "AUTO"
            if threads is not None:
                stream.thread_count = threads
        except (AttributeError, RuntimeError) as error:
            raise VideoFileError(
                f"{path} has a codec that this FFmpeg cannot decode. Convert it to H.264.", code="unsupported_codec"
            ) from error
        yield container, stream


@contextlib.contextmanager
def opened_container(path: Path) -> Iterator[Any]:
    """Open a media file for reading, with any name and any encoding of its metadata.

    Raises:
        VideoFileError: FFmpeg cannot open it, or its format refers to other files (code `refers_to_files`).
    """
    av = load_av()
    # FFmpeg compares the format with the list before it reads more of the file, so that no other file is opened.
    allowed = ",".join(sorted(set(av.formats_available) - REFERRING_FORMATS))
    try:
        # FFmpeg treats the part before a colon in `a:b.mp4` as a protocol, but not in an absolute path.
        container = av.open(os.path.abspath(path), metadata_errors="replace", options={"format_whitelist": allowed})
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:
            raise VideoFileError(
                f"{path} refers to other files, as ffconcat, m3u8, sdp and numbered pictures do. Give the video file "
                "itself, or write one, for example with `ffmpeg -i FILE -c copy NEW.mkv`.",
                code="refers_to_files",
            ) from error
        reason = getattr(error, "strerror", None) or one_line(error)
        raise VideoFileError(
            f"FFmpeg cannot open {path} as a video ({reason}). Give an mp4, mkv, webm or avi file, or copy it again.",
            code="damaged_file",
        ) from error
    with container:
        yield container


def first_video_stream(container: Any, path: Path) -> Any:
    """Return the first video stream that is not a cover picture; VideoFileError if there is none."""
    covers = load_av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    # A stream of a single picture next to other streams is a cover that is not marked as one.
    for stream in streams:
        # FFmpeg has no codec context without a decoder.
        if stream.frames != 1 or stream.codec_context is None or stream.codec_context.name not in PICTURE_CODECS:
            return stream
    if streams:
        return streams[0]
    kinds = sorted({"a cover picture" if stream.type == "video" else stream.type for stream in container.streams})
    content = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
    raise VideoFileError(f"{path} has no video stream ({content}). Give a video file.", code="no_video_stream")
