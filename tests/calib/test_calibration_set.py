"""Test `calib.calibration_set`: selection of calibration queries and of held-out queries."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from calib.calibration_set import (
    MIN_SAMPLES,
    CalibrationSet,
    coverage_table,
    forbid_test_videos,
    sample_calibration_set,
    sample_held_out,
)
from calib.errors import CalibrationError
from runtime.artifacts.manifest import Manifest
from runtime.core.errors import FeatureError
from runtime.core.tokenizer import Vocabulary, tokenize
from runtime.datasets.dataset import Annotation, DataSet
from tests.raising import raises, records


def videos(annotations: Iterable[Annotation]) -> set[str]:
    return {entry.video for entry in annotations}


@pytest.fixture
def copy(data_set: DataSet, tmp_path: Path) -> Path:
    """Return a copy of the data set that a test may change."""
    return Path(shutil.copytree(data_set.root, tmp_path / "data"))


def rewrite_training(root: Path, lines: list[str]) -> DataSet:
    DataSet(root).annotations_path("train").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSet(root)


def test_samples_exclude_sentences_of_held_out_videos(drawn: CalibrationSet, data_set: DataSet) -> None:
    train = set(data_set.annotations("train"))
    assert set(drawn.annotations) <= train
    assert set(drawn.held_out) <= train
    assert len(drawn.annotations) == 64
    assert len(drawn.held_out) == 48
    assert not videos(drawn.annotations) & videos(drawn.held_out)
    assert not videos(data_set.annotations("test")) & (videos(drawn.annotations) | videos(drawn.held_out))


def test_samples_spread_over_videos_and_strata(drawn: CalibrationSet, data_set: DataSet, manifest: Manifest) -> None:
    few = sample_calibration_set(data_set, manifest, samples=50)
    # A video repeats only after all were sampled.
    assert len(videos(few.annotations)) == 50
    assert max(Counter(entry.video for entry in drawn.annotations).values()) == 2
    for axis, strata in few.coverage["axes"].items():
        samples = [entry["samples"] for entry in strata]
        assert sum(samples) == few.coverage["sentences"] == 50, axis
        assert min(samples) >= 0.6 * 50 / len(strata), (axis, samples)


def test_same_seed_draws_same_samples(drawn: CalibrationSet, data_set: DataSet, manifest: Manifest) -> None:
    again = sample_calibration_set(data_set, manifest, samples=64, seed=0, held_out=48)
    assert again.annotations == drawn.annotations
    assert again.digest == drawn.digest
    assert again.coverage == drawn.coverage
    other = sample_calibration_set(data_set, manifest, samples=64, seed=1, held_out=48)
    assert other.digest != drawn.digest
    assert videos(other.held_out) != videos(drawn.held_out)


def test_coverage_lists_all_axes_and_words(drawn: CalibrationSet) -> None:
    text = coverage_table(drawn.coverage)
    assert text.startswith(f"64 sentences of {len(drawn.videos)} training videos")
    assert all(axis in text for axis in ("query tokens", "video seconds", "moment centre", "moment share"))
    words = {word for entry in drawn.annotations for word in tokenize(entry.sentence)}
    assert drawn.coverage["words"]["covered"] == len(words)


def test_digest_covers_features_and_sentences(copy: Path, manifest: Manifest, drawn: CalibrationSet) -> None:
    data_set = DataSet(copy)
    same = dataclasses.replace(drawn, data_set=data_set)
    assert same.digest == drawn.digest
    fewer = dataclasses.replace(drawn, annotations=drawn.annotations[1:])
    assert fewer.digest != drawn.digest
    path = data_set.feature_path(drawn.videos[0])
    features = data_set.video(drawn.videos[0]).features.copy()
    features[0, 0] += 1
    path.unlink()
    np.save(path.with_suffix(".npy"), features)
    assert dataclasses.replace(drawn, data_set=DataSet(copy)).digest != drawn.digest


def test_sampling_includes_rare_words(data_set: DataSet, manifest: Manifest, copy: Path) -> None:
    lines = data_set.annotations_path("train").read_text().splitlines()
    apart = videos(sample_held_out(data_set, manifest))
    # One query of another vocabulary, in a calibration video.
    line = next(index for index, text in enumerate(lines) if text.split()[0] not in apart)
    lines[line] = lines[line].split("##")[0] + "##person laughs."
    assert "laughs" not in {word for entry in data_set.annotations("train") for word in tokenize(entry.sentence)}
    vocabulary = Vocabulary({**manifest.vocabulary.words, "laughs": 33})
    knowing = dataclasses.replace(manifest, vocabulary=vocabulary)
    drawn = sample_calibration_set(rewrite_training(copy, lines), knowing, samples=120)
    assert any("laughs" in entry.sentence for entry in drawn.annotations)


def test_test_videos_are_rejected(drawn: CalibrationSet, data_set: DataSet, manifest: Manifest, copy: Path) -> None:
    names = sorted(videos(data_set.annotations("test")))
    lines = data_set.annotations_path("train").read_text().splitlines()
    spoilt = rewrite_training(copy, [*lines, f"{names[0]} 0.0 5.0##person opens the door."])
    for sample in (sample_calibration_set, sample_held_out):
        with raises(CalibrationError, "test_videos_used", 1, names[0]):
            sample(spoilt, manifest)
    with raises(CalibrationError, "test_videos_used", len(names), names[0]):
        CalibrationSet(data_set, data_set.annotations("test"), [], drawn.coverage)
    with raises(CalibrationError, "test_videos_used", 1, "What is tuned on"):
        forbid_test_videos(data_set, {data_set.annotations("test")[0].video}, "What is tuned on")
    with raises(CalibrationError, "test_videos_used", 3, f"({', '.join(names[:3])})"):
        forbid_test_videos(data_set, names[:3])
    with raises(CalibrationError, "test_videos_used", 4, f"({', '.join(names[:3])}, …)"):
        forbid_test_videos(data_set, names[:4])


def test_too_few_samples_are_rejected_with_the_minimum(data_set: DataSet, manifest: Manifest, copy: Path) -> None:
    for samples in (0, MIN_SAMPLES - 1):
        with raises(CalibrationError, "too_few_samples", samples, MIN_SAMPLES):
            sample_calibration_set(data_set, manifest, samples=samples)
    with raises(CalibrationError, "too_few_held_out", 7, 8):
        sample_held_out(data_set, manifest, 7)
    path = data_set.annotations_path("train")
    small = rewrite_training(copy, path.read_text().splitlines()[:20])
    with raises(CalibrationError, "too_few_samples", small.annotations_path("train"), MIN_SAMPLES):
        sample_calibration_set(small, manifest)


def test_small_data_set_returns_all_samples_with_warning(
    data_set: DataSet, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = sample_calibration_set(data_set, manifest, samples=10_000)
    apart = videos(sample_held_out(data_set, manifest))
    assert len(drawn.annotations) == sum(entry.video not in apart for entry in data_set.annotations("train"))
    assert records(caplog, logging.WARNING, 10000, len(drawn.annotations))


def test_held_out_and_calibration_are_disjoint(drawn: CalibrationSet, data_set: DataSet, manifest: Manifest) -> None:
    assert sample_held_out(data_set, manifest, 48, seed=0) == drawn.held_out
    # Another seed would draw calibration videos without `exclude`.
    assert videos(sample_held_out(data_set, manifest, 48, seed=3)) & set(drawn.videos)
    assert not videos(sample_held_out(data_set, manifest, 48, seed=3, exclude=drawn.videos)) & set(drawn.videos)
    again = sample_calibration_set(data_set, manifest, samples=40, exclude=drawn.videos[:5], held_out=48)
    assert not videos(again.annotations) & set(drawn.videos[:5])
    assert again.held_out == drawn.held_out


def test_batches_contain_each_sample_once(drawn: CalibrationSet, manifest: Manifest) -> None:
    batches = list(drawn.batches(manifest, 20))
    assert [len(batch) for batch in batches] == [20, 20, 20, 4]
    lengths = np.concatenate([batch.query_length for batch in batches])
    expected = [len(manifest.vocabulary.encode(entry.sentence)) for entry in drawn.annotations]
    assert lengths.tolist() == sorted(expected)
    assert all(batch.query_tokens.shape[1] == batch.query_length.max() for batch in batches)


def test_video_without_features_raises_error(copy: Path, manifest: Manifest, drawn: CalibrationSet) -> None:
    data_set = DataSet(copy)
    data_set.feature_path(drawn.videos[3]).unlink()
    with raises(FeatureError, "missing_features", drawn.videos[3]):
        list(dataclasses.replace(drawn, data_set=data_set).batches(manifest))


def test_samples_cover_words_and_axes_of_real_annotations(real_data: Path) -> None:
    data_set = DataSet(real_data / "charades_sta")
    drawn = sample_calibration_set(data_set, Manifest(data_set.vocabulary, None, None))  # type: ignore[arg-type]
    assert drawn.coverage["sentences"] == len(videos(drawn.annotations)) == 512
    assert drawn.coverage["words"]["of_all_tokens"] > 0.95
    # A draw without regard to words covers about 460 of 1,000.
    assert drawn.coverage["words"]["covered"] > 700
    for strata in drawn.coverage["axes"].values():
        assert min(entry["samples"] for entry in strata) > 40
