"""Test `train.simulation.from_captions`: features simulated from sentences, and training on them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError, FeatureError
from runtime.datasets.dataset import DataSet
from runtime.datasets.presets import length_quantiles
from runtime.evaluate import evaluate
from tests.annotated import write_activitynet, write_qvhighlights, write_tacos
from tests.raising import raises
from train.__main__ import train
from train.checkpoints import load_checkpoint
from train.simulate import simulate
from train.simulation.from_captions import STATEMENT, content_words
from train.training.dataset import pool

WRITERS = {"ActivityNet Captions": write_activitynet, "TACoS": write_tacos}
EASY: dict[str, Any] = {"feature_dim": 12, "difficulty": "easy"}


@pytest.fixture(scope="module", params=WRITERS)
def simulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DataSet]:
    """Return the title and the data set of each layout, with simulated features."""
    directory = tmp_path_factory.mktemp("captions")
    annotations = WRITERS[request.param](directory / "annotations")
    return request.param, DataSet(simulate(directory / "data", annotations=annotations, **EASY))


def test_annotations_are_copied_and_every_video_has_features(simulated: tuple[str, DataSet]) -> None:
    title, data_set = simulated
    assert (data_set.preset.title, data_set.splits, data_set.simulated) == (title, ["train", "val", "test"], True)
    for split in data_set.splits:
        copied = data_set.annotations_path(split).read_bytes()
        assert copied == (data_set.root.parent / "annotations" / f"{split}.json").read_bytes()
        for name in data_set.videos(split):
            video = data_set.video(name)
            assert video.features.shape[1] == 12
            # Frame counts in the annotations are used; others follow from the clips.
            assert video.num_frames == data_set.num_frames.get(name, video.num_frames)
    record = json.loads((data_set.root / "simulated.json").read_text())
    assert record["statement"] == STATEMENT
    assert record["contents"]["moments"] == {"train": 72, "val": 18, "test": 18}


def test_features_depend_only_on_content_words(tmp_path: Path) -> None:
    annotations = write_activitynet(tmp_path / "annotations")
    first = simulate(tmp_path / "first", annotations=annotations, **EASY)
    train_file = annotations / "train.json"
    entries = json.loads(train_file.read_text())
    name = next(iter(entries))
    entries[name]["sentences"] = [f"Then {sentence} again and up" for sentence in entries[name]["sentences"]]
    train_file.write_text(json.dumps(entries))
    second = simulate(tmp_path / "second", annotations=annotations, **EASY)
    for path in (first / "features").iterdir():
        np.testing.assert_array_equal(np.load(path), np.load(second / "features" / path.name))
    entries[name]["sentences"] = ["The person flies a kite."] * 3
    train_file.write_text(json.dumps(entries))
    third = DataSet(simulate(tmp_path / "third", annotations=annotations, **EASY))
    assert (third.store.load(name) != DataSet(first).store.load(name)).any()


def test_content_words_drops_function_words_and_sorts() -> None:
    assert content_words("The Man then opens up a DOOR, and opens it again.") == "door man opens"
    assert content_words("And then she does it.") == ""


def test_fewer_videos_are_seeded_sample_of_each_split(tmp_path: Path) -> None:
    annotations = write_tacos(tmp_path / "annotations")
    data_set = DataSet(simulate(tmp_path / "data", annotations=annotations, videos=2, **EASY))
    assert [len(data_set.videos(split)) for split in data_set.splits] == [2, 2, 2]
    complete = DataSet(simulate(tmp_path / "complete", annotations=annotations, **EASY))
    for name in data_set.durations:
        np.testing.assert_array_equal(data_set.store.load(name), complete.store.load(name))


def test_unsupported_annotation_layout_is_rejected(tmp_path: Path) -> None:
    directory = write_qvhighlights(tmp_path / "annotations")
    (directory / "train.json").write_text(json.dumps({}))
    with raises(AnnotationError, "unexpected_structure", directory / "train.json"):
        simulate(tmp_path / "data", annotations=directory)
    assert not (tmp_path / "data").exists()


def test_training_uses_preset_of_the_data_set(simulated: tuple[str, DataSet], tmp_path: Path) -> None:
    title, data_set = simulated
    sizes: dict[str, Any] = {"embed_dim": 8, "hidden_dim": 8, "fpn_dim": 8, "batch_size": 32}
    checkpoint = load_checkpoint(train(data_set.root, tmp_path / "run", epochs=(1, 1, 1), iou_target="all", **sizes))
    preset = data_set.preset
    assert checkpoint.config.num_segments == preset.num_segments == {"TACoS": 128}.get(title, 32)
    assert checkpoint.decoding.pre_nms_top_n == max(32, preset.num_segments)
    assert checkpoint.training["query_length"] == list(preset.query_length)
    training = data_set.annotations("train", invalid="drop")
    lengths = (len(checkpoint.vocabulary.encode(one.sentence, Counter())) for one in training)
    assert checkpoint.training["query_length_quantiles"] == list(length_quantiles(lengths))
    assert checkpoint.longest_query == max(64, preset.query_length[2])
    assert (checkpoint.features.kind, checkpoint.features.dim) == ("C3D", 12)
    # The val split chooses the epoch where there is one.
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert (inputs["validate_on"], inputs["queries"]) == ("val", [72, 18])
    report = evaluate(tmp_path / "run" / "drn.pt", data_set.root)
    assert ("R@1 IoU=0.1" in report.values) == (title == "TACoS")
    assert report.queries == 18


def test_query_with_several_moments_trains_once_per_moment(tmp_path: Path) -> None:
    data = write_qvhighlights(tmp_path / "data")
    sizes: dict[str, Any] = {"embed_dim": 8, "hidden_dim": 8, "fpn_dim": 8, "batch_size": 16, "epochs": (1, 1, 1)}
    checkpoint = load_checkpoint(train(data, tmp_path / "run", iou_target="all", **sizes))
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    # Half of the 24 training queries have two moments; each of the 6 of val counts once.
    assert inputs["queries"] == [36, 6]
    assert (checkpoint.config.num_segments, checkpoint.features.window) == (64, 60)


def test_pooled_hdf5_features_equal_files_and_refresh(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")
    root = write_activitynet(tmp_path / "archive")
    files = DataSet(simulate(tmp_path / "files", annotations=root, **EASY))
    videos = sorted(files.durations)

    def write(factor: float) -> DataSet:
        with h5py.File(root / "features.hdf5", "w") as file:
            for video in videos:
                file[f"{video}/c3d_features"] = files.store.load(video) * np.float16(factor)
        return DataSet(root)

    features = files.features()
    expected = pool(files, videos, 16, features, tmp_path / "cache")
    archive = write(1)
    actual = pool(archive, videos, 16, features, tmp_path / "cache")
    np.testing.assert_array_equal(actual.features, expected.features)
    np.testing.assert_array_equal(actual.spans, expected.spans)
    assert actual.key != expected.key
    archive.store.close()  # type: ignore[attr-defined]
    doubled = pool(write(2), videos, 16, features, tmp_path / "cache")
    np.testing.assert_array_equal(doubled.features, 2 * expected.features)


def test_missing_hdf5_video_fails_before_writing(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")
    data = write_activitynet(tmp_path / "data")
    with h5py.File(data / "features.hdf5", "w") as file:
        file["v_1/c3d_features"] = np.ones((9, 4), np.float32)
    with raises(FeatureError, "missing_features", "'v_10'", data / "features.hdf5"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (data / "cache").exists()
