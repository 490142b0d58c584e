"""Files of queries: what is read of a row, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.core.errors import GroundingError
from runtime.corpus.queries import Question, check_one_kind, read_questions


def test_a_row_needs_a_sentence_alone(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(
        '\ufeff{"query": "a\u2028b"}\n{"query": "c", "vid": "V", "qid": "x", "relevant_windows": [[0, 1]]}\n'
    )
    assert read_questions(path) == [Question(1, 1, "a\u2028b"), Question(2, "x", "c", "V")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{}\n", "line 1: a JSON object with a sentence"),
        ('{"query": "a"}\n\n{"query": "b"}\n', "line 2: JSON is expected"),
        ('{"query": "a", "vid": 3}\n', "vid should be"),
        ('{"query": "a", "video": "V"}\n', "called vid here, not video"),
        ('{"query": "a", "qid": 1.5}\n', "qid should be"),
        ('{"query": "a", "qid": true}\n', "qid should be"),
        ('{"query": "a", "qid": 2}\n{"query": "b"}\n', "the qid 2 is that of line 1 too"),
        ('{"query": "\\ud800"}\n', "lone surrogate"),
        ('{"query": "a", "query": "b"}\n', "line 1: .*'query'"),
        ('{"query": "a"}\n{"query": "a", "vid": "V", "vid": "W"}\n', "line 2: .*'vid'"),
        ("[" * 100_000, "line 1: the JSON nests"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(text)
    with pytest.raises(GroundingError, match=said):
        read_questions(path)


def test_a_missing_file_and_one_in_another_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(GroundingError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9"}\n')
    with pytest.raises(GroundingError, match="line 1: expected UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


def test_qids_of_two_kinds_fit_no_column() -> None:
    check_one_kind([Question(1, 1, "a"), Question(2, 2, "b")])
    check_one_kind([Question(1, "a", "a"), Question(2, "b", "b")])
    with pytest.raises(GroundingError, match="both kinds"):
        check_one_kind([Question(1, "a", "a"), Question(2, 2, "b")])
    with pytest.raises(GroundingError, match="larger than"):
        check_one_kind([Question(1, 2**63, "a")])
