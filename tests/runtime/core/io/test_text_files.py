"""Test `runtime.core.io.text_files`: text, lines and JSON of other programs, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import AnnotationError
from runtime.core.io.text_files import MAX_DEPTH, MAX_DIGITS, check_format, parse_json, read_lines, read_text
from tests.raising import raises

SENTENCE = "a\u2028person\u2029opens\x85the\x0bdoor\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n", "\n  \n"])
def test_read_lines_splits_at_newlines_only(tmp_path: Path, end: str, mark: str, tail: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(f"{mark}{SENTENCE}\n\nlast{tail}".replace("\n", end).encode())
    assert read_lines(path, "lines") == [SENTENCE, "", "last"]


@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-be", "utf-16-le"])
def test_text_of_another_encoding_is_rejected(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("one\ntwo\ncaf\xe9" if encoding == "latin1" else "\ufeffperson").encode(encoding))
    with raises(AnnotationError, "not_utf8", path, *([3, "0xe9"] if encoding == "latin1" else [])):
        read_text(path, "text")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("NaN", "invalid_json"),
        ("[-Infinity]", "invalid_json"),
        ("1e999", "invalid_json"),
        ("9" * (MAX_DIGITS + 1), "invalid_json"),
        ("-" + "9" * 5000, "invalid_json"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested_too_deeply"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested_too_deeply"),
        ("[" * 100_000, "nested_too_deeply"),
        (r'"\ud800"', "invalid_json"),
        (r'{"\uDFFF": 1}', "invalid_json"),
        (r'["\ud83d\ude00", "\ud83d"]', "invalid_json"),
    ],
)
def test_parse_json_rejects_hostile_values(text: str, code: str) -> None:
    with raises(AnnotationError, code, "f") as caught:
        parse_json(text, "f")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value",
    [10**MAX_DIGITS // 10, 1e308, "\U0001f600 \u2028", [[[]]] * 1000, json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)],
)
def test_parse_json_returns_dumped_value(value: Any) -> None:
    assert parse_json(json.dumps(value), "f") == value
    assert parse_json(json.dumps(value, ensure_ascii=False), "f") == value


def test_parse_json_names_line_of_lone_surrogate() -> None:
    with raises(AnnotationError, "invalid_json", "f", 3):
        parse_json('{"a": "\\ud83d\\ude00",\n"b": 1,\n"c": "\\udbff"}', "f")


def test_parse_json_rejects_duplicate_names() -> None:
    for text in ('{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', '{"a": 1, "\\u0061": 2}'):
        with raises(AnnotationError, "invalid_json", "f", "'a'"):
            parse_json(text, "f")
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]', "f") == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize("value", [None, [], "x/1", {}, {"format": "x/2"}, {"format": ["x/1"]}])
def test_check_format_rejects_other_formats(value: Any) -> None:
    with raises(AnnotationError, "unknown_format", "f.json", "'x/1'"):
        check_format(value, "x/1", "f.json", AnnotationError, "write it again")
    check_format({"format": "x/1"}, "x/1", "f.json", AnnotationError, "write it again")
