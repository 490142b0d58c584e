"""Test `runtime.grounding.prediction_scores` and `runtime.evaluate --predictions-from`."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.core.errors import AnnotationError, GroundingError, OutputError
from runtime.datasets.dataset import DataSet
from runtime.datasets.prediction_files import Prediction, Truth, read_predictions, read_truths
from runtime.evaluate import evaluate
from runtime.grounding.prediction_scores import LENGTH_RANGES, PredictionScores, score_predictions, truths_of
from tests import public_evaluator
from tests.annotated import write_qvhighlights
from tests.raising import raises, records

Row = dict[str, Any]
NAN = math.nan


def predicted(qid: object, *windows: Sequence[float], **other: object) -> Row:
    return {"qid": qid, "pred_relevant_windows": [list(window) for window in windows], **other}


def annotated(qid: object, *windows: Sequence[float], **other: object) -> Row:
    return {"qid": qid, "relevant_windows": [list(window) for window in windows], **other}


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(tmp_path: Path) -> Any:
    """Return a function that writes and scores rows."""

    def scored(predictions: Sequence[Row], truths: Sequence[Row], **options: Any) -> PredictionScores:
        rows = read_predictions(write(tmp_path / "predictions.jsonl", predictions))
        return score_predictions(rows, read_truths(write(tmp_path / "truths.jsonl", truths)), **options)

    return scored


def check(score: Any, predictions: Sequence[Row], truths: Sequence[Row]) -> PredictionScores:
    """Compare the metrics of all length ranges with plain loops, and return them."""
    result = score(predictions, truths)
    for length, report in [(None, result.report), *((LENGTH_RANGES[name], one) for name, one in result.ranges.items())]:
        if report.queries:
            expected = public_evaluator.scores(predictions, truths, length)
            actual = {name: report.values[name] for name in expected}
            assert actual == pytest.approx(expected, abs=1e-12)
    return result


@pytest.fixture(scope="module")
def published(real_data: Path) -> tuple[Path, Path, Row]:
    directory = real_data / "predictions"
    if not directory.is_dir():
        pytest.skip("the published predictions are not in DRN_REAL_DATA/predictions")
    stored = json.loads((directory / "moment_detr_val_metrics.json").read_text())
    truths = real_data / "qvhighlights" / "highlight_val_release.jsonl"
    return directory / "moment_detr_val.jsonl", truths, stored


def test_published_predictions_have_the_stored_metrics(published: tuple[Path, Path, Row], tmp_path: Path) -> None:
    path, truths, stored = published
    evaluate(None, truths, predictions_from=path, output=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("full", *LENGTH_RANGES):
        values = report if name == "full" else report[name]
        expected = {f"R@1 IoU={key}": value for key, value in stored[name]["MR-R1"].items()}
        expected |= {f"mAP@{key}": value for key, value in stored[name]["MR-mAP"].items() if key != "average"}
        expected["mAP"] = stored[name]["MR-mAP"]["average"]
        assert {key: float(f"{100 * values[key]:.2f}") for key in expected} == expected
    assert report["queries"] == 1550
    assert [report[name]["queries"] for name in LENGTH_RANGES] == [429, 957, 574]


def test_published_predictions_have_the_metrics_of_qv_m2(published: tuple[Path, Path, Row]) -> None:
    # Printed by standalone_eval/eval.py of https://github.com/Zhuo-Cao/QV-M2 for these files on 2026-11-30.
    expected = {
        "G-mAP": 32.20,
        "mAP@1_tgt": 41.19,
        "mAP@2_tgt": 18.42,
        "mAP@3+tgt": 4.61,
        "mR@1": 40.52,
        "mR@2": 25.43,
        "mR@3": 21.45,
        "mIoU@1": 49.21,
        "mIoU@2": 32.88,
        "mIoU@3": 29.43,
    }
    scores = score_predictions(read_predictions(published[0]), read_truths(published[1]))
    values = scores.multi_moment.values
    assert {name: float(f"{100 * value:.2f}") for name, value in values.items()} == expected
    assert scores.rejection is None


def test_published_predictions_are_scored_within_a_second(published: tuple[Path, Path, Row]) -> None:
    predictions, truths = read_predictions(published[0]), read_truths(published[1])
    started = time.process_time()
    score_predictions(predictions, truths)
    assert time.process_time() - started < 1


def test_metrics_match_hand_computed_values(score: Any) -> None:
    truths = [annotated(1, [0, 10]), annotated(2, [0, 20], [40, 80])]
    result = check(score, [predicted(1, [0, 8, 0.9]), predicted(2, [40, 80, 0.9], [0, 5, 0.8])], truths)
    values = result.report.values
    assert values["mIoU"] == pytest.approx(0.9)
    assert (values["R@1 IoU=0.7"], values["R@1 IoU=0.85"]) == (1, 0.5)
    # One of two moments of the second query is found.
    assert values["mAP@0.75"] == 0.75
    assert [result.ranges[name].queries for name in LENGTH_RANGES] == [1, 1, 1]
    assert result.ranges["middle"].values["R@1 IoU=0.5"] == 0
    assert result.ranges["long"].values["R@1 IoU=0.5"] == 1


TEN_WRONG = [[50 + index, 60 + index, 0.5] for index in range(10)]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        # Recall counts in the order of the file, average precision in the order of the scores.
        ([[[50, 60, 0.1], [0, 10, 0.9]]], {"R@1 IoU=0.5": 0, "R@5 IoU=0.5": 1, "mAP": 1}),
        # The eleventh window does not count.
        ([[*TEN_WRONG, [0, 10, 0.9]]], {"mAP": 0}),
        # Windows are not clipped to the video.
        ([[[-10, 10, 0.5]]], {"R@1 IoU=0.5": 1, "R@1 IoU=0.55": 0, "mIoU": 0.5}),
        # Reversed windows, and a query without windows.
        ([[[10, 0, 0.5]], [[15, 0, 0.5]]], {"mAP": 0.5, "R@1 IoU=0.5": 0, "mIoU": 0}),
        ([[], [[0, 10, 1]]], {"mAP": 0.5, "R@1 IoU=0.5": 0.5}),
    ],
)
def test_unusual_windows_are_scored_as_by_the_evaluator(
    score: Any, windows: list[list[list[float]]], expected: dict[str, float]
) -> None:
    rows = [predicted(qid, *several) for qid, several in enumerate(windows)]
    values = check(score, rows, [annotated(qid, [0, 10], duration=10) for qid in range(len(rows))]).report.values
    assert {name: values[name] for name in expected} == expected


def test_repeated_query_pools_windows_and_recalls_last_row(score: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [predicted(1, *[[0, 10, 0.1]] * 11), predicted(2, [0, 10, 0.5]), predicted(1, [50, 60, 0.9])]
    with caplog.at_level(logging.WARNING, "drn"):
        result = check(score, rows, [annotated(1, [0, 10]), annotated(2, [0, 10])])
    assert (result.report.queries, result.report.values["R@1 IoU=0.5"]) == (2, 0.5)
    assert result.report.values["mAP"] == 0.75
    assert len(caplog.records) == 1


def test_integer_times_equal_floats(score: Any) -> None:
    integers = check(score, [predicted(1, [0, 7, 1])], [annotated(1, [0, 10])])
    floats = check(score, [predicted(1, [0.0, 7.0, 1.0])], [annotated(1, [0.0, 10.0])])
    assert integers.to_dict() == floats.to_dict()
    assert integers.report.values["R@1 IoU=0.7"] == 1
    # Ranges without queries are null.
    ranges = integers.to_dict()
    assert (ranges["short"]["mAP"], ranges["long"]["mAP"], ranges["long"]["queries"]) == (0.5, None, 0)


def test_length_ranges_include_their_upper_end(score: Any) -> None:
    truths = [annotated(1, [0, 10], [20, 50]), annotated(2, [0, 150], [0, 151], [5, 5])]
    rows = [predicted(1, [0, 10, 1]), predicted(2, [0, 150, 1])]
    result = check(score, rows, truths)
    assert [result.ranges[name].queries for name in LENGTH_RANGES] == [1, 1, 1]
    assert result.ranges["long"].values["mAP"] == 1


TIMES = st.integers(0, 40) | st.sampled_from([0.5, 12.25, 33.3])
SCORES = st.sampled_from([0, 0.5, 1, NAN, math.inf]) | st.floats(0, 1)
PREDICTED = st.lists(st.tuples(TIMES, TIMES, SCORES), max_size=12)
ANNOTATED = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=3)


TOUCHING = [(0, 20, 0.9), (0, 10, 0.8), (10, 20, 0.7)]


@given(st.lists(st.tuples(st.lists(PREDICTED, min_size=1, max_size=2), ANNOTATED), min_size=1, max_size=4))
@example([([[(50, 60, 0.5), (60, 70, NAN), (0, 10, 0.9)]], [(0, 10)])])
@example([([TOUCHING], [(0, 10), (10, 20)]), ([TOUCHING], [(10 * index, 10 * index + 10) for index in range(20)])])
def test_scores_equal_plain_loops(queries: list[tuple[list, list]]) -> None:
    rows = [predicted(qid, *windows) for qid, (several, _) in enumerate(queries) for windows in several]
    truths = [annotated(qid, *moments) for qid, (_, moments) in enumerate(queries) if list(moments) != [(0, 0)]]
    rows = [row for row in rows if row["qid"] in {truth["qid"] for truth in truths}]
    if truths:
        check(_score_values, rows, truths)


def _score_values(predictions: Sequence[Row], truths: Sequence[Row]) -> PredictionScores:
    import numpy as np

    rows = [
        Prediction(row["qid"], None, np.array(row["pred_relevant_windows"], np.float64).reshape(-1, 3), 1)
        for row in predictions
    ]
    return score_predictions(
        rows, [Truth(truth["qid"], None, np.array(truth["relevant_windows"], np.float64)) for truth in truths]
    )


def test_different_queries_are_refused_unless_shared_only(score: Any) -> None:
    rows = [predicted(1, [0, 10, 1]), predicted("2", [0, 10, 1])]
    truths = [annotated(1, [0, 10]), annotated(2, [0, 10]), annotated(3, [0, 10])]
    with raises(AnnotationError, "query_mismatch", 2, 3, "'2'", "--shared-only"):
        score(rows, truths)
    assert score(rows, truths, shared_only=True).report.queries == 1
    with raises(AnnotationError, "query_mismatch"):
        score([predicted(9, [0, 10, 1])], truths, shared_only=True)


def test_limit_takes_first_queries_of_ground_truth(score: Any) -> None:
    rows = [predicted(qid, [0, 10, 1]) for qid in (3, 2, 1)]
    truths = [annotated(1, [0, 10]), annotated(2, [50, 60]), annotated(3, [50, 60])]
    assert score(rows, truths, limit=1).report.values["R@1 IoU=0.5"] == 1
    assert score(rows[2:], truths, limit=1).report.queries == 1
    with raises(AnnotationError, "query_mismatch", "'x'"):
        score([*rows, predicted("x", [0, 10, 1])], truths, limit=1)


def test_video_distinguishes_repeated_ids_of_ground_truth(score: Any) -> None:
    truths = [annotated(1, [0, 10], vid="a"), annotated(1, vid="b"), annotated(2, [0, 10], vid="a")]
    rows = [predicted(qid, [0, 10, 1], vid=video) for qid, video in ((1, "b"), (1, "a"), (2, "a"))]
    result = score(rows, truths)
    assert (result.report.queries, result.rejection.without_moment, result.report.values["mAP"]) == (2, 1, 1)
    with raises(AnnotationError, "duplicate_query", 1):
        score(rows, [*truths, annotated(1, vid="b")])


@pytest.mark.parametrize(
    "row",
    [
        predicted(1, [0, 10, 0.1], [0, 10, 0.9]),
        predicted(1, [0, 10, NAN], [0, 10, 0.9]),
        predicted(1, [10, 10, 0.5]),
        predicted(1, [0, 10, 0.5], vid="b"),
        predicted(1),
    ],
)
def test_suspicious_rows_are_warned_of(score: Any, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "drn"):
        score([row], [annotated(1, [0, 10], vid="a")])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("window", [[4, 2], [3, 3], [-1, -1]])
def test_ground_truth_that_no_window_can_hit_is_a_warning(
    score: Any, window: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [predicted(1, [0, 5, 1]), predicted("two", [0, 5, 1])]
    assert score(rows, [annotated(1, [0, 5]), annotated("two", window)]).report.values["R@1 IoU=0.5"] == 0.5
    assert len(records(caplog, logging.WARNING, "'two'", code="impossible_moment")) == 1
    assert len(caplog.records) == 1


def test_equal_infinite_scores_are_sorted(score: Any, caplog: pytest.LogCaptureFixture) -> None:
    windows = [(0, 10, math.inf), (20, 30, math.inf), (0, 5, 0.5), (5, 9, -math.inf), (9, 12, -math.inf)]
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "drn"):
        warnings.simplefilter("error")
        result = check(score, [predicted(1, *windows)], [annotated(1, (0, 10))])
    assert result.report.values["R@1 IoU=0.7"] == 1
    assert not caplog.records


def test_rejection_matches_hand_computed_values(score: Any) -> None:
    truths = [annotated(1), annotated(2, [0, 0]), annotated(3), annotated(4, [0, 10]), annotated(5, [0, 10])]
    truths.append(annotated(6, [0, 20], [0, 10]))
    hit = [0, 10, 0.9]
    rows = [
        predicted(1, hit, pred_exist_score=0.49),
        predicted(2, hit, pred_exist_score=0.5),
        *(predicted(3), predicted(4, hit), predicted(5, hit, pred_exist_score=0.1)),
        predicted(6, [10, 20, 0.9], pred_exist_score=1),
    ]
    result = score(rows, truths)
    rejection = result.to_dict()["rejection"]
    assert rejection["rejection_accuracy"] == pytest.approx(2 / 3)
    assert (rejection["queries_without_moment"], rejection["wrongly_rejected"]) == (3, pytest.approx(1 / 3))
    # The last query has an IoU of exactly 0.5, which is no hit here.
    assert rejection["with_rejection"]["R@1 IoU>0.5"] == pytest.approx(1 / 3)
    assert rejection["with_rejection"]["R@1 IoU>0.3"] == pytest.approx(2 / 3)
    assert rejection["without_rejection"]["R@1 IoU>0.5"] == pytest.approx(2 / 3)
    assert result.report.queries == 3
    lower = score(rows, truths, exist_threshold=0.05).rejection
    assert (lower.accuracy, lower.wrongly_rejected) == (pytest.approx(1 / 3), 0)


def test_rejection_without_negative_queries_has_no_accuracy(score: Any) -> None:
    rejection = score([predicted(1, [0, 10, 1], pred_exist_score=0.2)], [annotated(1, [0, 10])]).to_dict()["rejection"]
    assert (rejection["rejection_accuracy"], rejection["wrongly_rejected"]) == (None, 1)
    assert score([predicted(1, [0, 10, 1])], [annotated(1, [0, 10])]).to_dict()["rejection"] is None


def test_evaluate_scores_its_own_predictions_by_query_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set = DataSet(write_qvhighlights(tmp_path / "data"))
    annotations = data_set.annotations("val")
    late = [149, 150, 0.1]
    rows = [predicted(one.name, [one.start, one.end, 0.5], late, vid=one.video) for one in annotations[::-1]]
    path = write(tmp_path / "predictions.jsonl", rows)
    report = evaluate(None, tmp_path / "data", predictions_from=path, split="val", output=tmp_path / "report.json")
    assert (report.queries, report.values["R@1 IoU=0.7"], report.values["mIoU"]) == (6, 1, 1)
    # Half of the queries have two moments, of which one is predicted.
    assert report.values["mAP"] == 0.75
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["mAP"], written["middle"]["queries"], written["long"]["mAP"]) == (0.75, 6, None)
    assert (written["predictions"], written["data"], written["split"]) == ("predictions.jsonl", "data", "val")
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[-6:] == ["mAP@0.5", "mAP@0.75", "R@5", "IoU=0.5", "R@5", "IoU=0.7"]
    assert [line.split()[0] for line in table[1:5]] == ["all", *LENGTH_RANGES]
    assert table[2].split()[-1] == "-"
    assert "mR@2" in table[6]


def test_truths_of_a_data_set_end_with_their_video(tmp_path: Path) -> None:
    about = {"vid": "v", "duration": 30}
    write(
        tmp_path / "val.jsonl", [annotated(5, [10, 40], query="a", **about), annotated(6, [1, 2], query="b", **about)]
    )
    first, second = truths_of(DataSet(tmp_path), "val", "error")
    assert (first.qid, first.video, first.windows.tolist()) == (5, "v", [[10, 30]])
    assert second.windows.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "missing_option"),
        ({"shared_only": True, "model": "drn.onnx"}, "missing_option"),
        ({"predictions_from": Path("p.jsonl"), "model": "drn.onnx"}, "conflicting_options"),
        ({"predictions_from": Path("p.jsonl"), "protocol": "drn"}, "inapplicable_option"),
        ({"predictions_from": Path("p.jsonl"), "ablation": "blind"}, "inapplicable_option"),
        ({"predictions_from": Path("p.jsonl"), "predictions": Path("q.jsonl")}, "inapplicable_option"),
        ({"predictions_from": Path("p.jsonl"), "limit": 0}, "invalid_option"),
        ({"predictions_from": Path("p.jsonl"), "exist_threshold": NAN}, "invalid_option"),
    ],
)
def test_evaluate_rejects_options_that_do_not_fit(tmp_path: Path, options: Row, code: str) -> None:
    with raises(GroundingError, code):
        evaluate(**{"model": None, "data": tmp_path, **options})


def test_evaluate_names_missing_and_malformed_files(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", [predicted(1, [0, 10])])
    with raises(AnnotationError, "missing_file", tmp_path / "truths.jsonl"):
        evaluate(None, tmp_path / "truths.jsonl", predictions_from=path)
    truths = write(tmp_path / "truths.jsonl", [annotated(1, [0, 10])])
    with raises(AnnotationError, "malformed_row", f"{path}, line 1"):
        evaluate(None, truths, predictions_from=path, output=tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_evaluate_does_not_overwrite_its_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", [predicted(1, [0, 10, 1])])
    truths = write(tmp_path / "truths.jsonl", [annotated(1, [0, 10])])
    for output in (path, truths):
        with raises(OutputError, "output_exists", output):
            evaluate(None, truths, predictions_from=path, output=output)
