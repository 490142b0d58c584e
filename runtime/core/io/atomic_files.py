"""Write files whole or not at all, remove what killed processes left, and lock what two must not write at once."""

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

try:
    import fcntl
except ImportError:  # Windows has no flock.
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("drn")


# Every temporary name begins so: .drn-MACHINE-RANDOM, then the name or suffix of the final file.
TEMPORARY = ".drn-"
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<machine>[0-9a-f]{8})-[a-z0-9_]{8}([-.].*)?", re.DOTALL)
# The lock file of a directory.
LOCK = ".drn-lock"
# File names have 255 bytes at most, of which the prefix takes 23.
MAX_TAIL_BYTES = 200
# A temporary file of another machine, or on a file system without locks, is dead once nothing changed it for a day.
STRAY_SECONDS = 24 * 3600
# Searching a directory for dead temporary files takes at most one part in so many of the running time.
SWEEP_SHARE = 100
WAIT_SECONDS = 0.02
# How often a directory is created that another process removes at the same time.
MAX_ATTEMPTS = 10

Created = TypeVar("Created")

# Descriptors whose locks are held; a forked child must not hold them on after its parent has ended.
_held: set[int] = set()
# Directories that were searched: when, and for how many seconds.
_swept: dict[Path, tuple[float, float]] = {}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` once the block ends without an error.

    The directory is created. After any exception, Ctrl-C and SIGTERM included, the temporary file is gone and `path`
    is as it was before. What `kill -9` leaves is removed by the next process that writes into the same directory.

    Raises:
        OutputError: `path` cannot be written (no permission, disk full, a file where a directory should be).
    """
    path = _resolved(path)
    created = _missing(path.parent)
    temporary: _Temporary | None = None
    try:
        with deferred():
            temporary = _temporary_in(path.parent, path.name)
        yield temporary.path
        temporary.path.chmod(0o666 & ~_umask())
        os.replace(temporary.path, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with deferred():
            if temporary is not None:
                temporary.remove()
            _remove_empty(created)


def _temporary_in(directory: Path, name: str | None = None) -> _Temporary:
    """Create `directory`, remove what dead processes left in it, and return a temporary path in it."""

    def create() -> _Temporary:
        _sweep(directory)
        return _Temporary(directory, name)

    return _create_in(directory, create)


def _create_in(directory: Path, create: Callable[[], Created]) -> Created:
    """Create `directory`, and return the result of `create`, which makes a file in it.

    Both are tried again where another process removes the directory in between: one that created it for a file that it
    did not write in the end.
    """
    for _ in range(MAX_ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            directory.mkdir(parents=True, exist_ok=True)
            return create()
    directory.mkdir(parents=True, exist_ok=True)
    return create()


class Staging:
    """Files that take their places together: until `settle`, what was there before stays as it was.

    Used as a context; afterwards, whatever happened, nothing temporary is left.
    """

    def __init__(self) -> None:
        self._staged: dict[Path, _Temporary] = {}
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        with deferred():
            for temporary in self._staged.values():
                temporary.remove()
            _remove_empty(self._made)

    def path(self, final: str | os.PathLike[str]) -> Path:
        """Return where to write what becomes `final`; OutputError if its directory cannot be written."""
        final = Path(final)
        if final.is_dir():
            raise OutputError(f"{final} is a directory; name the file to write instead.", code="output_is_directory")
        parent = final.resolve().parent
        if parent not in self._staged:
            self._made += _missing(parent)
            try:
                with deferred():
                    self._staged[parent] = _temporary_in(parent)
            except OSError as error:
                raise _unwritable(final, error) from error
        return self._staged[parent].path / final.name

    def settle(self, expected: Callable[[str], bool] = lambda name: True) -> list[Path]:
        """Move what was written to its place, file by file in the order of names; return where it is now.

        Args:
            expected: whether a file of this name is to be kept; others are dropped.
        """
        settled = []
        # A signal between two of the moves would leave one file new and the other old.
        with deferred():
            for parent, temporary in self._staged.items():
                for file in sorted(temporary.path.iterdir()):
                    if file.name == LOCK or not expected(file.name):
                        continue
                    try:
                        os.replace(file, parent / file.name)
                    except OSError as error:
                        raise _unwritable(parent / file.name, error) from error
                    settled.append(parent / file.name)
        return settled


@contextlib.contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """Yield a temporary directory in `parent`, which must exist; afterwards it is gone. Raises OSError."""
    temporary: _Temporary | None = None
    try:
        with deferred():
            _sweep(parent)
            temporary = _Temporary(parent)
        yield temporary.path
    finally:
        if temporary is not None:
            with deferred():
                temporary.remove()


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str], file: str | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold a directory, which is created, against other processes that lock it too.

    The system releases the lock when the process ends, however it ends.

    Args:
        directory: what to lock.
        file: lock only the writing of this file in it, so that others can be written meanwhile.
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
                raise _unwritable(directory, error) from error
            if handle is None and not wait:
                raise OutputError(
                    f"Another process is writing {directory if file is None else directory / file}. Wait until it "
                    "ends, or choose another --output.",
                    code="output_locked",
                )
            if handle is None:
                time.sleep(WAIT_SECONDS)
        yield
    finally:
        with deferred():
            if handle is not None:
                # Removed while the lock is held: whoever opened the file before sees that it is no longer this one.
                with contextlib.suppress(OSError):
                    lock.unlink()
                _close(handle)
            _remove_empty(created)


def content_names(directory: Path) -> list[str]:
    """Return the sorted names in a directory, without locks and temporary files; none if it does not exist."""
    names = os.listdir(directory) if directory.exists() else []
    return sorted(name for name in names if not name.startswith(TEMPORARY))


def remove_strays(directory: Path) -> None:
    """Remove temporary files and staging directories in `directory` whose processes have ended.

    A process holds a lock on each of its own. What another machine made, which may not share locks, and what lies on
    a file system without locks counts as dead after a day without a change.
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
    """A temporary file, or directory where no name is given, locked as long as it is in use."""

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
            # Another process removed it as dead between its creation and the lock.
            self.remove()

    def remove(self) -> None:
        """Remove it, unless it took its place, and release the lock."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.path.unlink()
        _close(self._handle)


def _tail(name: str) -> str:
    """Return how a temporary name ends. The suffix stays, since some writers choose the format by it."""
    for tail in (f"-{name}", Path(name).suffix):
        if len(os.fsencode(tail)) <= MAX_TAIL_BYTES:
            return tail
    return ""


def _acquired(lock: Path) -> int | None:
    """Return a descriptor that holds a lock file, or None if another process does."""
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
    """Return whether a descriptor is locked now; None where the file system has no locks."""
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
    """Return whether `path` still names the file of a descriptor."""
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
    # The lock stays with the parent: closing a copy of a descriptor does not release it.
    for handle in list(_held):
        _close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _sweep(directory: Path) -> None:
    """Remove strays of a directory, unless it was searched a moment ago."""
    started = time.monotonic()
    when, seconds = _swept.get(directory, (-float("inf"), 0.0))
    if started - when >= SWEEP_SHARE * seconds:
        remove_strays(directory)
        _swept[directory] = (started, time.monotonic() - started)


def _remove_if_dead(path: Path, here: bool) -> None:
    """Remove a temporary file or directory whose process has ended; `here`: this machine made it."""
    about = os.lstat(path)
    is_directory = stat.S_ISDIR(about.st_mode)
    if not is_directory and not stat.S_ISREG(about.st_mode):
        return
    changed = [about.st_mtime]
    if is_directory:
        changed += [entry.stat().st_mtime for entry in path.iterdir()]
    old = time.time() - max(changed) > STRAY_SECONDS
    lock = path / LOCK if is_directory else path
    try:
        # Network file systems require a descriptor that can write.
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        # Killed before it had its lock, or just being made.
        if old and is_directory:
            shutil.rmtree(path, ignore_errors=True)
        return
    try:
        state = _lock(handle)
        dead = state is not False and (old or (state is True and here))
        if dead and _is_open_as(handle, lock):
            if is_directory:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        os.close(handle)


@functools.cache
def _machine() -> str:
    """Return eight hexadecimal digits that identify the running kernel, whose processes share its locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _missing(directory: Path) -> list[Path]:
    """Return which of a directory and its parents do not exist, the innermost first."""
    return [path for path in (directory, *directory.absolute().parents) if not os.path.exists(path)]


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories made for files that did not come about; others in use are not empty and stay."""
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Return the file to write, behind any link, which stays one; OutputError if it is no regular file."""
    try:
        resolved = Path(path).resolve()
        if resolved.is_dir():
            raise OutputError(f"{path} is a directory; name the file to write instead.", code="output_is_directory")
        if resolved.exists() and not resolved.is_file():
            raise OutputError(f"{path} is a device, and would be replaced by a file; name another file to write.")
    except OSError as error:
        raise _unwritable(Path(path), error) from error
    except RuntimeError as error:
        # How Path.resolve reports a link that leads to itself before Python 3.13.
        raise OutputError(f"{path} is a link that leads to itself; name another file to write.") from error
    return resolved


def check_writable(path: str | os.PathLike[str] | None, *inputs: str | os.PathLike[str] | None) -> None:
    """Raise OutputError now if `path` could not be written later, before work is done for it; None is no file.

    Neither may it be one of `inputs`: files that are read, or that are written too.
    """
    if path is not None:
        if Path(path).resolve() in {Path(other).resolve() for other in inputs if other is not None}:
            raise OutputError(
                f"{path} is named for something else already, and would be written over; name another file.",
                code="output_exists",
            )
        with contextlib.suppress(_Discarded), atomic_write(path):
            raise _Discarded


# Files that commands read and that a report never is.
_READ_SUFFIXES = frozenset(
    (".onnx", ".engine", ".pt", ".pth", ".data", ".npy", ".npz", ".h5", ".hdf5", ".parquet", ".mp4", ".mkv", ".avi",
     ".webm", ".mov")
)  # fmt: skip


def check_report(path: str | os.PathLike[str] | None, *inputs: str | os.PathLike[str] | None) -> None:
    """Do as `check_writable` for a report or a picture, which replaces no model, feature or video file either."""
    if path is not None and Path(path).suffix.lower() in _READ_SUFFIXES and Path(path).exists():
        raise OutputError(
            f"{path} exists and is no report, and would be written over; name another file.", code="not_a_report"
        )
    check_writable(path, *inputs)


class _Discarded(Exception):
    """Ends a trial write, so that nothing is left of it."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. NaN is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _unwritable(path: Path, error: OSError) -> OutputError:
    if path.parent.name.startswith(TEMPORARY):
        # The final path, not the temporary one.
        path = path.parent.parent / path.name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"No space is left on the disk for {path}; nothing was written. Free some, or choose another place.",
            code="disk_full",
        )
    for parent in path.parents:
        if os.path.exists(parent) and not os.path.isdir(parent):
            return OutputError(f"{path} cannot be written, because {parent} is not a directory. Choose another place.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}. Choose another place.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
