"""`runtime.grounding.evaluation` and `runtime.evaluate`: every question of a split, and the score of the answers."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder, Video
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.core.decoding import Decoding
from runtime.core.errors import FeatureError, GroundingError, OutputError
from runtime.core.metrics import METRICS, metric_names
from runtime.core.pooling import ClipTiming
from runtime.core.presence import Presence
from runtime.datasets.dataset import DataSet
from runtime.evaluate import evaluate as evaluate_command
from runtime.grounding.evaluation import evaluate, predictions
from tests.annotated import write_qvhighlights, write_tacos
from tests.raising import check_error, quotes, raises, records

FEATURES = "C3D_unit16_overlap0.5_merged"
# Video, duration, word, where it happens in 32nds, and the sentence asked.
PLANTED = [
    ("BBBBB", 32.0, 2, (8, 15), "person dog"),
    ("AAAAA", 64.0, 3, (0, 3), "person opens the door"),
    ("CCCCC", 16.0, 1, (20, 31), "cat"),
]


@pytest.fixture
def data_set(tmp_path: Path) -> DataSet:
    """Three videos asked for what happens in them, in test; one of the answers cannot be found."""
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
def grounder(planted_backend: Any) -> Grounder:
    return Grounder(planted_backend())


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


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1000), (2, 1000), (3, 1000), (100, 1000), (100, 2)])
def test_detections_keep_annotation_order_for_any_batch_and_chunk_size(
    grounder: Grounder, data_set: DataSet, monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk_size: int
) -> None:
    monkeypatch.setattr("runtime.grounding.evaluation.CHUNK_SIZE", chunk_size)
    seen: list[int] = []
    annotations = data_set.annotations("test")
    evaluation = evaluate(grounder, data_set, annotations, batch_size=batch_size, on_progress=seen.append)
    assert evaluation.detections[0.5][:, 0, :2].tolist() == [[0.25, 0.5], [0, 0.125], [0.625, 1], [0.5, 1]]
    assert sum(seen) == 4
    assert max(seen) <= batch_size


def test_evaluation_reads_each_video_once(
    grounder: Grounder, data_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = DataSet.video
    monkeypatch.setattr(DataSet, "video", lambda self, name: read.append(name) or original(self, name))
    evaluate(grounder, data_set, data_set.annotations("test"))
    assert sorted(read) == ["AAAAA", "BBBBB", "CCCCC"]


def test_evaluate_uses_segments_given_by_caller(grounder: Grounder, data_set: DataSet) -> None:
    dog = grounder.segments(data_set.video("BBBBB"))
    evaluation = evaluate(grounder, data_set, data_set.annotations("test"), segments_of=lambda name: dog)
    # Only the dog is in it now.
    assert evaluation.detections[0.5][:, 0, 0].tolist() == [0.25, 0.5, 0.5, 0.5]


def test_protocol_defaults_to_the_model(planted_backend: Any, data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    authors = Grounder(planted_backend(Decoding(protocol="drn")))
    assert evaluate(authors, data_set, annotations).report.protocol == "drn"
    assert evaluate(authors, data_set, annotations, protocol="mmaction2").report.protocol == "mmaction2"


def test_drn_protocol_applies_nms_per_threshold(planted_backend: Any, data_set: DataSet) -> None:
    backend = planted_backend()

    class Doubled:
        """Proposes (0.5, 1) and, less surely, (0.5, 0.78), whose overlap is 0.56."""

        manifest = backend.manifest

        def run(self, batch: Any) -> Any:
            heads = backend.run(batch)
            heads.matching_logits[:] = -9
            heads.matching_logits[:, 18:20] = 3, 1
            heads.boundary_distances[:, 18] = 2.5, 13.5
            heads.boundary_distances[:, 19] = 3.5, 5.5
            return heads

    annotations = data_set.annotations("test")
    authors = evaluate(Grounder(Doubled()), data_set, annotations, protocol="drn").detections
    counts = {threshold: int((~np.isnan(rows[0, :, 0])).sum()) for threshold, rows in authors.items()}
    assert counts == {0.3: 1, 0.5: 1, 0.7: 2}
    published = evaluate(Grounder(Doubled()), data_set, annotations, protocol="mmaction2").detections
    np.testing.assert_array_equal(published[0.3], published[0.7])
    assert {int((~np.isnan(rows[0, :, 0])).sum()) for rows in published.values()} == {2}


def test_predictions_are_in_qvhighlights_format_in_seconds(grounder: Grounder, data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    rows = list(predictions(evaluate(grounder, data_set, annotations), annotations, data_set))
    assert [set(row) for row in rows] == [{"qid", "query", "vid", "pred_relevant_windows"}] * 4
    assert [row["qid"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["query"] == "person dog."
    assert rows[0]["vid"] == "BBBBB"
    (start, end, score), (second, *_) = rows[0]["pred_relevant_windows"]
    assert (start, end, second) == (8, 16, 16)
    assert 0 < score < 1
    json.dumps(rows, allow_nan=False)
    first = predictions(evaluate(grounder, data_set, annotations), annotations, data_set, top_k=1)
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


def overlap(a: list[float], b: list[float]) -> float:
    """Temporal IoU of two windows, as a textbook has it."""
    inside = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return inside / (a[1] - a[0] + b[1] - b[0] - inside)


def test_predictions_follow_public_qvhighlights_format(tmp_path: Path, planted_backend: Any) -> None:
    # Its rules: every qid of the ground truth and no other; one window or more, of start, end and score, of which the
    # first is the answer; a hit is an overlap, with the window that fits best, of at least the threshold.
    # Source: standalone_eval/eval.py of moment_detr (Lei et al., 2021).
    data_set = DataSet(write_qvhighlights(tmp_path / "data"))
    annotations = data_set.annotations("val")
    evaluation = evaluate(Grounder(planted_backend()), data_set, annotations, protocol="drn")
    rows = list(predictions(evaluation, annotations, data_set))
    truth = [json.loads(line) for line in data_set.annotations_path("val").read_text().splitlines()]
    assert {row["qid"] for row in rows} == {row["qid"] for row in truth}
    assert len({type(row["qid"]) for row in (*rows, *truth)}) == 1
    best = []
    for row, expected in zip(json.loads(json.dumps(rows, allow_nan=False)), truth, strict=True):
        windows = row["pred_relevant_windows"]
        assert windows
        assert all(len(window) == 3 and 0 <= window[0] <= window[1] <= expected["duration"] for window in windows)
        scores = [window[2] for window in windows]
        assert scores == sorted(scores, reverse=True)
        assert (row["vid"], row["query"]) == (expected["vid"], expected["query"])
        best.append(max(overlap(windows[0], moment) for moment in expected["relevant_windows"]))
    assert any(len(expected["relevant_windows"]) > 1 for expected in truth)
    assert max(best) > 0
    for threshold in (0.3, 0.5, 0.7):
        recall = sum(value >= threshold for value in best) / len(best)
        assert evaluation.report.values[f"R@1 IoU={threshold:g}"] == pytest.approx(recall)
    assert evaluation.report.values["mIoU"] == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_report_uses_thresholds_of_the_data_set(tmp_path: Path, planted_backend: Any) -> None:
    data_set = DataSet(write_tacos(tmp_path / "data"))
    (tmp_path / "data" / "features").mkdir()
    for name in data_set.durations:
        np.save(tmp_path / "data" / "features" / f"{name}.npy", np.eye(60, 8, dtype=np.float32))
    backend = planted_backend(Decoding(num_segments=128))
    for protocol in ("mmaction2", "drn"):
        evaluation = evaluate(Grounder(backend), data_set, data_set.annotations("test"), protocol=protocol)
        assert set(evaluation.detections) == {0.1, 0.3, 0.5, 0.7}
        assert tuple(evaluation.report.values) == metric_names((0.1, 0.3, 0.5, 0.7))


def test_unknown_words_of_a_split_are_warned_of_once(
    grounder: Grounder, data_set: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    lines = data_set.annotations_path("test").read_text().replace("person", "zebra")
    data_set.annotations_path("test").write_text(lines)
    evaluate(grounder, data_set, data_set.annotations("test"))
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert records(caplog, logging.WARNING, "'zebra', 'the'")


def test_invalid_query_fails_before_reading_videos(
    grounder: Grounder, data_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.core.errors import QueryError

    annotations = data_set.annotations("test")
    bad = [*annotations, dataclasses.replace(annotations[0], sentence="dog " * 9, line=41)]
    monkeypatch.setattr(DataSet, "video", lambda *_: pytest.fail("a video was read"))
    with raises(QueryError, "query_too_long", 41, annotations[0].video, 9):
        evaluate(grounder, data_set, bad)


# The command


@pytest.fixture
def scored(tiny_model: Path, mini: Path, tmp_path: Path, run_command: Callable[..., Any]) -> Any:
    return run_command(
        evaluate_command,
        *("--model", tiny_model, "--data", mini),
        *("--output", tmp_path / "report.json", "--predictions", tmp_path / "p.jsonl"),
    )


def test_evaluate_reports_model_and_prior(scored: Any, tmp_path: Path) -> None:
    assert scored.code == 0
    head, model, prior, line = scored.out.splitlines()
    assert head.split()[:4] == ["R@1", "IoU=0.5", "R@1", "IoU=0.7"]
    assert model.startswith("tiny.onnx ")
    assert prior.startswith("prior (constant moments) ")
    assert line == "5 queries of test, protocol mmaction2, percent."
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(METRICS) < set(report)
    assert set(report["prior"]) == {*METRICS, "queries", "protocol"}
    assert (report["queries"], report["protocol"], report["simulated_features"]) == (5, "mmaction2", False)
    assert f"{100 * report['mIoU']:.2f}" in model
    assert f"{100 * report['prior']['mIoU']:.2f}" in prior
    rows = [json.loads(row) for row in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["vid"] for row in rows] == ["AAAA1", "AAAA1", "BBBB2", "CCCC3", "DDDD4"]
    assert not list(tmp_path.glob(".*"))


def test_evaluate_counts_fallback_answers(
    write_graph: Callable[..., Path],
    tiny_manifest: Manifest,
    mini: Path,
    tmp_path: Path,
    run_command: Callable[..., Any],
) -> None:
    never = dataclasses.replace(
        tiny_manifest, decoding=dataclasses.replace(tiny_manifest.decoding, score_threshold=0.999)
    )
    model = write_graph(tmp_path / "never.onnx", {METADATA_KEY: never.to_json()})
    outcome = run_command(evaluate_command, "--model", model, "--data", mini, "--predictions", tmp_path / "p.jsonl")
    windows = [json.loads(row)["pred_relevant_windows"] for row in (tmp_path / "p.jsonl").read_text().splitlines()]
    whole = sum(actual[0][0] == 0 and actual[0][2] == 1 for actual in windows)
    assert 0 < whole < 5
    assert f"{whole} of them have no location above the threshold; their moment is the complete video." in outcome.out


def test_evaluate_shows_published_results_of_the_checkpoint(
    write_graph: Callable[..., Path],
    tiny_manifest: Manifest,
    mini: Path,
    tmp_path: Path,
    run_command: Callable[..., Any],
) -> None:
    published = dataclasses.replace(tiny_manifest, sources={"renamed.pth": "ec0429a6" + "0" * 56})
    model = write_graph(tmp_path / "published.onnx", {METADATA_KEY: published.to_json()})
    outcome = run_command(evaluate_command, "--model", model, "--data", mini, "--output", tmp_path / "r.json")
    assert quotes(outcome.out, "47.04", "84.57", "3720", "mmaction2")
    assert json.loads((tmp_path / "r.json").read_text())["published"]["percent"]["R@1 IoU=0.5"] == 47.04


def test_evaluate_reports_simulated_features(
    tiny_model: Path, mini: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    (mini / "simulated.json").write_text("{}")
    outcome = run_command(
        evaluate_command, "--model", tiny_model, "--data", mini, "--output", tmp_path / "r.json", "--limit", 2
    )
    assert "features are simulated" in outcome.out
    assert "2 queries of test" in outcome.out
    assert json.loads((tmp_path / "r.json").read_text())["simulated_features"] is True


def test_evaluate_output_not_finite_names_features(
    tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set, grounder = DataSet(mini), Grounder.load(tiny_model)
    run = grounder.backend.run

    def overflowing(batch: Any) -> Any:
        heads = run(batch)
        if batch.segment_features.any():
            heads.boundary_distances[...] = np.inf
        return heads

    monkeypatch.setattr(grounder.backend, "run", overflowing)
    with raises(FeatureError, "features_out_of_scale"):
        evaluate(grounder, data_set, data_set.annotations("test"))


def test_evaluate_sentence_of_unknown_words_is_a_miss_and_named(
    tiny_model: Path, mini: Path, tmp_path: Path, run_command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = mini / "Charades_sta_test.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].split("##")[0] + "##zorbs frimly", *lines]) + "\n")
    output = tmp_path / "predictions.jsonl"
    arguments = ("--model", tiny_model, "--data", mini, "--output", tmp_path / "report.json", "--predictions", output)
    assert run_command(evaluate_command, *arguments).code == 0
    assert records(caplog, logging.WARNING, "zorbs frimly")
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert [bool(row["pred_relevant_windows"]) for row in rows] == [False] + len(lines) * [True]
    assert json.loads((tmp_path / "report.json").read_text())["queries"] == len(lines) + 1


def test_ablations_remove_or_shuffle_the_video(
    tiny_model: Path,
    mini: Path,
    tmp_path: Path,
    run_command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = {}
    for ablation in ("none", "blind", "shuffled"):
        arguments = ("--model", tiny_model, "--data", mini, "--ablation", ablation)
        path = tmp_path / f"{ablation}.jsonl"
        assert run_command(evaluate_command, *arguments, "--predictions", path).code == 0
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        duration = DataSet(mini).durations
        windows[ablation] = [
            [value / duration[row["vid"]] for value in row["pred_relevant_windows"][0][:2]] for row in rows
        ]
    # Constant features are rejected outside of the ablation.
    monkeypatch.setattr("runtime.core.video.check_varies", lambda *_: None)
    grounder, data_set = Grounder.load(tiny_model), DataSet(mini)
    for index, annotation in enumerate(data_set.annotations("test")):
        zeros = np.zeros_like(data_set.video(annotation.video).features)
        best = grounder.ground(Video(zeros, 900, 30.0, counted=ClipTiming()), annotation.sentence)[0]
        assert windows["blind"][index] == pytest.approx([best.start / 30, best.end / 30])
        assert windows["shuffled"][index] != windows["none"][index] != windows["blind"][index]


def test_invalid_annotation_line_is_rejected_by_number(
    tiny_model: Path, golden: Path, tmp_path: Path, refused: Callable[..., GroundingError]
) -> None:
    error = refused(evaluate_command, "--model", tiny_model, "--data", golden / "mini", "--output", tmp_path / "r.json")
    check_error(error, "impossible_moment", "Charades_sta_test.txt", "line 6", 12, 24)
    assert not list(tmp_path.iterdir())


def test_evaluate_invalid_input_is_rejected(
    tiny_model: Path, mini: Path, tmp_path: Path, refused: Callable[..., GroundingError]
) -> None:
    arguments, gone = ("--model", tiny_model, "--data", mini), tmp_path / "gone"
    check_error(refused(evaluate_command, "--model", "gone.onnx", "--data", mini), "missing_file", "gone.onnx")
    check_error(refused(evaluate_command, "--model", tiny_model, "--data", gone), "missing_file", gone)
    check_error(refused(evaluate_command, *arguments, "--split", "val"), "missing_split", "'val'")
    for option, number in (("--limit", 0), ("--limit", -2), ("--batch-size", 0)):
        check_error(refused(evaluate_command, *arguments, option, number), "invalid_option", option, number)


def test_unwritable_report_is_rejected(
    tiny_model: Path, mini: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("a file")
    for option in ("--output", "--predictions"):
        place = tmp_path / "file" / "r.json"
        outcome = run_command(evaluate_command, "--model", tiny_model, "--data", mini, option, place)
        assert outcome.code == 2
        assert outcome.err.startswith("error: ")
        check_error(outcome.error, "unwritable_output", place)
    assert (tmp_path / "file").read_text() == "a file"


def test_evaluation_files_are_written_before_printing(
    models: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        evaluate_command(
            models / "drn.onnx", planted, limit=2, output=tmp_path / "r.json", predictions=tmp_path / "p.jsonl"
        )
    assert json.loads((tmp_path / "r.json").read_text())["queries"] == 2
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("option", ["output", "predictions"])
def test_reports_do_not_overwrite_input_files(
    option: str, data_set: DataSet, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [*data_set.files, data_set.feature_path("BBBBB"), tiny_model]
    assert {path.name for path in read} >= {"Charades_sta_test.txt", "Charades_sta_train.txt", "Charades_word2id.json"}
    for path in read:
        before = path.read_bytes()
        with pytest.raises(OutputError):
            evaluate_command(tiny_model, data_set.root, **{option: path})
        assert path.read_bytes() == before
