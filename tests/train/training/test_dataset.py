"""Test `train.training.dataset`: pooled features, their cache, and the batches of an epoch."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.errors import AnnotationError, FeatureError, OutputError
from runtime.core.sliding_windows import Windows
from runtime.datasets.dataset import Annotation, DataSet
from runtime.datasets.feature_stores import FeatureFiles
from tests.damage import flip, random_bits
from tests.raising import raises, records
from train.convert import CHARADES_STA
from train.training.dataset import PooledFeatures, TrainingData, pool, split_by_video, windows_of


@pytest.fixture
def data_set(planted: Path, tmp_path: Path) -> DataSet:
    """Return a copy of the planted data set, which a test may change."""
    shutil.copytree(planted, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    return DataSet(tmp_path / "data")


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Pool the features of all training videos of a data set into a cache directory."""

    data_set: DataSet
    videos: list[str]
    cache: Path

    @property
    def cached(self) -> Path:
        (path,) = self.cache.iterdir()
        return path

    def fill(self, num_segments: int = 32, first: int = 0) -> PooledFeatures:
        """Pool the videos from `first` on."""
        return pool(self.data_set, self.videos[first:], num_segments, self.data_set.features(), self.cache)


@pytest.fixture
def pooling(data_set: DataSet, tmp_path: Path) -> Pooling:
    videos = sorted({annotation.video for annotation in data_set.annotations("train", invalid="drop")})
    return Pooling(data_set, videos, tmp_path / "cache")


def test_cache_of_big_endian_features_has_their_values(pooling: Pooling) -> None:
    expected = np.array(pooling.fill().features)
    for video in pooling.videos:
        path = pooling.data_set.feature_path(video)
        np.save(path, np.load(path).astype(">f2"))
    np.testing.assert_array_equal(pooling.fill().features, expected)


@pytest.mark.parametrize(("convention", "num_segments"), [("mmaction2", 32), ("drn", 16)])
def test_cache_equals_pooling_of_each_video(pooling: Pooling, convention: Any, num_segments: int) -> None:
    features = dataclasses.replace(pooling.data_set.features(), pooling=convention)
    pooled = pool(pooling.data_set, pooling.videos, num_segments, features, pooling.cache)
    for video in pooling.videos:
        expected = pooling.data_set.video(video).segments(num_segments, convention)
        actual = pooled.segments(video)
        np.testing.assert_array_equal(actual.features, expected.features)
        np.testing.assert_array_equal(actual.spans, expected.spans)


def test_published_layout_equals_published_loader(golden: Path, tmp_path: Path) -> None:
    data_set, expected = DataSet(golden / "mini"), np.load(golden / "dataset_mini.npz")
    annotations = data_set.annotations("train", invalid="keep")
    videos = sorted({annotation.video for annotation in annotations})
    pooled = Pooling(data_set, videos, tmp_path).fill()
    training = TrainingData(data_set, annotations, pooled, data_set.vocabulary)
    assert len(training) > 5
    for index, annotation in enumerate(annotations):
        batch = training.batch(np.array([index]))
        assert expected[f"mini_{index}_vid_name"] == annotation.video
        np.testing.assert_array_equal(batch.inputs.segment_features[0], expected[f"mini_{index}_pooled"])
        np.testing.assert_array_equal(pooled.segments(annotation.video).spans, expected[f"mini_{index}_proposals"])
        np.testing.assert_array_equal(batch.inputs.query_tokens[0], expected[f"mini_{index}_tokens"])
        np.testing.assert_array_equal(batch.truth[0], expected[f"mini_{index}_gt_bbox"])


def test_damaged_cache_is_rebuilt(pooling: Pooling) -> None:
    expected = pooling.fill().features.copy()
    cached = pooling.cached
    content = cached.read_bytes()
    # A killed process leaves such a file, which the next one removes.
    unfinished = cached.with_name(f".drn-01234567-abcdefgh-{cached.name}")
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (0, 0))
    for damaged in (content[:-100], *(flip(content, bit) for bit in random_bits(content, 20))):
        cached.write_bytes(damaged)
        np.testing.assert_array_equal(pooling.fill().features, expected)
        assert pooling.cached == cached
        assert cached.read_bytes() == content


