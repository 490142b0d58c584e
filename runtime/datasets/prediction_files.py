"""Read predicted moments, and their ground truth, from JSON lines in the format of QVHighlights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.io.text_files import is_number
from runtime.datasets.json_rows import Qid, intervals, malformed, read_rows


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
    return [_prediction(*entry) for entry in read_rows(path, constants=True)]


def read_truths(path: Path) -> list[Truth]:
    """Read a ground-truth file with the keys `qid` and `relevant_windows`, and `vid` if present.

    A query without a matching moment has the windows [] or, as in the data of "Moment of Untruth", [[0, 0]].
    """
    truths = []
    for _, location, row in read_rows(path, constants=True):
        windows = intervals(row, "relevant_windows", location)
        matching = [] if windows == [(0, 0)] else windows
        truths.append(Truth(_qid(row, location), row.get("vid"), np.array(matching, np.float64).reshape(-1, 2)))
    return truths


def _qid(row: dict[str, Any], location: str) -> Qid:
    if "qid" not in row:
        raise malformed(location, "an integer or text as qid", None)
    return row["qid"]


def _prediction(number: int, location: str, row: dict[str, Any]) -> Prediction:
    windows = row.get("pred_relevant_windows")
    if not isinstance(windows, list) or not all(map(_is_scored, windows)):
        raise malformed(location, "pred_relevant_windows [[start, end, score], ...] in seconds", windows)
    array = np.array([window[:3] for window in windows], np.float64).reshape(-1, 3)
    exist_score = row.get("pred_exist_score")
    if exist_score is not None and not is_number(exist_score):
        raise malformed(location, "a number as pred_exist_score", exist_score)
    exist_score = None if exist_score is None else float(exist_score)
    return Prediction(_qid(row, location), row.get("vid"), array, number, exist_score)


def _is_scored(window: Any) -> bool:
    if not isinstance(window, list) or len(window) < 3:
        return False
    # The public evaluator sorts by any number, also by NaN.
    is_score = isinstance(window[2], (int, float)) and not isinstance(window[2], bool)
    return is_score and is_number(window[0]) and is_number(window[1])
