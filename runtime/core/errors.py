"""Define the error classes of the project, and bound and escape the text of messages."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

# Maximum length of an excerpt of a value, and of a message, in characters.
MAX_VALUE_LENGTH = 300
MAX_MESSAGE_LENGTH = 4000

_LONG_WORD = re.compile(rf"\S{{{MAX_VALUE_LENGTH + 1},}}")
# Control characters other than tab and newline, surrogates, and marks that reverse the direction of text.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class _CodedError(Exception):
    """Base class of errors with a stable identifier.

    Args:
        code: identifier for programs and tests, listed in docs/error-codes.md; default: the code of the class.
    """

    code: str

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes pickle errors. The keyword argument `code` is part of the state.
        return type(self), self.args, dict(self.__dict__)


class GroundingError(_CodedError):
    """An error that the reader can correct: commands print its bounded message without a traceback and exit with 2."""

    code = "invalid_input"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(bounded(message), code=code)


class ShapeError(GroundingError):
    """The shape of an array or a request does not fit the model."""

    code = "shape_mismatch"


class FeatureError(GroundingError):
    """Clip features cannot be read or used."""

    code = "invalid_features"


class MissingFeatures(FeatureError):
    """A feature store has no features of a video."""

    code = "missing_features"


class VideoFileError(GroundingError):
    """A video file cannot be decoded, or only a part of what was requested."""

    code = "invalid_video"


class AnnotationError(GroundingError):
    """Annotation files of a data set are missing, malformed or contradict each other."""

    code = "invalid_annotations"


class QueryError(GroundingError):
    """A sentence cannot be used as a query."""

    code = "invalid_query"


class ModelFileError(GroundingError):
    """A file is not a model of this toolkit, or cannot be used on this machine."""

    code = "invalid_model"


class CheckpointError(ModelFileError):
    """A torch checkpoint cannot be read, or does not contain the expected network."""

    code = "invalid_checkpoint"


class DeviceError(GroundingError):
    """A requested device or library is not available."""

    code = "device_unavailable"


_OUT_OF_MEMORY = ("outofmemory", "memoryallocation", "allocatememory", "allocfailed", "badalloc")


def is_out_of_memory(message: object) -> bool:
    """Return whether the message of a library means that memory ran out.

    CUDA: CUDA_ERROR_OUT_OF_MEMORY, cudaErrorMemoryAllocation. ONNX Runtime: "Failed to allocate memory for requested
    buffer", "CUDA failure 2: out of memory". torch, outside its own allocator: RuntimeError "CUDA error: out of memory"
    and "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate". TensorRT: "OutOfMemory", "std::bad_alloc".
    """
    flat = str(message).lower().replace(" ", "").replace("_", "")
    return any(words in flat for words in _OUT_OF_MEMORY)


class DeviceMemoryError(DeviceError):
    """A batch does not fit into the memory of its device, but a smaller one may."""

    code = "out_of_memory"


class ServerError(GroundingError):
    """A server cannot be reached, or answers with an error."""

    code = "server_error"


class OutputError(GroundingError):
    """A result cannot be written."""

    code = "unwritable_output"


class CheckFailed(_CodedError):
    """A check of parity, precision or recall failed in a command that ran: exit code 1."""

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
        value: the argument; a bool does not count as a number.
        expected: description of an accepted value with its article, for the message: "an array".
    """
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise error(
            f"Expected {expected} for {name}, got {excerpt(value)} ({type(value).__name__}). Correct the argument.",
            code="invalid_argument",
        )


def check_option(
    flag: str,
    value: float | None,
    minimum: float,
    maximum: float | None = None,
    error: type[GroundingError] = GroundingError,
) -> None:
    """Raise `error` (code `invalid_option`) unless the number of a command-line option is None or in range.

    Args:
        minimum, maximum: smallest and largest accepted value; no upper limit when None.
    """
    if value is not None and not (minimum <= value and (maximum is None or value <= maximum)):
        limits = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise error(f"Expected {limits} for {flag}, got {value}. Correct the option.", code="invalid_option")


def check_path(path: object, error: type[GroundingError] = GroundingError) -> None:
    """Raise `error` (code `invalid_argument`) unless the argument `path` is a string or an `os.PathLike`."""
    check_argument("path", path, (str, os.PathLike), "a path", error)
    if "\0" in str(path):
        raise error(
            f"Expected a path, got {excerpt(path)} with a null character. Correct the path.", code="invalid_argument"
        )


