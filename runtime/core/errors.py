"""Define the errors of the project, and how their messages are worded and bounded."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

# Longest excerpt of a value, and longest message as a whole, in characters.
MAX_VALUE_LENGTH = 300
MAX_MESSAGE_LENGTH = 4000

_LONG_WORD = re.compile(rf"\S{{{MAX_VALUE_LENGTH + 1},}}")
# Control characters other than tab and newline, surrogates, and marks that reverse the direction of text.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class _CodedError(Exception):
    """An error with a stable identifier.

    Args:
        message: what happened, with the values, and what to do.
        code: a stable identifier for programs and tests; the default is that of the class.

    Attributes:
        code: see above.
    """

    code: str

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes send errors back: the keyword argument is part of the state.
        return type(self), self.args, dict(self.__dict__)


class GroundingError(_CodedError):
    """An error that the reader can correct: commands print the message without a traceback and exit with 2.

    The message is bounded.
    """

    code = "invalid_input"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(bounded(message), code=code)


class ShapeError(GroundingError):
    """An array or a request does not fit the model."""

    code = "shape_mismatch"


class FeatureError(GroundingError):
    """Clip features that cannot be read or used."""

    code = "invalid_features"


class MissingFeatures(FeatureError):
    """A video of which there are no features at all, where those of others may be."""

    code = "missing_features"


class VideoFileError(GroundingError):
    """A video file that cannot be decoded, or not as far as was asked."""

    code = "invalid_video"


class AnnotationError(GroundingError):
    """A data set whose annotation files are missing, malformed or contradict each other."""

    code = "invalid_annotations"


class QueryError(GroundingError):
    """A sentence that cannot be asked."""

    code = "invalid_query"


class ModelFileError(GroundingError):
    """A file that is not a model of this toolkit, or is one that cannot be used here."""

    code = "invalid_model"


class CheckpointError(ModelFileError):
    """A torch checkpoint that cannot be read, or does not hold the network it should."""

    code = "invalid_checkpoint"


class DeviceError(GroundingError):
    """A device or library was asked for and is not there."""

    code = "device_unavailable"


_OUT_OF_MEMORY = ("outofmemory", "memoryallocation", "allocatememory", "allocfailed", "badalloc")


def is_out_of_memory(message: object) -> bool:
    """Return whether a library's message means that memory ran out.

    CUDA: CUDA_ERROR_OUT_OF_MEMORY, cudaErrorMemoryAllocation. ONNX Runtime: "Failed to allocate memory for requested
    buffer", "CUDA failure 2: out of memory". torch, outside its own allocator: RuntimeError "CUDA error: out of memory"
    and "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate". TensorRT: "OutOfMemory", "std::bad_alloc".
    """
    flat = str(message).lower().replace(" ", "").replace("_", "")
    return any(words in flat for words in _OUT_OF_MEMORY)


class DeviceMemoryError(DeviceError):
    """A batch does not fit the memory of its device; a smaller one may."""

    code = "out_of_memory"


class ServerError(GroundingError):
    """A server that cannot be reached, or does not do what it was asked."""

    code = "server_error"


class OutputError(GroundingError):
    """A result could not be written."""

    code = "unwritable_output"


class CheckFailed(_CodedError):
    """The command ran, and what it checked does not hold (parity, precision, recall): exit code 1."""

    code = "check_failed"


def check_argument(
    name: str,
    value: object,
    types: type | tuple[type, ...],
    expected: str,
    error: type[GroundingError] = GroundingError,
) -> None:
    """Raise `error` (code `invalid_argument`) unless an argument of a public function has the right type.

    Args:
        name: of the argument.
        value: as the caller gave it; a bool is no number.
        types: of which it may be an instance.
        expected: what it should be, with its article.
        error: the class to raise.
    """
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise error(
            f"Expected {expected} for {name}, got {excerpt(value)} ({type(value).__name__}). Correct the argument.",
            code="invalid_argument",
        )


def check_path(path: object, error: type[GroundingError] = GroundingError) -> None:
    """Raise `error` (code `invalid_argument`) unless the argument `path` is a text or an `os.PathLike`."""
    check_argument("path", path, (str, os.PathLike), "a path", error)
    if "\0" in str(path):
        raise error(
            f"Expected a path, got {excerpt(path)} with a null character. Correct the path.", code="invalid_argument"
        )


def bounded(message: str) -> str:
    """Return a message of at most 4000 characters, in which no path or number takes more than 300.

    Sentences are bounded by `excerpt` where they are quoted.
    """
    words = _LONG_WORD.sub(lambda word: _bounded(word.group(), MAX_VALUE_LENGTH), message)
    return _bounded(words, MAX_MESSAGE_LENGTH)


def one_line(error: BaseException) -> str:
    """Return a library's error message as one bounded line without a full stop, for use within a sentence."""
    return _bounded(" ".join(str(error).split()).rstrip("."), MAX_VALUE_LENGTH)


def excerpt(value: object) -> str:
    """Return `repr(value)` for use in a message: at most 300 characters, whatever the value is."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > MAX_VALUE_LENGTH:
        # The repr of the whole could take as much memory again, and is not needed.
        return _bounded(repr(value[:MAX_VALUE_LENGTH])[:-1], MAX_VALUE_LENGTH - 1) + "…"
    try:
        return _bounded(repr(value), MAX_VALUE_LENGTH)
    except (ValueError, RecursionError):
        # Python refuses to write integers of over 4,300 digits.
        return f"a {type(value).__name__} that is too large to print"


def printable(text: str) -> str:
    """Return `text` with control characters written as escapes, so that printing it cannot steer a terminal.

    Tabs and newlines stay.
    """
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def printable_line(text: str) -> str:
    """Return `text` as `printable` does, and on one line: tabs and newlines are escaped too."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str) -> Iterator[None]:
    """Turn every exception of a library that reads a file into one error that names the file.

    A damaged file makes libraries raise whatever their parsers do (ValueError, KeyError, MemoryError,
    RecursionError, errors of their own), without a common base class. Errors of the project pass unchanged.

    Args:
        path: the file.
        description: what the file should be, with its article: "a NumPy array of clip features".
        error: the class to raise.
        advice: what the reader should do, as an imperative without a full stop.

    Raises:
        GroundingError: `error`, for every exception in the block.
    """
    try:
        yield
    except GroundingError:
        raise
    except FileNotFoundError as problem:
        raise error(f"{path} does not exist; check the path.", code="missing_file") from problem
    except OSError as problem:
        reason = problem.strerror or one_line(problem)
        message = f"{path} should be {description} and cannot be read: {reason}; {advice}."
        raise error(message, code="unreadable_file") from problem
    except RecursionError as problem:
        message = f"{path} should be {description} and nests too deeply to be read; {advice}."
        raise error(message, code="nested_too_deeply") from problem
    except MemoryError as problem:
        message = f"{path} should be {description} and asks for more memory than there is; {advice}."
        raise error(message, code="file_too_large") from problem
    except Exception as problem:
        reason = one_line(problem) or type(problem).__name__
        if isinstance(problem, KeyError):
            # h5py raises KeyError with a sentence in place of the key.
            sentence = isinstance(key := problem.args[0] if problem.args else "", str) and " " in key
            reason = one_line(Exception(key)) if sentence else f"{reason} is missing"
        message = f"{path} should be {description} and cannot be read: {reason}; {advice}."
        raise error(message, code="damaged_file") from problem


def _bounded(text: str, limit: int) -> str:
    """Return `text` with its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[-end:]}"
