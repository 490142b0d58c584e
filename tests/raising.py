"""Assert on errors and warnings by class, code and quoted values, so that their wording can change."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import TypeVar

import pytest

Problem = TypeVar("Problem", bound=BaseException)


@contextlib.contextmanager
def raises(
    error: type[Problem] | tuple[type[Problem], ...], code: str, *values: object
) -> Iterator[pytest.ExceptionInfo[Problem]]:
    """Expect an error of a class with a code, whose message quotes all values.

    Args:
        error: class of the error; subclasses pass.
        code: its `code`, such as "missing_file"; docs/error-codes.md lists them.
        values: paths, numbers and names that the message must quote, as `quotes` finds them.

    Returns:
        Context manager with pytest's description of the error, for further assertions.
    """
    with pytest.raises(error) as caught:
        yield caught
    check_error(caught.value, code, *values)


def check_error(error: BaseException, code: str, *values: object) -> None:
    """Assert that an error has the code and that its message is one line that quotes all values."""
    assert getattr(error, "code", None) == code, f"expected the code {code!r}, got {describe(error)}"
    assert "\n" not in str(error), f"expected a message of one line, got {describe(error)}"
    missing = [value for value in values if not quotes(str(error), value)]
    assert not missing, f"expected a message that quotes {missing}, got {describe(error)}"


def describe(error: BaseException) -> str:
    """Return class, code and message of an error."""
    return f"{type(error).__name__}({str(error)!r}, code={getattr(error, 'code', None)!r})"


def quotes(text: str, *values: object) -> bool:
    """Return whether a text contains the text of every value as whole words.

    3 is not found in "13", "3.5" or "v3", and "v_1" not in "v_10".
    """
    return all(_pattern(value).search(text) for value in values)


def records(
    caplog: pytest.LogCaptureFixture, level: int, *values: object, code: str | None = None
) -> list[logging.LogRecord]:
    """Return the log records of exactly this level, with this code if one is given, that quote all values.

    A record has a code where it is logged with `extra={"code": ...}`, as those do whose messages quote no values.
    """
    return [
        record
        for record in caplog.records
        if record.levelno == level
        and (code is None or getattr(record, "code", None) == code)
        and quotes(record.getMessage(), *values)
    ]


def _pattern(value: object) -> re.Pattern[str]:
    text = str(value)
    number = isinstance(value, (int, float))
    before = (r"(?<![\w.])" if number else r"(?<!\w)") if text[:1].isalnum() or text[:1] == "_" else ""
    after = (r"(?!\w|\.\d)" if number else r"(?!\w)") if text[-1:].isalnum() or text[-1:] == "_" else ""
    return re.compile(before + re.escape(text) + after)