def invalid_setting(
    expected: str, actual: object, advice: str, error: type[GroundingError] = ModelFileError
) -> GroundingError:
    """Return an error (code `invalid_setting`) for a value of a setting.

    Args:
        advice: what the reader should do, as an imperative without a full stop.
    """
    return error(f"Expected {expected}, got {excerpt(actual)}. {as_sentence(advice)}", code="invalid_setting")


def from_fields(constructor: Callable[..., Value], fields: object) -> Value:
    """Return `constructor(**fields)`; ModelFileError unless `fields` is a mapping of its parameters."""
    check_argument("value", fields, Mapping, "the result of `to_dict`", ModelFileError)
    try:
        return constructor(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        raise ModelFileError(f"Expected the result of `to_dict`: {one_line(error)}. Export the model again.") from error


def bounded(message: str) -> str:
    """Return a message of at most 4000 characters, in which no path or number takes more than 300.

    Texts with spaces are bounded by `excerpt` where they are quoted.
    """
    words = _LONG_WORD.sub(lambda word: _bounded(word.group(), MAX_VALUE_LENGTH), message)
    return _bounded(words, MAX_MESSAGE_LENGTH)


def one_line(error: BaseException) -> str:
    """Return the message of an error of a library as one bounded line without a full stop, for use in a sentence."""
    return _bounded(" ".join(str(error).split()).rstrip("."), MAX_VALUE_LENGTH)


def excerpt(value: object) -> str:
    """Return `repr(value)` for use in a message, cut to 300 characters."""
    if isinstance(value, (str, bytes, list, tuple)) and len(value) > MAX_VALUE_LENGTH:
        # The repr of the complete value could take as much memory again.
        return _bounded(repr(value[:MAX_VALUE_LENGTH])[:-1], MAX_VALUE_LENGTH - 1) + "…"
    try:
        return _bounded(repr(value), MAX_VALUE_LENGTH)
    except (ValueError, RecursionError):
        # Python does not convert integers of over 4,300 digits.
        return f"a {type(value).__name__} that is too large to print"


def printable(text: str) -> str:
    """Return `text` with control characters escaped, apart from tabs and newlines, so that no terminal acts on it."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def printable_line(text: str) -> str:
    """Return `text` as `printable` does, but with tabs and newlines escaped too."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


def as_sentence(clause: str) -> str:
    """Return a clause without a full stop, such as "check the path", as a sentence."""
    return f"{clause[:1].upper()}{clause[1:]}."


@contextlib.contextmanager
def importing(library: str, extra: str, alternative: str = "") -> Iterator[None]:
    """Raise DeviceError (code `missing_library`) if an import in the block fails.

    A damaged library may raise OSError, and tritonclient raises RuntimeError if grpcio is missing.

    Args:
        extra: extra of this package that installs the library.
        alternative: other advice, as the end of the sentence.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(
            f"{library} cannot be imported ({error}). Run `pip install '.[{extra}]'` in the drn-deploy directory"
            f"{alternative}.",
            code="missing_library",
        ) from error


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], description: str, error: type[GroundingError], advice: str) -> Iterator[None]:
    """Turn every exception of a library that reads a file into one error that names the file.

    The parsers of libraries raise many classes of errors for damaged files, without a common base class. Errors of the
    project pass unchanged.

    Args:
        description: expected content with its article, for the message: "a NumPy array of clip features".
        advice: what the reader should do, as an imperative without a full stop.

    Raises:
        GroundingError: `error`, for every exception in the block.
    """
    try:
        yield
    except GroundingError:
        raise
    except FileNotFoundError as problem:
        raise error(f"{path} does not exist. Check the path.", code="missing_file") from problem
    except Exception as problem:
        code = "damaged_file"
        reason = one_line(problem) or type(problem).__name__
        if isinstance(problem, OSError):
            code = "unreadable_file"
            reason = problem.strerror or reason
        elif isinstance(problem, RecursionError):
            code = "nested_too_deeply"
            reason = "it nests too deeply"
        elif isinstance(problem, MemoryError):
            code = "file_too_large"
            reason = "it needs more memory than is available"
        elif isinstance(problem, KeyError):
            # The KeyErrors of h5py contain a sentence instead of a key.
            key = problem.args[0] if problem.args else ""
            is_message = isinstance(key, str) and " " in key
            reason = one_line(Exception(key)) if is_message else f"{reason} is missing"
        raise error(f"{path} cannot be read as {description}: {reason}. {as_sentence(advice)}", code=code) from problem


def _bounded(text: str, limit: int) -> str:
    """Return `text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[-end:]}"
