"""Print text of users and files so that it can neither steer a terminal nor fail because a character is missing."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

from runtime.errors import excerpt, printable, printable_line

# What the output of commands draws with, for terminals that have ASCII alone; every other character becomes an escape.
_ASCII = {
    **dict(zip("█▒·•“”‘’–—−×µ─━│┃╭╮╰╯├┤┬┴┼", "#=.*\"\"''---xu--||+++++++++")),
    "…": "...",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "±": "+/-",
}
# Carriage return, cursor up and colors: how progress bars and tyro draw.
_DRAWING = re.compile(r"(\r|\x1b\[A|\x1b\[[0-9;]*m)")
_ERRORS = "drn.printable"


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


codecs.register_error(_ERRORS, _replacement)


class _Escaping:
    """A text stream that escapes what is written to it."""

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


def escape_results(text: str) -> str:
    """Return text with its control characters escaped, so that JSON in it stays JSON."""
    # The only control character that json.dumps leaves as it is, and Python's escape for it is none of JSON's.
    return printable(text.replace("\x7f", "\\u007f"))


def escape_drawing(text: str) -> str:
    """Return text with its control characters escaped, apart from those that progress bars and colors need."""
    return "".join(part if index % 2 else escape_results(part) for index, part in enumerate(_DRAWING.split(text)))


@contextlib.contextmanager
def protected_streams() -> Iterator[Callable[[], None]]:
    """Let stdout and stderr escape control characters, and replace characters that their encoding does not have.

    Yields a function to be called once only results are printed: until then, colors pass on stdout too.
    """
    before: tuple[Any, Any] = (sys.stdout, sys.stderr)
    for stream in before:
        # Streams that stand in for the terminal's, as in notebooks, may not have this.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=_ERRORS)
    results: Any = _Escaping(sys.stdout, escape_drawing)
    errors: Any = _Escaping(sys.stderr, escape_drawing)
    sys.stdout, sys.stderr = results, errors

    def no_colors() -> None:
        results.escape = escape_results

    try:
        yield no_colors
    finally:
        sys.stdout, sys.stderr = before


class Formatter(logging.Formatter):
    """Formats log lines whose values cannot add lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            escaped = tuple(
                printable_line(str(value)) if isinstance(value, (str, os.PathLike, BaseException)) else value
                for value in record.args
            )
            record = logging.makeLogRecord({**record.__dict__, "args": escaped})
        return printable(super().format(record))


def argument(word: str) -> str:
    """Return a word of a command line as an error message shows it."""
    return word if printable_line(word) == word and len(word) <= len(excerpt(word)) else excerpt(word)[1:-1]


def shell_words(words: list[str]) -> str:
    """Return words quoted for a shell, such that what is printed can be typed again."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    with contextlib.suppress(UnicodeEncodeError):
        word.encode(encoding)
        if printable_line(word) == word:
            return shlex.quote(word)
    # Bytes that no terminal acts on; bash, zsh and ksh read them back within $'...'.
    letters = []
    for byte in os.fsencode(word):
        plain = 32 <= byte < 127 and chr(byte) not in "\\'"
        letters.append(chr(byte) if plain else f"\\{byte:03o}")
    return f"$'{''.join(letters)}'"
