"""Read the queries of a corpus: one JSON row per query, about one video or all videos."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Union

from runtime.core.errors import AnnotationError, GroundingError, QueryError, excerpt
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import parse_json, read_lines

Qid = Union[int, str]
# Largest integer of a Parquet column.
MAX_INTEGER = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Question:
    """A row of the file of queries.

    Attributes:
        line: line number, from 1.
        qid: identifier of the query; by default its line number.
        video: name of its video; None for all videos.
    """

    line: int
    qid: Qid
    query: str
    video: str | None = None


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file with the keys `query`, `vid` and `qid`.

    A query without `vid` is grounded in all videos, and the default of `qid` is the line number. Other keys are
    ignored, so that the annotations of QVHighlights are a valid file.

    Raises:
        AnnotationError: the file is missing, a row is malformed, or two rows have the same `qid`.
        QueryError: the file is empty.
    """
    check_file(path, "The file of queries", AnnotationError)
    questions: list[Question] = []
    seen: dict[Qid, int] = {}
    for number, text in enumerate(read_lines(path, "queries, a JSON object a line"), 1):
        question = _question(text, number, f"{path}, line {number}")
        if seen.setdefault(question.qid, number) != number:
            raise AnnotationError(
                f"{path}, line {number}: line {seen[question.qid]} has the same qid {excerpt(question.qid)}. Use "
                "unique qids; the default of a row without one is its line number.",
                code="duplicate_query",
            )
        questions.append(question)
    if not questions:
        raise QueryError(
            f'{path} is empty. Write one JSON object per line, {{"query": "person opens the door"}}.', code="empty_file"
        )
    return questions


def _question(text: str, number: int, source: str) -> Question:
    row: Any = parse_json(text, source, advice="correct the line")
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        raise AnnotationError(
            f"{source}: expected a JSON object with a query, got {excerpt(row)}. Write "
            '{"query": "person opens the door"}.',
            code="malformed_row",
        )
    if "video" in row and "vid" not in row:
        # The HTTP API has the key `video`. If it were ignored, the query would be grounded in all videos.
        raise AnnotationError(
            f"{source}: expected the name of the video as vid, got video. Rename the key.", code="malformed_row"
        )
    video, qid = row.get("vid"), row.get("qid", number)
    if video is not None and not isinstance(video, str):
        raise AnnotationError(
            f"{source}: expected the name of a video as vid, got {excerpt(video)}. Correct vid, or leave it out for "
            "all videos.",
            code="malformed_row",
        )
    if not isinstance(qid, (int, str)) or isinstance(qid, bool):
        raise AnnotationError(
            f"{source}: expected an integer or text as qid, got {excerpt(qid)}. Correct qid, or leave it out.",
            code="malformed_row",
        )
    return Question(number, qid, row["query"], video)


def check_one_kind(questions: list[Question]) -> None:
    """Raise GroundingError unless one Parquet column can store all qids: all texts, or all integers of 64 bits."""
    kinds = {type(question.qid) for question in questions}
    if len(kinds) > 1:
        raise GroundingError(
            "The queries have integers and texts as qids, which a Parquet column cannot store. Pass --format jsonl.",
            code="unsupported_query_ids",
        )
    if kinds == {int} and max(abs(int(question.qid)) for question in questions) > MAX_INTEGER:
        raise GroundingError(
            "A qid exceeds the range of a Parquet column. Pass --format jsonl.", code="unsupported_query_ids"
        )
