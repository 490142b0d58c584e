"""Test `runtime.datasets.prediction_files`: rows of predictions and ground truth, valid and malformed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runtime.core.errors import AnnotationError
from runtime.datasets.prediction_files import read_predictions, read_truths
from tests.raising import raises

WINDOWS = '"pred_relevant_windows": [[1, 2.5, 0.5]]'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_read_predictions_returns_rows_and_windows_in_order(path: Path) -> None:
    rows = [
        '{"qid": 7, "vid": "v", "pred_exist_score": 1, "pred_relevant_windows": [[3, 4, 0.1], [1, 2.5, 9, 8]]}',
        '{"qid": "x", "pred_relevant_windows": [], "pred_saliency_scores": [0.5]}',
        "",
    ]
    path.write_text("\n".join(rows))
    first, second = read_predictions(path)
    assert (first.qid, first.video, first.line, first.exist_score) == (7, "v", 1, 1)
    assert first.windows.tolist() == [[3, 4, 0.1], [1, 2.5, 9]]
    assert (second.qid, second.video, second.windows.shape, second.exist_score) == ("x", None, (0, 3), None)


def test_read_predictions_accepts_scores_of_pythons_json(path: Path) -> None:
    path.write_text('{"qid": 1, "pred_relevant_windows": [[0, 1, NaN], [0, 1, Infinity], [0, 1, -Infinity]]}\n')
    nan, *infinite = read_predictions(path)[0].windows[:, 2].tolist()
    assert math.isnan(nan)
    assert infinite == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "row",
    [
        *("[1]", "7", "{}", '{"qid": 1}', f'{{"qid": null, {WINDOWS}}}', f'{{"qid": true, {WINDOWS}}}'),
        *(f'{{"qid": 1.5, {WINDOWS}}}', f'{{"qid": 1, "vid": 3, {WINDOWS}}}'),
        *(
            f'{{"qid": 1, "pred_relevant_windows": {windows}}}'
            for windows in ("null", "5", "[5]", "[[1, 2]]", '[[1, 2, "0.5"]]', "[[1, 2, true]]", "[[1, 2, null]]")
        ),
        *(
            f'{{"qid": 1, "pred_relevant_windows": {windows}}}'
            for windows in ("[[NaN, 2, 0.5]]", "[[1, Infinity, 0.5]]", '[["1", 2, 0.5]]', "[[false, 2, 0.5]]")
        ),
        *(f'{{"qid": 1, "pred_exist_score": {score}, {WINDOWS}}}' for score in ("true", '"0.5"', "NaN", "[]")),
    ],
)
def test_read_predictions_names_line_of_malformed_row(path: Path, row: str) -> None:
    path.write_text(f'{{"qid": 0, {WINDOWS}}}\n{row}\n')
    with raises(AnnotationError, "malformed_row", f"{path}, line 2"):
        read_predictions(path)


@pytest.mark.parametrize("row", ['{"qid": 1,', f'{{"qid": 1, "qid": 2, {WINDOWS}}}', "", "nan", '{"qid": 1e999}'])
def test_read_predictions_names_line_of_invalid_json(path: Path, row: str) -> None:
    path.write_text(f'{{"qid": 0, {WINDOWS}}}\n{row}\n{{"qid": 2, {WINDOWS}}}\n')
    with raises(AnnotationError, "invalid_json", f"{path}, line 2"):
        read_predictions(path)


def test_read_predictions_rejects_missing_and_empty_files(path: Path) -> None:
    with raises(AnnotationError, "missing_file", path):
        read_predictions(path)
    path.write_text("\n\n")
    with raises(AnnotationError, "empty_file", path):
        read_predictions(path)


def test_read_truths_recognizes_queries_without_moment(path: Path) -> None:
    windows = ("[[1, 2.5], [4, 3]]", "[]", "[[0, 0]]", "[[0, 0], [1, 2]]")
    path.write_text("".join(f'{{"qid": {qid}, "relevant_windows": {one}}}\n' for qid, one in enumerate(windows)))
    assert [truth.windows.tolist() for truth in read_truths(path)] == [[[1, 2.5], [4, 3]], [], [], [[0, 0], [1, 2]]]


@pytest.mark.parametrize("windows", ["null", "5", "[[1]]", "[[1, 2, 3]]", "[[1, NaN]]", '[["1", 2]]'])
def test_read_truths_rejects_other_windows(path: Path, windows: str) -> None:
    path.write_text(f'{{"qid": 1, "relevant_windows": {windows}}}\n')
    with raises(AnnotationError, "malformed_row", f"{path}, line 1"):
        read_truths(path)
    path.write_text('{"qid": 1}\n')
    with raises(AnnotationError, "malformed_row", f"{path}, line 1"):
        read_truths(path)
