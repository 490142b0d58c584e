"""Read files of one JSON object a line, about a query each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

from runtime.core.errors import AnnotationError, as_sentence, excerpt
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import is_number, parse_json, read_lines

Qid = Union[int, str]


def read_rows(path: Path, *, constants: bool = False) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number of each line from 1, its location for messages, and its object, whose `qid` and `vid` are valid.

    Args:
        constants: see `parse_json`.

    Raises:
        AnnotationError: the file is missing or empty, or a line is malformed.
    """
    check_file(path, "The file", AnnotationError)
    lines = read_lines(path, "a JSON object a line")
    if not lines:
        raise AnnotationError(f"{path} is empty. Write one JSON object per query and line.", code="empty_file")
    for number, line in enumerate(lines, 1):
        location = f"{path}, line {number}"
        row = parse_json(line, location, advice="correct the line", constants=constants)
        if not isinstance(row, dict):
            raise malformed(location, "a JSON object with the keys query, qid or vid", row)
        qid, video = row.get("qid", number), row.get("vid")
        if not isinstance(qid, (int, str)) or isinstance(qid, bool):
            raise malformed(location, "an integer or text as qid", qid)
        if video is not None and not isinstance(video, str):
            raise malformed(location, "the name of a video as vid", video)
        yield number, location, row


def intervals(row: dict[str, Any], key: str, location: str) -> list[tuple[float, float]]:
    """Return the list of [start, end] of a key; AnnotationError if it is none."""
    value = row.get(key)
    if not isinstance(value, list) or not all(map(is_interval, value)):
        raise malformed(location, f"{key} [[start, end], ...] in seconds", value)
    return [(float(start), float(end)) for start, end in value]


def is_interval(value: Any) -> bool:
    """Return whether a JSON value is [start, end] with finite numbers."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def malformed(location: str, expected: str, actual: object, advice: str = "correct the line") -> AnnotationError:
    """Return the error (code `malformed_row`) for a value at a location, with which the message begins."""
    return AnnotationError(
        f"{location}: expected {expected}, got {excerpt(actual)}. {as_sentence(advice)}", code="malformed_row"
    )
