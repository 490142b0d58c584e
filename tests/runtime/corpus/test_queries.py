"""Read files of queries, and reject invalid rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.core.errors import GroundingError
from runtime.corpus.queries import Question, check_one_kind, read_questions
from tests.raising import raises


def test_query_row_requires_only_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(
        '\ufeff{"query": "a\u2028b"}\n{"query": "c", "vid": "V", "qid": "x", "relevant_windows": [[0, 1]]}\n'
    )
    assert read_questions(path) == [Question(1, 1, "a\u2028b"), Question(2, "x", "c", "V")]


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("", "empty_file", []),
        ("{}\n", "malformed_row", [1]),
        ('{"query": "a"}\n\n{"query": "b"}\n', "invalid_json", [2]),
        ('{"query": "a", "vid": 3}\n', "malformed_row", [1, "vid", 3]),
        ('{"query": "a", "video": "V"}\n', "malformed_row", [1, "vid", "video"]),
        ('{"query": "a", "qid": 1.5}\n', "malformed_row", [1, "qid", 1.5]),
        ('{"query": "a", "qid": true}\n', "malformed_row", [1, "qid", True]),
        ('{"query": "a", "qid": 2}\n{"query": "b"}\n', "duplicate_query", ["line 2", "qid 2", "line 1"]),
        ('{"query": "\\ud800"}\n', "invalid_json", [1]),
        ('{"query": "a", "query": "b"}\n', "invalid_json", [1, "'query'"]),
        ('{"query": "a"}\n{"query": "a", "vid": "V", "vid": "W"}\n', "invalid_json", [2, "'vid'"]),
        ("[" * 100_000, "nested_too_deeply", [1]),
    ],
)
def test_malformed_query_row_is_named(tmp_path: Path, text: str, code: str, values: list[object]) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(text)
    with raises(GroundingError, code, path, *values):
        read_questions(path)


def test_missing_and_non_utf8_query_files_are_named(tmp_path: Path) -> None:
    with raises(GroundingError, "missing_file", tmp_path / "none.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9"}\n')
    with raises(GroundingError, "not_utf8", tmp_path / "latin.jsonl", 1, "0xe9"):
        read_questions(tmp_path / "latin.jsonl")


def test_query_ids_of_mixed_types_are_rejected() -> None:
    check_one_kind([Question(1, 1, "a"), Question(2, 2, "b")])
    check_one_kind([Question(1, "a", "a"), Question(2, "b", "b")])
    with raises(GroundingError, "unsupported_query_ids", "--format jsonl"):
        check_one_kind([Question(1, "a", "a"), Question(2, 2, "b")])
    with raises(GroundingError, "unsupported_query_ids", "--format jsonl"):
        check_one_kind([Question(1, 2**63, "a")])
