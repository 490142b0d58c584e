"""Test `runtime.grounding.evaluation` and `runtime.evaluate`: moments of all queries of a split, and their score."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder, Video
from runtime.core.decoding import Decoding
from runtime.core.errors import FeatureError, OutputError, QueryError
from runtime.core.metrics import IOU_THRESHOLDS, metric_names
from runtime.core.pooling import ClipTiming
from runtime.core.presence import Presence
from runtime.datasets.dataset import DataSet
from runtime.evaluate import evaluate as evaluate_command
from runtime.grounding.evaluation import evaluate, predictions
from tests import public_evaluator
from tests.annotated import write_qvhighlights, write_tacos
from tests.raising import check_error, quotes, raises, records
from tests.runtime.planted import PlantedBackend

FEATURES = "C3D_unit16_overlap0.5_merged"
# Video, duration, channel of the last word, its first and last segment, and the sentence.
PLANTED = [
    ("BBBBB", 32.0, 2, (8, 15), "person dog"),
    ("AAAAA", 64.0, 3, (0, 3), "person opens the door"),
    ("CCCCC", 16.0, 1, (20, 31), "cat"),
]


@pytest.fixture
def data_set(tmp_path: Path) -> DataSet:
    """Three videos, each with a query whose moment the planted model returns, and one query that it misses."""
    (tmp_path / FEATURES).mkdir()
    lines = []
    for name, duration, channel, (first, last), sentence in PLANTED:
        features = np.zeros((256, 8), np.float32)
        features[8 * first + 1 : 8 * last + 8, channel] = 1
        np.save(tmp_path / FEATURES / f"{name}.npy", features)
        lines.append(f"{name} {first / 32 * duration} {(last + 1) / 32 * duration}##{sentence}.\n")
    # Cats are not in this video: the planted model answers with its second half, which overlaps by a third.
    lines.append("BBBBB 8.0 24.0##person cat.\n")
    (tmp_path / "Charades_sta_test.txt").write_text("".join(lines))
    (tmp_path / "Charades_sta_train.txt").write_text("AAAAA 0 8##cat.\nBBBBB 0 4##cat.\n")
    tables = {
        "Charades_duration.json": {name: duration for name, duration, *_ in PLANTED},
        "Charades_frames_info.json": {name: 2049 for name, *_ in PLANTED},
        "Charades_word2id.json": {"cat": 1, "dog": 2, "door": 3},
    }
    for name, table in tables.items():
        (tmp_path / name).write_text(json.dumps(table))
    return DataSet(tmp_path)


@pytest.fixture
def grounder() -> Grounder:
    return Grounder(PlantedBackend())


@pytest.mark.parametrize("protocol", ["mmaction2", "drn"])
def test_evaluate_matches_hand_computed_report(grounder: Grounder, data_set: DataSet, protocol: Any) -> None:
    annotations = data_set.annotations("test")
    evaluation = evaluate(grounder, data_set, annotations, protocol=protocol)
    values = evaluation.report.to_dict()
    # Three planted moments are found exactly; (0.25, 0.75) against the second half is 1/3.
    assert values["R@1 IoU=0.5"] == values["R@1 IoU=0.7"] == values["R@5 IoU=0.5"] == 0.75
    assert values["R@1 IoU=0.3"] == 1
    assert values["mIoU"] == pytest.approx((3 + 1 / 3) / 4)
    assert (values["queries"], values["protocol"]) == (4, protocol)
    np.testing.assert_array_equal(evaluation.truth, data_set.spans(annotations))


@pytest.mark.parametrize(("batch_size", "chunk_size", "reads"), [(1, 1000, 3), (3, 1000, 3), (100, 2, 4)])
def test_detections_keep_annotation_order_for_any_batch_size(
    grounder: Grounder, data_set: DataSet, monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk_size: int, reads: int
) -> None:
    monkeypatch.setattr("runtime.grounding.evaluation.CHUNK_SIZE", chunk_size)
    read: list[str] = []
    original = DataSet.video
    monkeypatch.setattr(DataSet, "video", lambda self, name: read.append(name) or original(self, name))
    progress: list[int] = []
    annotations = data_set.annotations("test")
    evaluation = evaluate(grounder, data_set, annotations, batch_size=batch_size, on_progress=progress.append)
    assert evaluation.detections[0.5][:, 0, :2].tolist() == [[0.25, 0.5], [0, 0.125], [0.625, 1], [0.5, 1]]
    assert sum(progress) == 4
    assert max(progress) <= batch_size
    # A video is read once for each chunk with queries about it.
    assert len(read) == reads


def test_evaluate_uses_segments_given_by_caller(grounder: Grounder, data_set: DataSet) -> None:
    dog = grounder.segments(data_set.video("BBBBB"))
    evaluation = evaluate(grounder, data_set, data_set.annotations("test"), segments_of=lambda name: dog)
    # The moment of the dog is the only one in these segments.
    assert evaluation.detections[0.5][:, 0, 0].tolist() == [0.25, 0.5, 0.5, 0.5]


def test_protocol_defaults_to_the_model(data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    authors = Grounder(PlantedBackend(Decoding(protocol="drn")))
    assert evaluate(authors, data_set, annotations).report.protocol == "drn"
    assert evaluate(authors, data_set, annotations, protocol="mmaction2").report.protocol == "mmaction2"


def test_drn_protocol_applies_nms_per_threshold(data_set: DataSet) -> None:
    def propose_two(heads: Any) -> None:
        """Propose (0.5, 1) and, with a lower score, (0.5, 0.78), whose overlap is 0.56."""
        heads.matching_logits[:] = -9
        heads.matching_logits[:, 18:20] = 3, 1
        heads.boundary_distances[:, 18] = 2.5, 13.5
        heads.boundary_distances[:, 19] = 3.5, 5.5

    grounder = Grounder(PlantedBackend(after=propose_two))
    annotations = data_set.annotations("test")
    authors = evaluate(grounder, data_set, annotations, protocol="drn").detections
    counts = {threshold: int((~np.isnan(rows[0, :, 0])).sum()) for threshold, rows in authors.items()}
    assert counts == {0.3: 1, 0.5: 1, 0.7: 2}
    published = evaluate(grounder, data_set, annotations, protocol="mmaction2").detections
    np.testing.assert_array_equal(published[0.3], published[0.7])
    assert {int((~np.isnan(rows[0, :, 0])).sum()) for rows in published.values()} == {2}


def test_predictions_are_moments_in_seconds(grounder: Grounder, data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    evaluation = evaluate(grounder, data_set, annotations)
    rows = list(predictions(evaluation, annotations, data_set))
    assert [set(row) for row in rows] == [{"qid", "query", "vid", "pred_relevant_windows"}] * 4
    assert [row["qid"] for row in rows] == [1, 2, 3, 4]
    (start, end, score), (second, *_) = rows[0]["pred_relevant_windows"]
    assert (start, end, second) == (8, 16, 16)
    assert 0 < score < 1
    first = predictions(evaluation, annotations, data_set, top_k=1)
    assert [len(row["pred_relevant_windows"]) for row in first] == [1] * 4


def test_predictions_have_exist_score_of_a_model_with_threshold(grounder: Grounder, data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    evaluation = evaluate(grounder, data_set, annotations)
    best = [row["pred_relevant_windows"][0][2] for row in predictions(evaluation, annotations, data_set)]
    presence = Presence(best[0], 0.9, 0.8, 100, 500)
    # No location of the second query is likely, and the third was not run.
    evaluation.detections[0.5][1] = np.nan
    evaluation.detections[0.5][1, 0] = (0, 1, 1)
    evaluation.detections[0.5][2] = np.nan
    rows = list(predictions(evaluation, annotations, data_set, presence=presence))
    scores = [row["pred_exist_score"] for row in rows]
    assert scores == [0.5, 0, 0, presence.exist_score(best[3])]
    assert [bool(row["pred_relevant_windows"]) for row in rows] == [True, True, False, True]


def test_predictions_have_the_report_by_the_public_evaluator(tmp_path: Path) -> None:
    data_set = DataSet(write_qvhighlights(tmp_path / "data"))
    annotations = data_set.annotations("val")
    evaluation = evaluate(Grounder(PlantedBackend()), data_set, annotations, protocol="drn")
    rows = json.loads(json.dumps(list(predictions(evaluation, annotations, data_set)), allow_nan=False))
    truths = [json.loads(line) for line in data_set.annotations_path("val").read_text().splitlines()]
    # Several moments may be correct.
    assert any(len(truth["relevant_windows"]) > 1 for truth in truths)
    names = ("qid", "vid", "query")
    assert [[row[name] for name in names] for row in rows] == [[truth[name] for name in names] for truth in truths]
    for row, truth in zip(rows, truths, strict=True):
        windows = row["pred_relevant_windows"]
        assert all(0 <= start <= end <= truth["duration"] for start, end, _ in windows)
        assert windows == sorted(windows, key=lambda window: -window[2])
    expected = public_evaluator.scores(rows, truths)
    for threshold in (0.5, 0.7):
        name = f"R@1 IoU={threshold}"
        assert evaluation.report.values[name] == pytest.approx(expected[name])


def test_report_uses_thresholds_of_the_data_set(tmp_path: Path) -> None:
    data_set = DataSet(write_tacos(tmp_path / "data"))
    (tmp_path / "data" / "features").mkdir()
    for name in data_set.durations:
        np.save(tmp_path / "data" / "features" / f"{name}.npy", np.eye(60, 8, dtype=np.float32))
    backend = PlantedBackend(Decoding(num_segments=128))
    for protocol in ("mmaction2", "drn"):
        evaluation = evaluate(Grounder(backend), data_set, data_set.annotations("test"), protocol=protocol)
        assert set(evaluation.detections) == {0.1, 0.3, 0.5, 0.7}
        assert tuple(evaluation.report.values) == metric_names((0.1, 0.3, 0.5, 0.7))


def test_unknown_words_are_warned_once(grounder: Grounder, data_set: DataSet, caplog: pytest.LogCaptureFixture) -> None:
    lines = data_set.annotations_path("test").read_text().replace("person", "zebra")
    data_set.annotations_path("test").write_text(lines)
    evaluate(grounder, data_set, data_set.annotations("test"))
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert records(caplog, logging.WARNING, "'zebra', 'the'") == warnings


def test_invalid_query_fails_at_once(grounder: Grounder, data_set: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = data_set.annotations("test")
    bad = [*annotations, dataclasses.replace(annotations[0], sentence="dog " * 9, line=41)]
    monkeypatch.setattr(DataSet, "video", lambda *_: pytest.fail("a video was read"))
    with raises(QueryError, "query_too_long", 41, annotations[0].video, 9):
        evaluate(grounder, data_set, bad)


@pytest.fixture
def scored(
    tiny_model: Path, mini: Path, tmp_path: Path, run_command: Any
) -> Callable[..., tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return a function that evaluates a model, and returns the printed text, the report and the predictions."""
    numbers = itertools.count()

    def run(*options: object, model: Path = tiny_model) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
        output = tmp_path / f"{next(numbers)}.json"
        files = ("--output", output, "--predictions", output.with_suffix(".jsonl"))
        outcome = run_command(evaluate_command, "--model", model, "--data", mini, *files, *options)
        rows = [json.loads(row) for row in output.with_suffix(".jsonl").read_text().splitlines()]
        return outcome.out, json.loads(output.read_text()), rows

    return run


