"""Values that published annotation files hold, checked once where they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.text_files import is_number
from runtime.core.video import LONGEST_SECONDS, MAX_FRAMES

SPLITS = ("train", "val", "test")
# Suffixes of video files, which some data sets have in the names of their videos (TACoS: s17-d69.avi).
FILE_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")
# File systems take 255 bytes, the suffix of a feature file included.
MAX_NAME_BYTES = 250
# Frames a second; high-speed cameras record some thousands.
MAX_FRAME_RATE = 1e6


class VideoTable:
    """The videos of a data set and their lengths, each name once."""

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.num_frames: dict[str, int] = {}
        self._called: dict[str, str] = {}

    def add(self, name: str, duration: Any, location: str, num_frames: Any | None = None) -> None:
        """Take a video in, again if it is the same.

        Args:
            name: as the annotations call it.
            duration: seconds.
            location: where it is said, for messages.
            num_frames: None where nothing is said of it.

        Raises:
            AnnotationError: the name or a number is none, or another video has this name.
        """
        check_video_name(name, location)
        if not is_number(duration) or not 0 < duration <= LONGEST_SECONDS:
            raise AnnotationError(
                f"{location}: the duration should be seconds above 0, and is {excerpt(duration)}.",
                code="invalid_frame_count",
            )
        if num_frames is not None and not (is_number(num_frames) and 2 <= num_frames <= MAX_FRAMES):
            raise AnnotationError(
                f"{location}: the frame count should be at least 2, and is {excerpt(num_frames)}.",
                code="invalid_frame_count",
            )
        _check_distinct(self._called, name, location)
        recorded = (self.durations.setdefault(name, duration), self.num_frames.get(name, num_frames))
        if recorded != (duration, num_frames):
            raise AnnotationError(
                f"{location}: two videos have the name {excerpt(name)}, of {recorded[0]:g} and of {duration:g} "
                "seconds; rename one.",
                code="ambiguous_video_name",
            )
        if num_frames is not None:
            self.num_frames[name] = int(num_frames)


def is_file_name(name: str) -> bool:
    """Return whether a name stays in the directory it is looked up in."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return (
        bool(name.strip()) and size <= MAX_NAME_BYTES and not set(name) & set("/\\\0\n\r") and name not in (".", "..")
    )


def check_video_name(name: str, location: str) -> None:
    """Raise AnnotationError for a name that no file could have, or only one in another directory."""
    if not is_file_name(name):
        raise AnnotationError(
            f"{location}: {excerpt(name)} cannot be the name of a video, as its features are found by it; use at most "
            f"{MAX_NAME_BYTES} bytes without slashes and line breaks.",
            code="invalid_video_name",
        )


def check_distinct_names(names: Iterable[str], location: str) -> None:
    """Raise AnnotationError (code `ambiguous_video_name`) if the features of two videos could be one file.

    Args:
        names: of videos, each once.
        location: where they are said, for messages.
    """
    called: dict[str, str] = {}
    for name in names:
        _check_distinct(called, name, location)


def _check_distinct(called: dict[str, str], name: str, location: str) -> None:
    """Add a name to the names by stem; AnnotationError if another one has this stem."""
    known = called.setdefault(file_stem(name), name)
    if known != name:
        raise AnnotationError(
            f"{location}: two videos have one name, {excerpt(known)} and {excerpt(name)}, and their features could not "
            "be distinguished. Rename one, or remove its entry.",
            code="ambiguous_video_name",
        )


def file_stem(name: str) -> str:
    """Return a video's name without the suffix of a video file."""
    if not name.lower().endswith(FILE_SUFFIXES):
        return name
    for suffix in FILE_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def sentence_of(value: Any, location: str) -> str:
    """Return a sentence in one line; AnnotationError if it is none."""
    sentence = " ".join(value.split()) if isinstance(value, str) else ""
    if not sentence:
        raise AnnotationError(
            f"{location}: a sentence is expected, and {excerpt(value)} was found; correct it or leave it out.",
            code="malformed_row",
        )
    return sentence
