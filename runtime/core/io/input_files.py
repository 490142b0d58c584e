"""Check that input files and directories exist, and open files that must stay within a directory."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, GroundingError, as_sentence
from runtime.core.io.text_files import parse_json, read_text


def is_same_file(path: str | os.PathLike[str], *others: str | os.PathLike[str] | None) -> bool:
    """Return whether a path leads to one of `others` once links are resolved; None entries are ignored."""
    # Path.resolve raises RuntimeError before Python 3.13 for a link that leads to itself.
    return os.path.realpath(path) in {os.path.realpath(other) for other in others if other is not None}


def open_inside(path: Path, directory: Path) -> int:
    """Open a regular file for reading that is in a directory after all links are resolved; return its descriptor.

    Raises:
        OSError: there is no such file, or a link leads out of the directory.
    """
    root = directory.resolve()
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(_real_inside(path, root), flags)
    try:
        # A link that was created after the first check must not lead out of the directory either.
        opened, current = os.fstat(handle), os.lstat(_real_inside(path, root))
        if not stat.S_ISREG(opened.st_mode) or not os.path.samestat(opened, current):
            raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _real_inside(path: Path, root: Path) -> Path:
    try:
        real = path.resolve(strict=True)
    except RuntimeError:
        # Path.resolve raises it before Python 3.13 for a link that leads to itself.
        raise FileNotFoundError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    if root not in real.parents:
        raise FileNotFoundError(errno.ENOENT, "outside its directory", str(path))
    return real


def check_file(
    path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str = "check the path"
) -> None:
    """Raise `error` unless `path` is a regular file that can be read.

    Args:
        description: start of the message: "The model file".
        error: class to raise, with the code `missing_file`, `not_a_file`, `not_a_directory` or `unreadable_file`.
        advice: what the reader should do, as an imperative without a full stop.
    """
    _check_kind(path, stat.S_ISREG, "not a regular file", description, error, advice)


def check_directory(
    path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str = "check the path"
) -> None:
    """Raise `error` unless `path` is a directory that can be listed; see `check_file`."""
    _check_kind(path, stat.S_ISDIR, "not a directory", description, error, advice)


def _check_kind(
    path: str | os.PathLike[str],
    is_kind: Callable[[int], bool],
    negation: str,
    description: str,
    error: type[GroundingError],
    advice: str,
) -> None:
    problem = None
    code = "unreadable_file"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        code = "missing_file"
    except NotADirectoryError:
        file = next(parent for parent in Path(path).parents if parent.is_file())
        problem = f"does not exist, because {file} is not a directory"
        code = "missing_file"
    except OSError as cause:
        problem = f"cannot be opened ({cause.strerror or cause})"
    except ValueError as cause:
        problem = f"is not a valid path ({cause})"
    else:
        if not is_kind(mode):
            problem = f"is {_kind_of(mode)}, {negation}"
            code = "not_a_file" if is_kind is stat.S_ISREG else "not_a_directory"
        elif not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            problem = "cannot be opened (permission denied)"
    if problem is not None:
        raise error(f"{description} {path} {problem}. {as_sentence(advice)}", code=code)


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


def read_json(path: str | os.PathLike[str], description: str, error: type[GroundingError] = AnnotationError) -> Any:
    """Return the JSON value in a file, checked as by `runtime.core.io.text_files.parse_json`.

    Args:
        description: expected content without an article, for messages: "layer ranking".
    """
    text = read_text(path, f"JSON ({description})", error)
    return parse_json(text, f"{path} ({description})", error, advice="correct the file, or write it again")


def merges_names(directory: str | os.PathLike[str]) -> bool:
    """Return whether names that differ in case or Unicode normalization are one file, as on most of macOS and Windows.

    Args:
        directory: on the file system in question; need not exist. A temporary file is written there.
    """
    existing = Path(directory).absolute()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".drn-\u00e9-") as probe:
            path = Path(probe.name)
            return any(
                path.with_name(other).exists()
                for other in (path.name.replace("drn", "DRN"), unicodedata.normalize("NFD", path.name))
            )
    except (OSError, UnicodeEncodeError):
        # Writing the output raises the error with its reason.
        return False
