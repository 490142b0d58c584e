"""Open video containers with PyAV, and refuse files that refer to others."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.core.errors import DeviceError, VideoFileError, one_line, reading

# How files of a format begin, to find one that was joined to another and that FFmpeg does not read.
HEADS = {
    "flv": re.compile(rb"FLV\x01[\x00-\x07]\x00\x00\x00\x09\x00\x00\x00\x00"),
    "matroska,webm": re.compile(rb"\x1a\x45\xdf\xa3.{1,8}\x42\x86\x81\x01", re.DOTALL),
    "mov,mp4,m4a,3gp,3g2,mj2": re.compile(rb"\x00\x00\x00[\x10-\xff]ftyp[0-9A-Za-z ]{4}"),
    "avi": re.compile(rb"RIFF.{4}AVI LIST", re.DOTALL),
}


# Formats of FFmpeg that open further files or network addresses: the demuxers that call `io_open` or open a format of
# their own (libavformat 62, and `mlv`, which looks for parts of its name). Content and digests of such a file do not
# decide what is decoded.
REFERRING_FORMATS = frozenset(
    ("avisynth", "concat", "dash", "dvdvideo", "hls", "image2", "imf", "lavfi", "mlv",
     "rtp", "rtsp", "sap", "sdp", "vapoursynth", "vobsub", "webm_dash_manifest")
)  # fmt: skip


def check_one_file(path: str | os.PathLike[str]) -> None:
    """Raise VideoFileError if a video refers to other files, so that its own content does not decide its pictures."""
    with opened_container(Path(path)):
        pass


def load_av() -> Any:
    """Import PyAV, with FFmpeg's own remarks silenced; DeviceError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise DeviceError(
            f"Videos are decoded by PyAV, which cannot be imported here ({error}); "
            "run `pip install '.[video]'` in the drn-deploy directory.",
            code="missing_library",
        ) from error
    # FFmpeg's own remarks on odd files go to stderr otherwise, one for every frame.
    av.logging.set_level(None)
    return av


@contextlib.contextmanager
def open_container(path: Path, threads: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a file at its first video stream that is no cover picture."""
    with reading(path, "a video", VideoFileError, "copy or download it again"), opened_container(path) as container:
        stream = first_video_stream(container, path)
        try:
            # What a decoder checks besides what it needs; frames that fail are marked as corrupt.
            stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+careful"}
            stream.thread_type = "AUTO"
            if threads is not None:
                stream.thread_count = threads
        except (AttributeError, RuntimeError) as error:
            raise VideoFileError(
                f"{path} is of a codec that this FFmpeg cannot decode; convert it to H.264."
            ) from error
        yield container, stream


@contextlib.contextmanager
def opened_container(path: Path) -> Iterator[Any]:
    """Open a media file for reading, whatever its name and the encoding of its metadata.

    Raises:
        VideoFileError: FFmpeg cannot open it, or its format refers to other files (code `refers_to_files`).
    """
    av = load_av()
    # FFmpeg compares the format with the list before it reads more of the file, so that nothing else is opened.
    allowed = ",".join(sorted(set(av.formats_available) - REFERRING_FORMATS))
    try:
        # An absolute path: FFmpeg takes what stands before a colon in `a:b.mp4` for a protocol.
        container = av.open(os.path.abspath(path), metadata_errors="replace", options={"format_whitelist": allowed})
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:
            raise VideoFileError(
                f"{path} is a playlist or of another format that refers to other files, such as ffconcat, m3u8, sdp or "
                "numbered pictures. Give the video file itself, or write one, for example with `ffmpeg -i FILE -c copy "
                "NEW.mkv`.",
                code="refers_to_files",
            ) from error
        reason = getattr(error, "strerror", None) or one_line(error)
        raise VideoFileError(
            f"{path} is not a video that FFmpeg can open, or was cut off before its index ({reason}); give an mp4, "
            "mkv, webm, avi or the like, or copy it again.",
            code="damaged_file",
        ) from error
    with container:
        yield container


def first_video_stream(container: Any, path: Path) -> Any:
    """Return the first stream of moving pictures; VideoFileError if there is none."""
    covers = load_av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    # Of several streams, one that holds a single picture is a cover that is not marked as one.
    moving = [stream for stream in streams if not (stream.frames == 1 and codec_name(stream) in PICTURE_CODECS)]
    if moving or streams:
        return (moving or streams)[0]
    kinds = sorted({"a cover picture" if stream.type == "video" else stream.type for stream in container.streams})
    only = f"only {' and '.join(kinds)}" if kinds else "no stream at all"
    raise VideoFileError(f"{path} has no video stream ({only}); give a file with pictures.", code="no_video_stream")


def codec_name(stream: Any) -> str:
    return stream.codec_context.name if stream.codec_context is not None else ""


# Codecs of cover pictures, which some writers store as a video stream without marking it.
PICTURE_CODECS = frozenset({"mjpeg", "png", "bmp", "gif", "webp", "tiff", "jpeg2000", "jpegxl"})
