"""Write files atomically, remove temporary files of killed processes, and lock directories and files."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from runtime.core.errors import OutputError
from runtime.core.interrupts import deferred
from runtime.core.io import finished_files
from runtime.core.io.input_files import is_same_file

try:
    import fcntl
except ImportError:  # Windows has no flock.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("drn")


# Prefix of temporary names, which are .drn-MACHINE-RANDOM and the name or suffix of the final file.
TEMPORARY = ".drn-"
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<machine>[0-9a-f]{8})-[a-z0-9_]{8}([-.].*)?", re.DOTALL)
# Name of the lock file of a directory.
LOCK = ".drn-lock"
# File names have at most 255 bytes, of which the prefix takes 23.
MAX_TAIL_BYTES = 200
# Age at which a temporary file of another machine, or on a file system without locks, is removed.
STRAY_SECONDS = 24 * 3600
# Searching a directory for temporary files of ended processes takes at most 1 / SWEEP_SHARE of the running time.
SWEEP_SHARE = 100
WAIT_SECONDS = 0.02
# Number of attempts to create a directory that other processes remove at the same time.
MAX_ATTEMPTS = 10

Created = TypeVar("Created")

# Descriptors of held locks. A forked child closes them, so that it does not hold the locks longer than its parent.
_held: set[int] = set()
# Start and duration of the last search of each directory, in seconds.
_swept: dict[Path, tuple[float, float]] = {}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the directory of `path`, and rename it to `path` if the block ends without an error.

    A link is followed: its target is replaced, and the link stays. The directory is created. After any exception,
    including Ctrl-C and SIGTERM, the temporary file is removed and `path` is unchanged. After `kill -9` the next
    process that writes into the same directory removes the file.

    Raises:
        OutputError: `path` cannot be written (no permission, disk full, a file instead of a directory).
    """
    target = resolved_output(path)
    created = _missing(target.parent)
    temporary: _Temporary | None = None
    try:
        with deferred():
            temporary = _temporary_in(target.parent, target.name)
        yield temporary.path
        temporary.path.chmod(0o666 & ~_umask())
        with deferred():
            os.replace(temporary.path, target)
            finished_files.record(Path(path))
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with deferred():
            if temporary is not None:
                temporary.remove()
            _remove_empty(created)


def _temporary_in(directory: Path, name: str | None = None) -> _Temporary:
    """Create `directory`, remove temporary files of ended processes in it, and create a new temporary path."""

    def create() -> _Temporary:
        _sweep(directory)
        return _Temporary(directory, name)

    return _create_in(directory, create)


