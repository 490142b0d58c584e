"""Read the queries of a corpus: one JSON row per query, about one video or all videos."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from runtime.core.errors import AnnotationError, GroundingError, excerpt
from runtime.datasets.json_rows import Qid, malformed, read_rows

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
        AnnotationError: the file is missing or empty, a row is malformed, or two rows have the same `qid`.
    """
    questions: list[Question] = []
    seen: dict[Qid, int] = {}
    for number, location, row in read_rows(path):
        if not isinstance(row.get("query"), str):
            raise malformed(location, "a JSON object with a query", row, 'write {"query": "person opens the door"}')
        if "video" in row and "vid" not in row:
            # The HTTP API has the key `video`. If it were ignored, the query would be grounded in all videos.
            raise malformed(location, "the name of the video as vid", "video", "rename the key")
        qid = row.get("qid", number)
        if seen.setdefault(qid, number) != number:
            raise AnnotationError(
                f"{location}: line {seen[qid]} has the same qid {excerpt(qid)}. Use unique qids; the default of a row "
                "without one is its line number.",
                code="duplicate_query",
            )
        questions.append(Question(number, qid, row["query"], row.get("vid")))
    return questions


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
