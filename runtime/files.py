"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.errors import AnnotationError, GroundingError, OutputError
from runtime.textfiles import parse_json, read_text

# How the directory is called in which files wait for their places.
STAGED = ".drn-"


@contextlib.contextmanager
def replace_when_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` once the block ends without an error.

    The directory is created. After any exception, Ctrl-C included, the temporary file is gone and `path` is as
    it was before.

    Raises:
        OutputError: the place cannot be written (no permission, disk full, a file where a directory should be).
    """
    # A link stays one: what it points to is replaced.
    path = Path(path).resolve()
    if path.is_dir():
        raise OutputError(f"{path} is a directory; name the file to write instead.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device, and would be replaced by a file; name another file to write.")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays, since some writers choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # Directories made for a file that did not come about go too; others in use are not empty and stay.
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


class Staging:
    """Files that take their places together: until `settle`, what was there before stays as it was.

    Used as a context; afterwards, whatever happened, nothing temporary is left.
    """

    def __init__(self) -> None:
        self._places: dict[Path, Path] = {}

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self._places.values():
            shutil.rmtree(place, ignore_errors=True)

    def path(self, final: str | os.PathLike[str]) -> Path:
        """Return where to write what is to stand at `final`; OutputError if its directory cannot be written."""
        final = Path(final)
        if final.is_dir():
            raise OutputError(f"{final} is a directory; name the file to write instead.")
        parent = final.resolve().parent
        if parent not in self._places:
            try:
                parent.mkdir(parents=True, exist_ok=True)
                self._places[parent] = Path(tempfile.mkdtemp(dir=parent, prefix=STAGED))
            except OSError as error:
                raise _unwritable(final, error) from error
        return self._places[parent] / final.name

    def settle(self, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
        """Move what was written to its place, file by file in the order of names; return where it stands now.

        Args:
            wanted: whether a file of this name is to be kept; others are dropped.
        """
        settled = []
        for parent, place in self._places.items():
            for file in sorted(place.iterdir()):
                if wanted(file.name):
                    try:
                        os.replace(file, parent / file.name)
                    except OSError as error:
                        raise _unwritable(parent / file.name, error) from error
                    settled.append(parent / file.name)
        return settled


def check_writable(path: str | os.PathLike[str] | None, *inputs: str | os.PathLike[str] | None) -> None:
    """Raise OutputError now if `path` could not be written later, before work is done for it; None is no file.

    Neither may it be one of `inputs`: files that are read, or that are written too.
    """
    if path is not None:
        if Path(path).resolve() in {Path(other).resolve() for other in inputs if other is not None}:
            raise OutputError(
                f"{path} is named for something else already, and would be written over; name another file."
            )
        with contextlib.suppress(_NotKept), replace_when_whole(path):
            raise _NotKept


class _NotKept(Exception):
    """Ends a trial write, so that nothing is left of it."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replace_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. NaN is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_file(
    path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str = "check the path"
) -> None:
    """Raise `error` unless `path` is a regular file that can be read; the message names the true cause.

    Args:
        path: the file.
        description: the start of the message: "The model file".
        error: the class to raise.
        advice: the end of the message, as an imperative without a full stop.
    """
    _check_kind(path, stat.S_ISREG, "not a regular file", description, error, advice)


def check_directory(
    path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str = "check the path"
) -> None:
    """Raise `error` unless `path` is a directory that can be listed; arguments as for `check_file`."""
    _check_kind(path, stat.S_ISDIR, "not a directory", description, error, advice)


def _check_kind(
    path: str | os.PathLike[str],
    is_kind: Callable[[int], bool],
    otherwise: str,
    description: str,
    error: type[GroundingError],
    advice: str,
) -> None:
    problem = None
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        problem = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
    except NotADirectoryError:
        file = next(parent for parent in Path(path).parents if parent.is_file())
        problem = f"does not exist, because {file} is a file and not a directory"
    except OSError as cause:
        problem = f"cannot be opened ({cause.strerror or cause})"
    except ValueError as cause:
        # A null character.
        problem = f"is not a valid path ({cause})"
    else:
        if not is_kind(mode):
            problem = f"is {_kind_of(mode)}, {otherwise}"
        elif not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
            problem = "cannot be opened (permission denied)"
    if problem is not None:
        raise error(f"{description} {path} {problem}; {advice}.")


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


def read_json(
    path: str | os.PathLike[str], what: str, error: type[GroundingError] = AnnotationError, *, unique: bool = False
) -> Any:
    """Return the JSON value in `path`; `what` names it in the message when it is missing or malformed.

    Where `unique`, no name may stand twice in one object: JSON readers keep the last and say nothing. See
    `runtime.textfiles.parse_json` for what is refused.
    """
    text = read_text(path, f"JSON ({what})", error)
    return parse_json(text, f"{path} ({what})", error, unique=unique, advice="correct the file, or make it again")


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same however it is laid out and whatever the order of its keys."""
    # Once there and back: tuples become lists and number keys text, as they are when they are read from a file.
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> OutputError:
    if path.parent.name.startswith(STAGED):
        # Where it was to stand, not where it waited.
        path = path.parent.parent / path.name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"No space is left on the disk for {path}; nothing was written. Free some, or choose another place."
        )
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            return OutputError(f"{path} cannot be written, because {parent} is not a directory. Choose another place.")
    return OutputError(f"{path} cannot be written: {error.strerror or error}. Choose another place.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