def _create_in(directory: Path, create: Callable[[], Created]) -> Created:
    """Create `directory`, and return the result of `create`, which creates a file in it.

    Both are repeated if another process, whose output failed, removes the directory in between.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            directory.mkdir(parents=True, exist_ok=True)
            return create()
    directory.mkdir(parents=True, exist_ok=True)
    return create()


@contextlib.contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """Create `parent`, yield a temporary directory in it, and remove both at the end, `parent` only if empty.

    Raises:
        OSError: the directory cannot be created.
    """
    created = _missing(parent)
    temporary: _Temporary | None = None
    try:
        with deferred():
            temporary = _temporary_in(parent)
        yield temporary.path
    finally:
        with deferred():
            if temporary is not None:
                temporary.remove()
            _remove_empty(created)


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], file: str | None = None, *, wait: bool = False) -> Iterator[None]:
    """Create a directory and hold its lock against other processes that lock it too.

    The system releases the lock when the process ends, even by `kill -9`.

    Args:
        file: name of a file in it; only this file is locked, and others can be written meanwhile.
        wait: wait for another process instead of raising.

    Raises:
        OutputError: another process holds the lock, or the directory cannot be written.
    """
    directory = Path(directory)
    lock = directory / (LOCK if file is None else f"{TEMPORARY}lock{_tail(file)}")
    created = _missing(directory)
    handle: int | None = None
    try:
        while handle is None:
            try:
                with deferred():
                    handle = _create_in(directory, functools.partial(_acquired, lock))
            except OSError as error:
                raise unwritable(directory, error) from error
            if handle is None and not wait:
                raise OutputError(
                    f"Another process is writing {directory if file is None else directory / file}. Wait for it, or "
                    "choose another --output.",
                    code="output_locked",
                )
            if handle is None:
                time.sleep(WAIT_SECONDS)
        yield
    finally:
        with deferred():
            if handle is not None:
                # Removed while the lock is held: `_is_open_as` shows processes that opened it before that it is gone.
                with contextlib.suppress(OSError):
                    lock.unlink()
                _close(handle)
            _remove_empty(created)


def content_names(directory: Path) -> list[str]:
    """Return the sorted names in a directory without locks and temporary files; empty if it does not exist."""
    names = os.listdir(directory) if directory.exists() else []
    return sorted(name for name in names if not name.startswith(TEMPORARY))


def remove_strays(directory: Path) -> None:
    """Remove temporary files and staging directories in `directory` whose processes have ended.

    A process holds a lock on each of its files. Files of other machines, which may not share locks, and on file systems
    without locks are removed a day after their last change.
    """
    try:
        with os.scandir(directory) as entries:
            names = [(entry.name, match) for entry in entries if (match := _TEMPORARY_NAME.fullmatch(entry.name))]
    except OSError:
        return
    for name, match in names:
        with contextlib.suppress(OSError):
            _remove_if_dead(directory / name, match["machine"] == _machine())


class _Temporary:
    """A temporary file, or directory if no name is given, that is locked while it is in use."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        prefix = f"{TEMPORARY}{_machine()}-"
        while True:
            if name is None:
                self.path = Path(tempfile.mkdtemp(dir=directory, prefix=prefix))
                lock = self.path / LOCK
                try:
                    self._handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                except OSError:
                    shutil.rmtree(self.path, ignore_errors=True)
                    raise
            else:
                self._handle, created = tempfile.mkstemp(dir=directory, prefix=prefix, suffix=_tail(name))
                self.path = lock = Path(created)
            _held.add(self._handle)
            if _lock(self._handle) is not False and _is_open_as(self._handle, lock):
                return
            # Another process removed it between its creation and the lock.
            self.remove()

    def remove(self) -> None:
        """Remove the file or directory, unless it was renamed, and release the lock."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.path.unlink()
        _close(self._handle)


def _tail(name: str) -> str:
    """Return the end of a temporary name, including the suffix, because some writers choose the format by it."""
    for tail in (f"-{name}", Path(name).suffix):
        if len(os.fsencode(tail)) <= MAX_TAIL_BYTES:
            return tail
    return ""


def _acquired(lock: Path) -> int | None:
    """Return a descriptor that holds the lock of a file, or None if another process holds it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        _held.add(handle)
        state = _lock(handle)
        if state is None:
            log.warning("%s is on a file system without locks. Do not let two processes write it.", lock.parent)
        if state is not False and _is_open_as(handle, lock):
            return handle
        _close(handle)
        if state is False:
            return None


def _lock(handle: int) -> bool | None:
    """Try to lock a descriptor, and return whether it is locked; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_as(handle: int, path: Path) -> bool:
    """Return whether `path` is still the file of a descriptor."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _close(handle: int) -> None:
    if handle in _held:
        _held.discard(handle)
        with contextlib.suppress(OSError):
            os.close(handle)


def _release_in_child() -> None:
    # Closing a copy of a descriptor does not release the lock of the parent.
    for handle in list(_held):
        _close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _sweep(directory: Path) -> None:
    """Remove strays of a directory, unless it was searched a short time ago."""
    start = time.monotonic()
    last_start, seconds = _swept.get(directory, (-float("inf"), 0.0))
    if start - last_start >= SWEEP_SHARE * seconds:
        remove_strays(directory)
        _swept[directory] = (start, time.monotonic() - start)


