"""Read UTF-8 text, line formats and JSON from files that may be damaged or hostile."""

from __future__ import annotations

import codecs
import collections
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, GroundingError, as_sentence, excerpt, one_line, reading

# The deepest format of this toolkit nests 6 levels. Recursive code such as `copy.deepcopy` fails at a few hundred.
MAX_DEPTH = 64
# Converting an integer of 310 or more digits to a float raises OverflowError.
MAX_DIGITS = 300

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: str | os.PathLike[str], description: str, error: type[GroundingError] = AnnotationError) -> str:
    """Return the content of a UTF-8 text file without its byte order mark.

    Args:
        description: expected content with its article, for messages: "a word table".

    Raises:
        GroundingError: `error`, if the file is missing, unreadable, or not UTF-8.
    """
    with reading(path, description, error, "check the file"):
        content = Path(path).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise error(f"{path}: expected UTF-8 text, got UTF-16. Save the file as UTF-8.", code="not_utf8")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as problem:
            line = content.count(b"\n", 0, problem.start) + 1
            raise error(
                f"{path}, line {line}: expected UTF-8 text, got the byte 0x{content[problem.start]:02x}. "
                "Save the file as UTF-8.",
                code="not_utf8",
            ) from problem


def read_lines(
    path: str | os.PathLike[str], description: str, error: type[GroundingError] = AnnotationError
) -> list[str]:
    """Return the lines of a UTF-8 text file without line ends and without blank lines at the end; see `read_text`.

    Only \\n, \\r\\n and \\r end a line. `str.splitlines` also splits at U+2028, U+0085 and others, which are
    valid within a sentence.
    """
    text = read_text(path, description, error).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def parse_json(
    text: str,
    source: str,
    error: type[GroundingError] = AnnotationError,
    *,
    advice: str = "correct it",
    constants: bool = False,
) -> Any:
    """Return a JSON value with finite numbers, valid Unicode, bounded nesting and no name twice in one object.

    Args:
        source: start of messages: the file, and the line in files of JSON lines.
        advice: what the reader should do, as an imperative without a full stop.
        constants: whether NaN, Infinity and -Infinity are numbers, as for `json` of Python.

    Raises:
        GroundingError: `error`, if the text is not such a value.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=float if constants else _constant,
        )
        _check_depth(value, text)
        _check_unicode(value, text)
        return value
    except RecursionError as problem:
        raise error(
            f"{source}: the JSON nests more than {MAX_DEPTH} levels. {as_sentence(advice)}", code="nested_too_deeply"
        ) from problem
    except (ValueError, MemoryError) as problem:
        raise error(
            f"{source}: invalid JSON ({one_line(problem)}). {as_sentence(advice)}", code="invalid_json"
        ) from problem


def check_format(value: Any, expected: str, source: str, error: type[GroundingError], advice: str) -> None:
    """Raise `error` (code `unknown_format`) unless a value is a mapping whose `format` is `expected`.

    Args:
        expected: identifier with its version, such as "drn-manifest/1".
        advice: what the reader should do, as an imperative without a full stop.
    """
    actual = value.get("format") if isinstance(value, Mapping) else None
    if actual != expected:
        raise error(
            f"{source}: expected the format {excerpt(expected)}, got {excerpt(actual)}. {as_sentence(advice)}",
            code="unknown_format",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"two entries have the name {excerpt(name)}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {excerpt(digits)} is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def _check_depth(value: Any, text: str) -> None:
    """Raise RecursionError if `value`, parsed from `text`, nests more than `MAX_DEPTH` levels."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise RecursionError


def _check_unicode(value: Any, text: str) -> None:
    """Raise ValueError if a string of `value`, parsed from `text`, contains half of a surrogate pair."""
    escape = _SURROGATE.search(text)
    if escape is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        half = problem.object[problem.start]
        match = re.search(re.escape(f"\\u{ord(half):04x}"), text, re.IGNORECASE) or escape
        line = text.count("\n", 0, match.start()) + 1
        raise ValueError(f"line {line} contains half a character, the surrogate \\u{ord(half):04x}") from problem


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
