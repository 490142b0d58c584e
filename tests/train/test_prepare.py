"""Test `train.prepare`: every published format converts, and excluded rows are reported."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError, CheckpointError, FeatureError, GroundingError, OutputError
from runtime.core.pooling import ClipTiming
from runtime.datasets.dataset import DataSet, one_per_moment
from tests.annotated import write_activitynet, write_qvhighlights, write_tacos
from tests.raising import quotes, raises, records
from train.prepare import prepare

WRITERS = {"activitynet": write_activitynet, "tacos": write_tacos, "qvhighlights": write_qvhighlights}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rewrite(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", WRITERS)
def test_prepared_data_set_equals_the_published_one(tmp_path: Path, name: str) -> None:
    before = DataSet(WRITERS[name](tmp_path / "data"))
    after = DataSet(prepare(before.root, tmp_path / "common"))
    assert (after.preset.title, after.splits) == (before.preset.title, before.splits)
    assert dict(after.words) == dict(before.words)
    assert after.num_frames == before.num_frames
    for split in before.splits:
        expected, actual = before.annotations(split), after.annotations(split)
        assert [(a.name, a.video, a.sentence) for a in actual] == [(a.name, a.video, a.sentence) for a in expected]
        np.testing.assert_array_equal(after.truths(actual), before.truths(expected))
    again = prepare(after.root, tmp_path / "again")
    assert contents(again).keys() == contents(after.root).keys()
    assert (again / "train.jsonl").read_bytes() == (after.root / "train.jsonl").read_bytes()


def test_prepare_charades_keeps_words_frames_and_features(planted: Path, tmp_path: Path) -> None:
    before, after = DataSet(planted), DataSet(prepare(planted, tmp_path / "common"))
    assert dict(after.words) == dict(before.words)
    annotations = before.annotations("test")
    np.testing.assert_array_equal(after.spans(after.annotations("test")), before.spans(annotations))
    video = annotations[0].video
    actual, expected = (data_set.video(video) for data_set in (after, before))
    assert (actual.num_frames, actual.duration) == (expected.num_frames, expected.duration)
    np.testing.assert_array_equal(actual.features, expected.features)
    assert after.features() == before.features()
    assert after.simulated


def test_dropped_annotations_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_activitynet(tmp_path / "data")

    def spoil(entries: dict[str, Any]) -> None:
        first, second, third = list(entries)[:3]
        entries[first]["timestamps"][1] = [9, 8]
        entries[second]["sentences"][0] = "..."
        entries[third]["timestamps"][2][1] = 1000
        entries[third]["sentences"][1] = "The person waves."

    rewrite(data / "train.json", spoil)
    (data / "features").mkdir()
    for number in range(1, 36):
        np.save(data / "features" / f"v_{number}.npy", np.ones((9, 4), np.float32))
    common = DataSet(prepare(data, tmp_path / "common"))
    lines = capsys.readouterr().out.splitlines()
    for values in (
        (1, "v_1 sentence 2", "8 s"),
        (1, "4", "'...'"),
        (3, "v_36 sentence 1", "v_36 sentence 2", "v_36 sentence 3"),
    ):
        assert any(quotes(line, *values) for line in lines), values
    assert any(line.split()[:2] == ["1", "moments"] for line in lines)
    about = json.loads((common.root / "dataset.json").read_text())
    assert about["dropped"]["train"] == {"the moment makes no sense": 1, "no word of the sentence is known": 1}
    assert about["dropped"]["test"] == {"its video has no features": 3}
    assert [len(common.annotations(split)) for split in common.splits] == [70, 18, 15]
    # The prepared data set needs no further correction.
    assert common.spans(common.annotations("train")).max() == 1
    assert (common.preset.features.dim, "waves" in common.words) == (4, True)


def test_training_videos_in_other_splits_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_qvhighlights(tmp_path / "data")
    prepare(data, tmp_path / "common")
    assert not records(caplog, logging.WARNING, code="test_videos_used")
    training, validation = (data / f"highlight_{split}_release.jsonl" for split in ("train", "val"))
    first = {**json.loads(training.read_text().splitlines()[0]), "qid": 10**6}
    validation.write_text(f"{validation.read_text()}{json.dumps(first)}\n")
    prepare(data, tmp_path / "shared")
    assert len(records(caplog, logging.WARNING, 1, "val", repr(first["vid"]), code="test_videos_used")) == 1


def test_rare_words_are_excluded_from_the_vocabulary(tmp_path: Path) -> None:
    data = write_activitynet(tmp_path / "data")

    def add(entries: dict[str, Any]) -> None:
        next(iter(entries.values()))["sentences"][0] = "The person juggles."

    rewrite(data / "train.json", add)
    assert "juggles" in DataSet(prepare(data, tmp_path / "all")).words
    words = DataSet(prepare(data, tmp_path / "common", min_count=2)).words
    assert "juggles" not in words
    assert sorted(words.values()) == list(range(1, len(words) + 1))


def test_words_of_other_splits_are_added_with_vectors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "drn")
    data = write_activitynet(tmp_path / "data")
    rewrite(data / "test.json", lambda entries: entries["v_31"].update(sentences=["A zebra naps.", "b", "c"]))
    vectors = {"person": [0.1, -2.5, 3e-05], "zebra": [1.0, 2.0, 3.0], "unused": [0.0, 0.0, 0.0]}
    glove = tmp_path / "glove.txt"
    glove.write_text("".join(f"{word} {' '.join(map(str, row))}\n" for word, row in vectors.items()))
    common = prepare(data, tmp_path / "common", glove=glove, embed_dim=3)
    assert caplog.text.strip().endswith(f"--glove {common / 'word_vectors.txt'} --embed-dim 3")
    words = DataSet(common).words
    assert "zebra" in words
    assert "naps" not in words
    lines = (common / "word_vectors.txt").read_text().splitlines()
    actual = {word: np.array(row, np.float32).tolist() for word, *row in (line.split() for line in lines)}
    assert actual == {word: np.float32(vectors[word]).tolist() for word in ("person", "zebra")}
    # Training reads this file.
    from train.network.initialization import glove_vectors

    assert set(glove_vectors(common / "word_vectors.txt", words, 3)) == {words["person"], words["zebra"]}


def test_prepared_data_set_finds_original_or_given_features(tmp_path: Path) -> None:
    data = write_qvhighlights(tmp_path / "data")
    expected = DataSet(data).store.load("train0_0.0_150.0")
    np.testing.assert_array_equal(DataSet(prepare(data, tmp_path / "a")).store.load("train0_0.0_150.0"), expected)
    (data / "features").rename(tmp_path / "elsewhere")
    common = prepare(data, tmp_path / "b", features=tmp_path / "elsewhere")
    np.testing.assert_array_equal(DataSet(common).store.load("train0_0.0_150.0"), expected)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "c" / "features")
    common = prepare(data, tmp_path / "c")
    assert "features" not in json.loads((common / "dataset.json").read_text())
    np.testing.assert_array_equal(DataSet(common).store.load("train0_0.0_150.0"), expected)


def test_clock_option_sets_clip_timing_and_frames(tmp_path: Path) -> None:
    data = write_qvhighlights(tmp_path / "data")
    default, given = (
        DataSet(prepare(data, tmp_path / name, **options))
        for name, options in (("default", {}), ("given", {"clock": (16, 8)}))
    )
    assert (default.features().clock, given.features().clock) == (ClipTiming(60, 60), ClipTiming(16, 8))
    assert [common.frames("train0_0.0_150.0") for common in (default, given)] == [75 * 60, 74 * 8 + 16]
    # Every moment of a query is in the prepared data set.
    assert len(one_per_moment(default.annotations("train"))) == 36


def test_data_set_without_training_split_has_no_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_qvhighlights(tmp_path / "data")
    (data / "highlight_train_release.jsonl").unlink()
    caplog.set_level("INFO", "drn")
    common = prepare(data, tmp_path / "common")
    assert records(caplog, logging.INFO, f"python -m runtime.evaluate --model drn.onnx --data {common} --split val")
    assert not (common / "vocabulary.json").exists()
    assert records(caplog, logging.WARNING, code="empty_split")
    assert len(DataSet(common).annotations("val")) == 6


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str, tuple[object, ...]]] = {
    "rare": ({"min_count": 0}, GroundingError, "invalid_option", ("--min-count", 0)),
    "clock": ({"clock": (16, 0)}, FeatureError, "invalid_clip_timing", (16, 0)),
    "features": ({"features": Path("gone")}, FeatureError, "missing_file", ("gone", "--features")),
    "kind": ({"features": Path(__file__)}, FeatureError, "unknown_feature_store", (__file__, "--features")),
    "glove": ({"glove": Path("gone.txt")}, CheckpointError, "missing_file", ("gone.txt",)),
    "vectors": ({"glove": Path(__file__)}, CheckpointError, "word_vector_width_mismatch", (__file__, "line 1", 300)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prepare_invalid_input_is_rejected_without_output(tmp_path: Path, case: str) -> None:
    options, error, code, values = REFUSED[case]
    data = write_activitynet(tmp_path / "data")
    with raises(error, code, *values):
        prepare(data, tmp_path / "common", **options)
    assert not (tmp_path / "common").exists()


def test_hdf5_without_any_video_fails_without_output(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")
    data = write_activitynet(tmp_path / "data")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["v_99"] = np.ones((9, 4), np.float32)
    with raises(AnnotationError, "empty_split", "train/val/test", data, 72):
        prepare(data, tmp_path / "common", features=tmp_path / "other.h5")
    assert not (tmp_path / "common").exists()


@pytest.mark.parametrize(("broken", "code"), [("file", "unreadable_file"), ("video", "wrong_array")])
def test_unusable_features_are_not_reported_missing(tmp_path: Path, broken: str, code: str) -> None:
    h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")
    data, features = write_activitynet(tmp_path / "data"), tmp_path / "features.h5"
    if broken == "file":
        features.write_text("not found")
    else:
        with h5py.File(features, "w") as file:
            file["v_1"] = np.ones(3, np.float32)
    with raises(FeatureError, code, features, *(("'v_1'", (3,)) if broken == "video" else ())):
        prepare(data, tmp_path / "common", features=features)
    assert not (tmp_path / "common").exists()


def test_nonempty_output_is_rejected_unchanged(tmp_path: Path) -> None:
    data = write_activitynet(tmp_path / "data")
    common = prepare(data, tmp_path / "common")
    before = contents(common)
    with raises(OutputError, "output_not_empty", common, "dataset.json"):
        prepare(write_tacos(tmp_path / "other"), common)
    with raises(OutputError, "output_is_file", common / "dataset.json", "--output"):
        prepare(data, common / "dataset.json")
    assert contents(common) == before


def test_prepare_contradictory_clips_require_clock_option(tmp_path: Path, planted: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(planted, data)
    for path in (data / "C3D_unit16_overlap0.5_merged").iterdir():
        # The number of clips of 16 frames, one every 32.
        np.save(path, np.load(path)[::4])
    with raises(FeatureError, "clip_timing_mismatch", "--clock"):
        prepare(data, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    assert DataSet(prepare(data, tmp_path / "output", clock=(16, 32))).features().clock == ClipTiming(16, 32)


@pytest.mark.parametrize("factor", [1000, 1 / 1000])
def test_prepare_durations_in_another_unit_are_rejected(tmp_path: Path, planted: Path, factor: float) -> None:
    data = tmp_path / "data"
    shutil.copytree(planted, data)
    rewrite(data / "Charades_duration.json", lambda table: table.update({k: v * factor for k, v in table.items()}))
    with raises(AnnotationError, "units_mismatch", data / "Charades_sta_train.txt"):
        prepare(data, tmp_path / "output")