def test_intact_cache_is_reused_and_readable_by_others(pooling: Pooling) -> None:
    pooling.fill()
    cached = pooling.cached
    before, umask = cached.stat(), os.umask(0)
    os.umask(umask)
    assert before.st_mode & 0o777 == 0o666 & ~umask
    pooled = pooling.fill()
    assert list(pooling.cache.iterdir()) == [cached]
    assert (cached.stat().st_mtime_ns, cached.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert isinstance(pooled.features, np.memmap)


def test_cache_is_rebuilt_on_content_change_of_same_size(pooling: Pooling) -> None:
    old = pooling.fill().segments(pooling.videos[3]).features.copy()
    path = pooling.data_set.feature_path(pooling.videos[3])
    stat, features = path.stat(), np.load(path)
    np.save(path, features[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert not np.array_equal(pooling.fill().segments(pooling.videos[3]).features, old)


def test_cache_is_rebuilt_for_other_inputs(pooling: Pooling) -> None:
    pooling.fill()
    pooling.fill(first=1)
    pooling.fill(num_segments=16)
    pooling.data_set.num_frames[pooling.videos[0]] += 200
    pooling.fill()
    assert len(list(pooling.cache.iterdir())) == 4


def test_interrupted_pooling_leaves_no_cache(pooling: Pooling, monkeypatch: pytest.MonkeyPatch) -> None:
    load = FeatureFiles.load

    def interrupted(store: FeatureFiles, video: str) -> np.ndarray:
        if video == pooling.videos[4]:
            raise KeyboardInterrupt
        return load(store, video)

    monkeypatch.setattr(FeatureFiles, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pooling.fill()
    assert not pooling.cache.exists()


def resampled(clips: np.ndarray, factor: float) -> np.ndarray:
    return clips[(np.arange(round(len(clips) * factor)) / factor).astype(int)]


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (lambda clips: clips[:, :31], "feature_width_mismatch", (31, 32)),
        (lambda clips: clips.astype(np.float64), "feature_type_mismatch", ("float64", "float16")),
        (lambda clips: np.full((9, 32), np.nan, np.float16), "non_finite_features", (288,)),
        (lambda clips: clips[:0], "no_clips", ((0, 32),)),
        (lambda clips: clips * 0, "constant_features", ()),
        (lambda clips: resampled(clips, 4), "clip_timing_mismatch", ()),
        (lambda clips: resampled(clips, 0.25), "clip_timing_mismatch", ()),
    ],
)
def test_unusable_features_are_named(pooling: Pooling, change: Any, code: str, values: tuple[object, ...]) -> None:
    path = pooling.data_set.feature_path(pooling.videos[2])
    np.save(path, change(np.load(path)))
    with raises(FeatureError, code, pooling.videos[2], *values):
        pooling.fill()
    assert not pooling.cache.exists()


def test_video_without_features_or_with_wrong_duration_is_named(pooling: Pooling) -> None:
    video, durations = pooling.videos[1], pooling.data_set.durations
    durations[video] *= 1000
    with raises(AnnotationError, "frame_rate_out_of_range", video):
        pooling.fill()
    durations[video] /= 1000
    pooling.data_set.feature_path(video).unlink()
    with raises(FeatureError, "missing_features", video):
        pooling.fill()
    assert not pooling.cache.exists()


def test_unwritable_cache_error_names_the_option(pooling: Pooling) -> None:
    pooling.cache.write_text("not a directory")
    with raises(OutputError, "unwritable_output", "--cache", pooling.cache):
        pooling.fill()


@pytest.fixture
def training(pooling: Pooling) -> TrainingData:
    annotations = pooling.data_set.annotations("train", invalid="drop")
    return TrainingData(pooling.data_set, annotations, pooling.fill(), pooling.data_set.vocabulary)


def test_batch_contains_its_queries_in_order(training: TrainingData, data_set: DataSet) -> None:
    chosen = np.array([5, 0, 9])
    batch = training.batch(chosen)
    for row, index in enumerate(chosen):
        annotation = training.annotations[index]
        ids = data_set.vocabulary.encode(annotation.sentence)
        assert batch.inputs.query_length[row] == len(ids)
        np.testing.assert_array_equal(batch.inputs.query_tokens[row, : len(ids)], ids)
        np.testing.assert_array_equal(
            batch.inputs.segment_features[row], data_set.video(annotation.video).segments(32).features
        )
        np.testing.assert_allclose(batch.truth[row], data_set.span(annotation), rtol=1e-6)
    dtypes = [array.dtype for array in (*vars(batch.inputs).values(), batch.truth)]
    assert dtypes == [np.int32] * 2 + [np.float32] * 3


def test_blind_training_zeros_only_the_features(training: TrainingData, data_set: DataSet) -> None:
    blind = TrainingData(data_set, training.annotations, training.pooled, data_set.vocabulary, blind=True)
    seeing, unseeing = training.batch(np.arange(3)).inputs, blind.batch(np.arange(3)).inputs
    assert seeing.segment_features.any()
    assert not unseeing.segment_features.any()
    np.testing.assert_array_equal(seeing.segment_spans, unseeing.segment_spans)
    np.testing.assert_array_equal(seeing.query_tokens, unseeing.query_tokens)


class Counted(TrainingData):
    """Training data without content, of a number of queries."""

    def __init__(self, count: int) -> None:
        self.annotations = [None] * count  # type: ignore[list-item]


@given(st.integers(0, 90), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_epoch_is_divided_among_processes(count: int, batch_size: int, processes: int, seed: int) -> None:
    data = Counted(count)
    shares = [data.epoch(batch_size, (seed,), rank, processes) for rank in range(processes)]
    steps = count // (batch_size * processes)
    assert [len(share) for share in shares] == [steps] * processes
    dealt = np.concatenate([batch for share in shares for batch in share]) if steps else np.empty(0, int)
    assert len(dealt) == len(set(dealt.tolist())) == steps * batch_size * processes
    assert set(dealt.tolist()) <= set(range(count))
    together = data.epoch(batch_size * processes, (seed,))
    for step, batch in enumerate(together):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), batch)


class CountedOfVideos(Counted):
    """Training data without content, of the videos of the queries."""

    def __init__(self, video_rows: list[int]) -> None:
        super().__init__(len(video_rows))
        self.video_rows = np.array(video_rows)


@given(st.lists(st.integers(0, 5), min_size=12, max_size=60), st.integers(1, 30), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_mismatched_pairs_ignore_process_count(video_rows: list[int], count: int, processes: int, seed: int) -> None:
    data = CountedOfVideos([*video_rows, 6])
    epochs = [data.epoch(4, (seed,), rank, processes) for rank in range(processes)]
    pairs = [data.mismatched(epoch, count, (seed,), rank, processes) for rank, epoch in enumerate(epochs)]
    for epoch, actual in zip(epochs, pairs, strict=True):
        for batch, (queries, partners) in zip(epoch, actual, strict=True):
            assert len(queries) == count
            assert set(queries) <= set(batch)
            # Every sentence as often as any other, but for one time.
            times = np.unique(queries, return_counts=True)[1]
            assert times.max() - (times.min() if count >= len(batch) else 1) <= 1
            assert (data.video_rows[queries] != data.video_rows[partners]).all()
    together = data.mismatched(data.epoch(4 * processes, (seed,)), count * processes, (seed,))
    for step, expected in enumerate(together):
        np.testing.assert_array_equal(np.concatenate([share[step] for share in pairs], axis=1), expected)


def test_mismatched_videos_are_drawn_by_query_count() -> None:
    data = CountedOfVideos([0, 0, 1, 2, 2, 2])
    partners = data.mismatched([np.array([0])], 3000, (0,))[0][1]
    np.testing.assert_allclose(np.bincount(partners, minlength=6) / 3000, [0, 0, 0.25, 0.25, 0.25, 0.25], atol=0.03)


def test_mismatched_pairs_follow_the_matching_pairs(training: TrainingData) -> None:
    chosen = np.array([5, 0])
    pairs = np.array([[0, 5, 5], [9, 20, 12]])
    batch, alone = training.batch(chosen, pairs), training.batch(chosen)
    np.testing.assert_array_equal(batch.truth, alone.truth)
    np.testing.assert_array_equal(batch.inputs.query_tokens[[1, 0, 0]], batch.inputs.query_tokens[2:])
    for row, index in zip(batch.inputs.segment_features, (5, 0, 9, 20, 12), strict=True):
        np.testing.assert_array_equal(row, training.segments(training.annotations[index].video).features)


def test_epochs_differ_and_are_seeded() -> None:
    data = Counted(64)
    first, again, next_epoch = (np.concatenate(data.epoch(8, seed)) for seed in ((0, 1), (0, 1), (0, 2)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, next_epoch)
    assert not np.array_equal(first, np.sort(first))


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_held_out_videos_are_never_trained_on(num_videos: int, fraction: float, seed: int) -> None:
    annotations = [Annotation(f"V{i % num_videos}", 0, 1, "a", i) for i in range(3 * num_videos)]
    training, validation = split_by_video(annotations, fraction, seed)
    assert not {a.video for a in training} & {a.video for a in validation}
    assert sorted((*training, *validation), key=lambda a: a.line) == annotations
    assert len({a.video for a in validation}) == max(1, round(fraction * num_videos))
    assert split_by_video(annotations[::-1], fraction, seed)[1] == validation[::-1]


def test_windows_derive_from_training_videos_and_moments(data_set: DataSet) -> None:
    data_set.durations.update(short=20.0, long=90.0)
    moments = [("short", 5.0, 15.0), ("short", 15.0, 30.0), ("long", 0.0, 40.0), ("short", 9.0, 8.0)]
    actual = windows_of(data_set, [Annotation(*moment, "a", 1) for moment in moments])
    # Cut off at the end of its video, the second lasts 5 s.
    assert actual == Windows.of([20.0, 90.0], [10.0, 5.0, 40.0])
    assert actual.longest == 90


def test_charades_sta_windows_match_published_networks(real_data: Path) -> None:
    data_set = DataSet(real_data / "charades_sta")
    actual = windows_of(data_set, data_set.annotations("train", invalid="drop"))
    assert dataclasses.astuple(actual) == pytest.approx(dataclasses.astuple(CHARADES_STA), abs=0.05)


def test_pool_too_few_clips_give_warning_in_every_run(pooling: Pooling, caplog: pytest.LogCaptureFixture) -> None:
    for video in pooling.videos:
        path = pooling.data_set.feature_path(video)
        clips = np.load(path)
        np.save(path, clips[: round(0.8 * len(clips))])
    for run in (1, 2):
        dataclasses.replace(pooling, data_set=DataSet(pooling.data_set.root)).fill()
        assert len(records(caplog, logging.WARNING, "--clock")) == run
