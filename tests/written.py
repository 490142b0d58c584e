"""Compare the "Written:" lines of a command with the files that it wrote."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.core.io.atomic_files import TEMPORARY

_PREFIX = "Written: "
_MANY = re.compile(r"(\d+) \w+ files in (.+)")
# Directories that commands use as a cache of their own, which the tests place next to the outputs.
_CACHES = ("cache", "uploads")

Versions = dict[Path, tuple[int, int]]


def file_versions(directory: Path) -> Versions:
    """Return inode and time of the last change of every output in a directory."""
    paths = [path for path in directory.rglob("*") if path.is_file() and _is_output(path, directory)]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def _is_output(path: Path, directory: Path) -> bool:
    """Return whether a path is in a directory, and no lock and not in a cache."""
    if not path.is_relative_to(directory) or path.name.startswith(TEMPORARY):
        return False
    return not {*_CACHES, "__pycache__"} & {*path.relative_to(directory).parts}


def check_written(directory: Path, before: Versions, lines: Sequence[str]) -> None:
    """Assert that the "Written:" lines of a command name all files that it wrote to a directory, and no others.

    Args:
        directory: directory that contains the outputs; paths in `lines` are absolute or relative to it.
        before: `file_versions` of the directory before the command.
        lines: log of the command.
    """
    after = file_versions(directory)
    left = {path for path in after if before.get(path) != after[path]}
    texts = [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
    folders = [match for text in texts if (match := _MANY.fullmatch(text))]
    for path in (directory / text for text in texts if not _MANY.fullmatch(text)):
        assert path.is_file(), path
        if _is_output(path, directory):
            assert path in left, f"{path} was not written, or is named twice: {texts}"
            left.remove(path)
    # Inner directories first, because their files are in the outer ones too.
    for match in sorted(folders, key=lambda match: -len((directory / match[2]).parts)):
        inside = {path for path in left if path.is_relative_to(directory / match[2])}
        assert len(inside) == int(match[1]), (match[0], inside)
        left -= inside
    assert not left, f"no line names {left}: {texts}"


@contextlib.contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Yield the list of messages that commands log in this process inside the `with` statement."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("drn")
    level = logger.level
    logger.addHandler(handler)
    # Called as functions, commands log less.
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def written_checked(directory: Path) -> Iterator[None]:
    """Call `check_written` for the commands that run in this process inside the `with` statement."""
    before = file_versions(directory)
    with logged_lines() as lines:
        yield
    check_written(directory, before, lines)