def test_evaluate_reports_model_and_prior(scored: Any, tmp_path: Path) -> None:
    text, report, rows = scored()
    head, model, prior, line = text.splitlines()
    assert head.split()[:4] == ["R@1", "IoU=0.5", "R@1", "IoU=0.7"]
    assert model.startswith("tiny.onnx ")
    assert prior.startswith("prior (constant moments) ")
    assert line == "5 queries of test, protocol mmaction2, percent."
    names = metric_names(IOU_THRESHOLDS)
    assert set(names) < set(report)
    assert set(report["prior"]) == {*names, "queries", "protocol"}
    assert (report["queries"], report["protocol"], report["simulated_features"]) == (5, "mmaction2", False)
    assert f"{100 * report['mIoU']:.2f}" in model
    assert f"{100 * report['prior']['mIoU']:.2f}" in prior
    assert [row["vid"] for row in rows] == ["AAAA1", "AAAA1", "BBBB2", "CCCC3", "DDDD4"]
    assert not list(tmp_path.glob(".*"))


def test_evaluate_counts_fallback_answers(scored: Any, write_model: Callable[..., Path], tmp_path: Path) -> None:
    text, _, rows = scored(model=write_model(tmp_path / "never.onnx", decoding=Decoding(score_threshold=0.999)))
    best = [row["pred_relevant_windows"][0] for row in rows]
    count = sum(start == 0 and score == 1 for start, _, score in best)
    assert 0 < count < 5
    assert f"{count} of them have no location above the threshold; their moment is the complete video." in text


