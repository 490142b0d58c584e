"""List the video files in a directory and its subdirectories."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from runtime.core.errors import VideoFileError

log = logging.getLogger("drn")

SUFFIXES = frozenset(
    (".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
     ".ts", ".vob", ".webm", ".wmv")
)  # fmt: skip


def videos_in(directory: Path) -> list[Path]:
    """Return the video files in a directory and its subdirectories, sorted; hidden files are omitted.

    Files are recognized by their suffix. Symbolic links to directories are not followed; links to files outside the
    directory are omitted with a warning.

    Raises:
        VideoFileError: the directory contains no video file, or cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise VideoFileError(
            f"The directory {error.filename} cannot be listed: {error.strerror}. Correct its permissions.",
            code="unreadable_file",
        ) from error

    root = directory.resolve()
    videos = []
    for parent, _, names in os.walk(directory, onerror=refuse):
        for path in (Path(parent, name) for name in names):
            if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                log.warning("%s is a link to a file outside %s and is skipped.", path, directory)
                continue
            videos.append(path)
    if not videos:
        raise VideoFileError(
            f"{directory} contains no video file ({', '.join(sorted(SUFFIXES))}). Check the path.", code="missing_file"
        )
    return sorted(videos)
