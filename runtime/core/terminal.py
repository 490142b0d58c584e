"""Print text of users and files without control characters and without encoding errors."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from runtime.core.errors import OutputError, excerpt, one_line, printable, printable_line

# ASCII replacements of the characters that commands draw with; other characters become escapes.
_ASCII = {
    **dict(zip("█▒·•“”‘’–—−×µ─━│┃╭╮╰╯├┤┬┴┼", "#=.*\"\"''---xu--||+++++++++")),
    "…": "...",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "±": "+/-",
}
# Carriage return, cursor up and colors, which progress bars and tyro use.
_DRAWING = re.compile(r"(\r|\x1b\[A|\x1b\[[0-9;]*m)")
_ERRORS = "drn.printable"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


codecs.register_error(_ERRORS, _replacement)


class _Escaping:
    """A text stream that escapes its input."""

    def __init__(self, stream: Any, escape: Callable[[str], str]) -> None:
        self._stream = stream
        self.escape = escape

    def write(self, text: str) -> int:
        self._stream.write(self.escape(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Results(_Escaping):
    """A stdout that raises OutputError if it cannot be written.

    Broken pipes and full disks remain OSErrors, which `runtime.core.cli` reports.
    """

    def write(self, text: str) -> int:
        with _writing_results():
            return super().write(text)

    def flush(self) -> None:
        with _writing_results():
            self._stream.flush()


class _Messages(_Escaping):
    """A stderr that discards text that cannot be written."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            discard_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard_output(self._stream)


class _ClosedOutput(io.StringIO):
    """The stdout of a process that was started without one."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


@contextlib.contextmanager
def _writing_results() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise OutputError(
            f"The results cannot be written to stdout: {error.strerror or one_line(error)}. Redirect stdout to a "
            "terminal, a file or a pipe.",
            code="unwritable_stdout",
        ) from error


def discard_output(stream: Any) -> None:
    """Redirect a stream that cannot be written to the null device, because Python flushes it again at exit."""
    # Streams without a descriptor, such as those of tests, are not flushed at exit.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def replace_closed_streams() -> None:
    """Open the null device for every standard descriptor that is closed (`>&-`).

    Otherwise the next opened file gets the number 0, 1 or 2, and a library that prints there overwrites it. Writing to
    a stdout that was closed remains an error.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system assigns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


def escape_results(text: str) -> str:
    """Return text with escaped control characters that remains valid JSON if it is JSON."""
    # json.dumps does not escape this control character, and JSON has no "\x7f".
    return printable(text.replace("\x7f", "\\u007f"))


def escape_drawing(text: str) -> str:
    """Return text with escaped control characters, apart from those that progress bars and colors need."""
    return "".join(part if index % 2 else escape_results(part) for index, part in enumerate(_DRAWING.split(text)))


@contextlib.contextmanager
def protected_streams() -> Iterator[Callable[[], None]]:
    """Escape control characters on stdout and stderr, and replace characters that their encoding does not have.

    Yields:
        A function that disables colors on stdout, to be called before results are printed.
    """
    replace_closed_streams()
    before: tuple[Any, Any] = (sys.stdout, sys.stderr)
    for stream in before:
        # The streams of notebooks may not have this method.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=_ERRORS)
    results: Any = _Results(sys.stdout, escape_drawing)
    errors: Any = _Messages(sys.stderr, escape_drawing)
    sys.stdout, sys.stderr = results, errors

    def no_colors() -> None:
        results.escape = escape_results

    try:
        yield no_colors
    finally:
        sys.stdout, sys.stderr = before


class Formatter(logging.Formatter):
    """A formatter of log lines that escapes newlines in values."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            escaped = tuple(
                printable_line(str(value)) if isinstance(value, (str, os.PathLike, BaseException)) else value
                for value in record.args
            )
            record = logging.makeLogRecord({**record.__dict__, "args": escaped})
        return printable(super().format(record))


def argument(word: str) -> str:
    """Return a word of a command line in bounded form without control characters, for error messages."""
    return word if printable_line(word) == word and len(word) <= len(excerpt(word)) else excerpt(word)[1:-1]


def shell_words(words: list[str]) -> str:
    """Return words quoted for a shell without control characters, so that the printed command can be typed."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(UnicodeEncodeError):
        word.encode(encoding)
        if printable_line(word) == word:
            return shlex.quote(word)
    # bash, zsh and ksh read octal escapes within $'...'.
    letters = []
    for byte in os.fsencode(word):
        plain = 32 <= byte < 127 and chr(byte) not in "\\'"
        letters.append(chr(byte) if plain else f"\\{byte:03o}")
    return f"$'{''.join(letters)}'"


def command_line(module: str, options: Mapping[str, object], *positional: object) -> str:
    """Return a command line, quoted for a shell.

    Args:
        options: parameter name to value. None, False and empty sequences are omitted; True is a flag without a value,
            and a sequence is a flag with several values.
    """
    words: list[object] = ["python", "-m", module, *positional]
    for name, value in options.items():
        if value is None or value is False or value == ():
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, (tuple, list)):
            words += value
        elif value is not True:
            words.append(value)
    return shlex.join(map(str, words))