def test_evaluate_shows_results_of_checkpoint(scored: Any, write_model: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model(tmp_path / "published.onnx", sources={"renamed.pth": "ec0429a6" + "0" * 56})
    text, report, _ = scored(model=model)
    assert quotes(text, "47.04", "84.57", "3720", "mmaction2")
    assert report["published"]["percent"]["R@1 IoU=0.5"] == 47.04


def test_evaluate_reports_simulated_features(scored: Any, mini: Path) -> None:
    (mini / "simulated.json").write_text("{}")
    text, report, _ = scored("--limit", 2)
    assert "features are simulated" in text
    assert "2 queries of test" in text
    assert report["simulated_features"] is True


def test_evaluate_output_not_finite_names_features(overflowing: Grounder, mini: Path) -> None:
    data_set = DataSet(mini)
    with raises(FeatureError, "features_out_of_scale"):
        evaluate(overflowing, data_set, data_set.annotations("test"))


def test_evaluate_unknown_words_are_a_miss(scored: Any, mini: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = mini / "Charades_sta_test.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].split("##")[0] + "##zorbs frimly", *lines]) + "\n")
    _, report, rows = scored()
    assert records(caplog, logging.WARNING, "zorbs frimly")
    assert [bool(row["pred_relevant_windows"]) for row in rows] == [False] + len(lines) * [True]
    assert report["queries"] == len(lines) + 1


def test_ablations_change_the_video(scored: Any, tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grounder, data_set = Grounder.load(tiny_model), DataSet(mini)
    best: dict[str, list[Any]] = {}
    for ablation in ("none", "blind", "shuffled"):
        _, _, rows = scored("--ablation", ablation)
        windows = [(row["pred_relevant_windows"][0], data_set.durations[row["vid"]]) for row in rows]
        best[ablation] = [(start / duration, end / duration) for (start, end, _), duration in windows]
    # Constant features are rejected outside of the ablation.
    monkeypatch.setattr("runtime.core.video.check_varies", lambda *_: None)
    for index, annotation in enumerate(data_set.annotations("test")):
        zeros = np.zeros_like(data_set.video(annotation.video).features)
        moment = grounder.ground(Video(zeros, 900, 30.0, counted=ClipTiming()), annotation.sentence)[0]
        assert best["blind"][index] == pytest.approx((moment.start / 30, moment.end / 30))
        assert best["shuffled"][index] != best["none"][index] != best["blind"][index]


def test_evaluate_invalid_input_is_rejected(
    tiny_model: Path, mini: Path, golden: Path, tmp_path: Path, refused: Any
) -> None:
    model, data, gone, nested = ("--model", tiny_model), ("--data", mini), tmp_path / "gone", tmp_path / "file/r.json"
    (tmp_path / "file").write_text("a file")
    before = sorted(tmp_path.iterdir())
    report = ("--output", tmp_path / "r.json")
    wrong: list[tuple[tuple[object, ...], str, list[object]]] = [
        (("--model", "gone.onnx", *data), "missing_file", ["gone.onnx"]),
        ((*model, "--data", gone), "missing_file", [gone]),
        ((*model, *data, "--split", "val"), "missing_split", ["'val'"]),
        ((*model, *data, "--limit", 0), "invalid_option", ["--limit", 0]),
        ((*model, *data, "--batch-size", 0), "invalid_option", ["--batch-size", 0]),
        ((*model, *data, "--output", nested), "unwritable_output", [nested]),
        ((*model, *data, "--predictions", nested), "unwritable_output", [nested]),
        ((*model, "--data", golden / "mini", *report), "impossible_moment", ["Charades_sta_test.txt", "line 6", 12]),
    ]
    for arguments, code, values in wrong:
        check_error(refused(evaluate_command, *arguments), code, *values)
    assert sorted(tmp_path.iterdir()) == before


def test_evaluation_files_are_written_before_printing(
    tiny_model: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    output, rows = tmp_path / "r.json", tmp_path / "p.jsonl"
    with pytest.raises(BrokenPipeError):
        evaluate_command(tiny_model, mini, limit=2, output=output, predictions=rows)
    assert json.loads(output.read_text())["queries"] == len(rows.read_text().splitlines()) == 2


@pytest.mark.parametrize("option", ["output", "predictions"])
def test_reports_do_not_overwrite_input_files(option: str, data_set: DataSet, tiny_model: Path) -> None:
    read = [*data_set.files, data_set.feature_path("BBBBB"), tiny_model]
    assert {path.name for path in read} >= {"Charades_sta_test.txt", "Charades_sta_train.txt", "Charades_word2id.json"}
    for path in read:
        before = path.read_bytes()
        with pytest.raises(OutputError):
            evaluate_command(tiny_model, data_set.root, **{option: path})
        assert path.read_bytes() == before
