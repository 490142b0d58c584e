"""Read predicted moments, and their ground truth, from JSON lines in the format of QVHighlights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import numpy as np

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import is_number, parse_json, read_lines

Qid = Union[int, str]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row of a prediction file.

    Attributes:
        video: name of the video, if the row has one.
        windows: (K, 3) float64 start and end in seconds, and score, in the order of the file.
        line: line number, from 1.
        exist_score: whether the video shows the query at all, the higher the likelier; None if the row has none.
    """

    qid: Qid
    video: str | None
    windows: np.ndarray
    line: int
    exist_score: float | None = None


@dataclasses.dataclass(frozen=True)
class Truth:
    """The ground truth of a query.

    Attributes:
        windows: (W, 2) float64 starts and ends in seconds; W is 0 for a query that no moment of the video matches.
    """

    qid: Qid
    video: str | None
    windows: np.ndarray


def read_predictions(path: Path) -> list[Prediction]:
    """Read a prediction file with the keys `qid` and `pred_relevant_windows`.

    Rows may have a `vid` and a `pred_exist_score`; other keys are ignored. Scores of windows may be NaN or infinite, as
    in the JSON that Python writes.

    Raises:
        AnnotationError: the file is missing or empty, or a row is malformed.
    """
    return [_prediction(row, number, source) for row, number, source in _rows(path, "The prediction file")]


def read_truths(path: Path) -> list[Truth]:
    """Read a ground-truth file with the keys `qid` and `relevant_windows`, and `vid` if present.

    A query without a matching moment has the windows [] or, as in the data of "Moment of Untruth", [[0, 0]].
    """
    return [_truth(row, source) for row, _, source in _rows(path, "The ground-truth file")]


def _rows(path: Path, description: str) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Yield each row with its line number and its location for messages."""
    check_file(path, description, AnnotationError)
    lines = read_lines(path, "a JSON object a line")
    if not lines:
        raise AnnotationError(f"{path} is empty. Write one JSON object per query and line.", code="empty_file")
    for number, line in enumerate(lines, 1):
        source = f"{path}, line {number}"
        row = parse_json(line, source, advice="correct the line", constants=True)
        if not isinstance(row, dict):
            raise _malformed(source, "a JSON object", row)
        qid, video = row.get("qid"), row.get("vid")
        if not isinstance(qid, (int, str)) or isinstance(qid, bool):
            raise _malformed(source, "an integer or text as qid", qid)
        if video is not None and not isinstance(video, str):
            raise _malformed(source, "the name of a video as vid", video)
        yield row, number, source


def _prediction(row: dict[str, Any], number: int, source: str) -> Prediction:
    windows = row.get("pred_relevant_windows")
    if not isinstance(windows, list) or not all(map(_is_scored, windows)):
        raise _malformed(source, "pred_relevant_windows [[start, end, score], ...] in seconds", windows)
    array = np.array([window[:3] for window in windows], np.float64).reshape(-1, 3)
    exist_score = row.get("pred_exist_score")
    if exist_score is not None and not is_number(exist_score):
        raise _malformed(source, "a number as pred_exist_score", exist_score)
    return Prediction(row["qid"], row.get("vid"), array, number, None if exist_score is None else float(exist_score))


def _is_scored(window: Any) -> bool:
    if not isinstance(window, list) or len(window) < 3:
        return False
    # The public evaluator sorts by any number, also by NaN.
    is_score = isinstance(window[2], (int, float)) and not isinstance(window[2], bool)
    return is_score and is_number(window[0]) and is_number(window[1])


def _truth(row: dict[str, Any], source: str) -> Truth:
    windows = row.get("relevant_windows")
    is_valid = isinstance(windows, list) and all(
        isinstance(window, list) and len(window) == 2 and all(map(is_number, window)) for window in windows
    )
    if not is_valid or windows is None:
        raise _malformed(source, "relevant_windows [[start, end], ...] in seconds", windows)
    matching = [] if windows == [[0, 0]] else windows
    return Truth(row["qid"], row.get("vid"), np.array(matching, np.float64).reshape(-1, 2))


def _malformed(source: str, expected: str, actual: object) -> AnnotationError:
    return AnnotationError(
        f"{source}: expected {expected}, got {excerpt(actual)}. Correct the line.", code="malformed_row"
    )
