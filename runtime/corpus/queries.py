"""Read the queries of a corpus: one JSON row per query, about one video or all videos."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Union

from runtime.core.errors import AnnotationError, GroundingError, QueryError, excerpt
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import parse_json, read_lines

Qid = Union[int, str]
# Integers of a Parquet column.
LARGEST_INTEGER = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Question:
    """A sentence of the file of queries.

    Attributes:
        line: its number in the file, from 1.
        qid: its own name, or the line.
        query: the sentence, as written.
        video: which video it is about; None for every video.
    """

    line: int
    qid: Qid
    query: str
    video: str | None = None


def read_questions(path: Path) -> list[Question]:
    """Return the rows of a JSONL file: `{"query", "vid", "qid"}`, of which the sentence alone is needed.

    Without `vid` a sentence is asked of every video, and without `qid` it is called by its line. Other keys are left
    alone, so that the annotations of QVHighlights are such a file.

    Raises:
        AnnotationError: the file is missing or empty, or a row is malformed or named as another one.
    """
    check_file(path, "The file of queries", AnnotationError)
    questions: list[Question] = []
    seen: dict[Qid, int] = {}
    for number, text in enumerate(read_lines(path, "queries, a JSON object a line"), 1):
        question = _question(text, number, f"{path}, line {number}")
        if seen.setdefault(question.qid, number) != number:
            raise AnnotationError(
                f"{path}, line {number}: the qid {excerpt(question.qid)} is that of line {seen[question.qid]} too; "
                "every query has its own (a row without one is called by its line).",
                code="duplicate_query",
            )
        questions.append(question)
    if not questions:
        raise QueryError(
            f'{path} is empty; a row a line is expected: {{"query": "person opens the door"}}.', code="empty_file"
        )
    return questions


def _question(text: str, number: int, location: str) -> Question:
    row: Any = parse_json(text, location, advice="correct the line")
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise AnnotationError(
            f'{location}: a JSON object with a sentence is expected, {{"query": "person opens the door"}}.',
            code="malformed_row",
        )
    if "video" in row and "vid" not in row:
        # As the HTTP API calls it: left alone, the sentence would be asked of every video.
        raise AnnotationError(
            f"{location}: the video of a sentence is called vid here, not video; rename the key.", code="malformed_row"
        )
    video, qid = row.get("vid"), row.get("qid", number)
    if video is not None and not isinstance(video, str):
        raise AnnotationError(
            f"{location}: vid should be the name of a video, or be left out, and is {excerpt(video)}.",
            code="malformed_row",
        )
    if not isinstance(qid, (int, str)) or isinstance(qid, bool):
        raise AnnotationError(
            f"{location}: qid should be a number or text, and is {excerpt(qid)}.", code="malformed_row"
        )
    return Question(number, qid, row["query"], video)


def check_one_kind(questions: list[Question]) -> None:
    """Raise GroundingError unless one Parquet column can hold all qids."""
    kinds = {type(question.qid) for question in questions}
    if len(kinds) > 1:
        raise GroundingError(
            "A Parquet column holds numbers or text, and these queries have qids of both kinds; write --format jsonl.",
            code="unsupported_query_ids",
        )
    if kinds == {int} and max(abs(int(question.qid)) for question in questions) > LARGEST_INTEGER:
        raise GroundingError(
            "A qid is larger than a Parquet column can hold; write --format jsonl.", code="unsupported_query_ids"
        )
