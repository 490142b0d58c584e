"""Record the files that a command finishes, so that it can list them if it is interrupted."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# Resolved path to the path as given; None outside a command.
_finished: dict[str, Path] | None = None


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Record files within the block."""
    global _finished
    _finished = {}
    try:
        yield
    finally:
        _finished = None


def record(path: Path) -> None:
    """Record a complete file of the main thread; other threads are those of services, which write caches."""
    if _finished is not None and threading.current_thread() is threading.main_thread():
        _finished[os.path.realpath(path)] = path


def forget(path: Path) -> None:
    """Forget a file that was listed."""
    if _finished is not None:
        _finished.pop(os.path.realpath(path), None)


def by_directory() -> list[list[Path]]:
    """Return the recorded files that exist, in one list for each directory."""
    directories: dict[Path, list[Path]] = {}
    for path in (_finished or {}).values():
        if path.is_file():
            directories.setdefault(path.parent, []).append(path)
    return list(directories.values())
