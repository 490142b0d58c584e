"""Check the values of published annotation files when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.text_files import is_number
from runtime.core.names import by_fold, near_name, similar_names
from runtime.core.video import MAX_DURATION_S, MAX_FRAMES
from runtime.datasets.json_rows import malformed

SPLITS = ("train", "val", "test")
# Suffixes of video files, which are part of the names of videos in some data sets (TACoS: s17-d69.avi).
FILE_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")
# File names have at most 255 bytes, including the suffix of a feature file.
MAX_NAME_BYTES = 250
# Maximum number of frames per second; high-speed cameras record some thousands.
MAX_FRAME_RATE = 1e6


class VideoTable:
    """The lengths of the videos of a data set, whose names must be distinct."""

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.num_frames: dict[str, int] = {}
        self._names: dict[str, str] = {}

    def add(self, name: str, duration: Any, location: str, num_frames: Any | None = None) -> None:
        """Add a video of a duration in seconds; the same video may be added again. `location` begins messages."""
        check_video_name(name, location)
        if not is_number(duration) or not 0 < duration <= MAX_DURATION_S:
            raise AnnotationError(
                f"{location}: expected a duration above 0 seconds, got {excerpt(duration)}. Correct the duration.",
                code="invalid_frame_count",
            )
        if num_frames is not None and not (is_number(num_frames) and 2 <= num_frames <= MAX_FRAMES):
            raise AnnotationError(
                f"{location}: expected at least 2 frames, got {excerpt(num_frames)}. Correct the frame count.",
                code="invalid_frame_count",
            )
        _check_distinct(self._names, name, location)
        recorded = (self.durations.setdefault(name, duration), self.num_frames.get(name, num_frames))
        if recorded != (duration, num_frames):
            raise AnnotationError(
                f"{location}: two videos of {recorded[0]:g} and {duration:g} seconds have the name {excerpt(name)}. "
                "Rename one.",
                code="ambiguous_video_name",
            )
        if num_frames is not None:
            self.num_frames[name] = int(num_frames)


def is_file_name(name: str) -> bool:
    """Return whether a name can be the name of a file in a given directory."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return (
        bool(name.strip()) and size <= MAX_NAME_BYTES and not set(name) & set("/\\\0\n\r") and name not in (".", "..")
    )


def check_video_name(name: str, location: str) -> None:
    """Raise AnnotationError (code `invalid_video_name`) unless `is_file_name`, because features are found by name."""
    if not is_file_name(name):
        raise AnnotationError(
            f"{location}: expected the name of a video that can be a file name, got {excerpt(name)}. Use at most "
            f"{MAX_NAME_BYTES} bytes without slashes and line breaks.",
            code="invalid_video_name",
        )


def missing_split(split: str, path: Path, available: Iterable[str]) -> AnnotationError:
    """Return the error for a split whose file does not exist."""
    return AnnotationError(
        f"Expected one of the splits {', '.join(available) or '(none)'}, got {excerpt(split)}, and {path} does not "
        "exist. Choose another split.",
        code="missing_split",
    )


def unlisted_video(video: str, known: Iterable[str], files: Iterable[str], location: str) -> AnnotationError:
    """Return the error for a video that the annotations do not list.

    Args:
        location: location of the name, for the message. Similar spellings are searched for options only, because a
            data set may have many rows with unknown videos.
    """
    suggestion = near_name(by_fold(known), video)
    if not suggestion and location.startswith("--") and (similar := similar_names(known, video)):
        suggestion = f" Similar names: {similar}."
    return AnnotationError(
        f"{location}: the video {excerpt(video)} is not in {', '.join(files)}. Check the name.{suggestion}",
        code="unlisted_video",
    )


def check_distinct_names(names: Iterable[str], location: str) -> None:
    """Raise AnnotationError (code `ambiguous_video_name`) if the features of two videos could be one file."""
    by_stem: dict[str, str] = {}
    for name in names:
        _check_distinct(by_stem, name, location)


def _check_distinct(by_stem: dict[str, str], name: str, location: str) -> None:
    """Add a name to the names by stem; AnnotationError if another name has this stem."""
    known = by_stem.setdefault(file_stem(name), name)
    if known != name:
        raise AnnotationError(
            f"{location}: the videos {excerpt(known)} and {excerpt(name)} differ in their suffix only, so one feature "
            "file would belong to both. Rename one video, or remove its entry.",
            code="ambiguous_video_name",
        )


def file_stem(name: str) -> str:
    """Return the name of a video without the suffix of a video file."""
    if not name.lower().endswith(FILE_SUFFIXES):
        return name
    return name.rpartition(".")[0] or name


def sentence_of(value: Any, location: str) -> str:
    """Return a sentence of the annotations in one line; AnnotationError if the value is empty or is not text."""
    sentence = " ".join(value.split()) if isinstance(value, str) else ""
    if not sentence:
        raise malformed(location, "a sentence", value, "correct or remove it")
    return sentence