def _remove_if_dead(path: Path, is_local: bool) -> None:
    """Remove a temporary file or directory whose process has ended; `is_local`: this machine created it."""
    status = os.lstat(path)
    is_directory = stat.S_ISDIR(status.st_mode)
    if not is_directory and not stat.S_ISREG(status.st_mode):
        return
    changed = [status.st_mtime]
    if is_directory:
        changed += [entry.stat().st_mtime for entry in path.iterdir()]
    old = time.time() - max(changed) > STRAY_SECONDS
    lock = path / LOCK if is_directory else path
    try:
        # Network file systems require a descriptor that can write.
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        # Its process was killed before it created the lock, or is about to create it.
        if old and is_directory:
            shutil.rmtree(path, ignore_errors=True)
        return
    try:
        state = _lock(handle)
        dead = state is not False and (old or (state is True and is_local))
        if dead and _is_open_as(handle, lock):
            if is_directory:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        os.close(handle)


@functools.cache
def _machine() -> str:
    """Return eight hexadecimal digits that identify the running kernel, whose processes share locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _missing(directory: Path) -> list[Path]:
    """Return those of a directory and its parents that do not exist, innermost first."""
    return [path for path in (directory, *directory.absolute().parents) if not os.path.exists(path)]


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def resolved_output(path: str | os.PathLike[str]) -> Path:
    """Return the file that is replaced when `path` is written: links are followed, and stay.

    Raises:
        OutputError: `path` is a directory, a device or a link that leads to itself.
    """
    try:
        resolved = Path(path).resolve()
        if resolved.is_dir():
            raise _is_directory(path)
        if resolved.exists() and not resolved.is_file():
            raise OutputError(f"{path} is a device, which a file would replace. Name another file to write.")
    except OSError as error:
        raise unwritable(Path(path), error) from error
    except RuntimeError as error:
        # Path.resolve raises it before Python 3.13 for a link that leads to itself.
        raise OutputError(f"{path} is a link that leads to itself. Name another file to write.") from error
    return resolved


def _is_directory(path: str | os.PathLike[str]) -> OutputError:
    return OutputError(f"Expected a file to write, got the directory {path}. Name a file.", code="output_is_directory")


def check_writable(path: str | os.PathLike[str] | None, *inputs: str | os.PathLike[str] | None) -> None:
    """Check before a long computation that an output file can be written.

    Args:
        path: the output file; nothing is checked if None.
        inputs: files that the command reads or writes otherwise; None entries are ignored.

    Raises:
        OutputError: `path` cannot be written, or is one of `inputs` (code `output_exists`).
    """
    if path is not None:
        if is_same_file(path, *inputs):
            raise OutputError(
                f"{path} is given twice, and would be overwritten. Name another output file.", code="output_exists"
            )
        with contextlib.suppress(_Discarded), atomic_write(path):
            raise _Discarded


# Suffixes of models, features and videos, which no report replaces.
_READ_SUFFIXES = frozenset(
    (".onnx", ".engine", ".pt", ".pth", ".data", ".npy", ".npz", ".h5", ".hdf5", ".parquet", ".mp4", ".mkv", ".avi",
     ".webm", ".mov")
)  # fmt: skip


def check_report(path: str | os.PathLike[str] | None, *inputs: str | os.PathLike[str] | None) -> None:
    """Check the output file of a report or picture as `check_writable` does, and that it replaces no model or data.

    Raises:
        OutputError: see `check_writable`; or `path` is a model, feature or video file (code `not_a_report`).
    """
    if path is not None and Path(path).suffix.lower() in _READ_SUFFIXES and Path(path).exists():
        raise OutputError(f"{path} exists and is not a report. Name another output file.", code="not_a_report")
    check_writable(path, *inputs)


class _Discarded(Exception):
    """Raised to end the trial write of `check_writable`, so that its file is removed."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as UTF-8, atomically; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as a file of indented JSON, atomically; see `atomic_write`.

    Raises:
        ValueError: the value contains NaN or an infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error for a file that cannot be written, with the cause and what to do."""
    if path.parent.name.startswith(TEMPORARY):
        # Messages name the final path, not the temporary one.
        path = path.parent.parent / path.name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path} was not written, because the disk is full. Free some space, or choose another directory.",
            code="disk_full",
        )
    file = next((parent for parent in path.parents if os.path.exists(parent) and not os.path.isdir(parent)), None)
    reason = f"{file} is not a directory" if file else error.strerror or error
    return OutputError(f"{path} cannot be written: {reason}. Choose another directory.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
