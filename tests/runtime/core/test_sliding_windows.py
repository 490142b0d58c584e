"""Test `runtime.core.sliding_windows`: windows cover long videos without a gap, and merge into the same moments."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import EncodedVideo, EncodedWindows, Grounder, Moment, Video, Windows
from runtime.backends.base import Backend
from runtime.core import video as videos_module
from runtime.core.decoding import HARD_NMS_MARGIN, Decoding
from runtime.core.errors import FeatureError, ModelFileError
from runtime.core.moments import temporal_iou
from runtime.core.pooling import ClipTiming
from runtime.core.sliding_windows import split_into_windows
from tests.raising import raises
from tests.runtime.planted import (
    CLIP,
    CLOCK,
    PAIRS,
    RATE,
    WINDOWS,
    Finder,
    Noisy,
    PlantedBackend,
    PlantedPair,
    long_video,
)

SEGMENT = WINDOWS.length / 32


@pytest.fixture
def finder() -> Finder:
    return Finder(PlantedBackend())


@given(
    st.integers(1, 3000),
    st.integers(0, 7),
    st.floats(1, 60),
    st.floats(0.5, 200),
    st.floats(0, 0.5),
    st.sampled_from([CLOCK, ClipTiming(1, 8), ClipTiming(32, 4), ClipTiming(8, 8)]),
)
@settings(max_examples=200)
def test_windows_have_equal_length_cover_and_overlap(
    num_clips: int, more: int, rate: float, length: float, share: float, clock: ClipTiming
) -> None:
    num_frames = max(2, clock.num_frames(num_clips) + min(more, clock.stride - 1))
    windows = Windows(1e6, length, share * length)
    cuts = split_into_windows(num_clips, num_frames, num_frames / rate, windows, clock)
    assert {clip for window in cuts for clip in range(window.first, window.last + 1)} == set(range(num_clips))
    assert len({window.last - window.first for window in cuts}) == 1
    assert cuts[-1].end == pytest.approx(num_frames / rate)
    for one, other in itertools.pairwise(cuts):
        assert one.first < other.first
        shared = one.last + 1 - other.first
        assert shared * clock.stride / rate >= windows.overlap - 1e-9 or other.first == one.first + 1
        assert other.start == pytest.approx(other.first * clock.stride / rate)
    assert all(window.num_frames >= 2 for window in cuts)


def test_windows_end_at_the_last_available_clip() -> None:
    cuts = split_into_windows(300, CLOCK.num_frames(600), CLOCK.num_frames(600) / RATE, WINDOWS, CLOCK)
    assert cuts[-1].last == 299
    assert cuts[-1].end == pytest.approx(CLOCK.num_frames(300) / RATE)
    assert split_into_windows(900, CLOCK.num_frames(600), CLOCK.num_frames(600) / RATE, WINDOWS, CLOCK)[-1].last == 599


@given(st.floats(0, 570), st.floats(3 * SEGMENT, 14))
@settings(max_examples=60)
def test_moment_in_long_video_equals_short_clip_result(start: float, length: float) -> None:
    grounder = Grounder(Finder(PlantedBackend()))
    video = long_video(600, dog=(start, start + length))
    assert len(grounder.cut(video)) > 20
    best = grounder.ground(video, "person dog")[0]
    # A segment contains the words of all its clips, also of a clip that two segments share. A clip has a third of a
    # second.
    tolerance = SEGMENT + 2 * CLIP
    assert best.start == pytest.approx(start, abs=tolerance)
    assert best.end == pytest.approx(start + length, abs=tolerance)
    first = min(int(max(start - 10, 0) / CLIP), len(video.features) - 128)
    short = Video(video.features[first : first + 128], CLOCK.num_frames(128), CLOCK.num_frames(128) / RATE)
    alone = grounder.ground(short, "person dog")[0]
    assert not grounder.cut(short)
    assert best.start == pytest.approx(alone.start + first * CLIP, abs=2 * tolerance)
    assert best.end == pytest.approx(alone.end + first * CLIP, abs=2 * tolerance)


def test_single_window_equals_grounding_without_windows(finder: Finder) -> None:
    # 43 s of clips and a few more frames.
    video = dataclasses.replace(long_video(43, dog=(10, 20)), num_frames=43 * RATE + 4, duration=43 + 4 / RATE)
    grounder = Grounder(finder)
    grounder.windows = Windows(43, 43, 10)
    assert len(grounder.cut(video)) == 1
    in_window = grounder.ground(video, "dog")
    grounder.windows = None
    assert in_window == grounder.ground(video, "dog")


def test_moment_in_two_windows_is_returned_once(finder: Finder) -> None:
    # The first window ends at 43 s.
    grounder = Grounder(finder)
    video = long_video(80, dog=(31, 40))
    assert [round(window.start, 1) for window in grounder.cut(video)] == [0.0, 28.0, 37.0]
    best, *others = grounder.ground(video, "dog")
    assert best.score > 0.9
    for other in others:
        overlap = temporal_iou(np.array([[best.start, best.end]]), np.array([[other.start, other.end]]))[0, 0]
        # The part after 37 s is another proposal, which soft-NMS keeps. The score of an equal moment decays by
        # exp(-IoU^2 / 0.4).
        assert overlap < 0.6 or other.score < 0.2


def test_merged_windows_respect_the_nms_threshold() -> None:
    grounder = Grounder(Noisy(PlantedBackend(Decoding(protocol="drn"))))
    actual = grounder.ground(long_video(300), "dog", top_k=200)
    spans = np.array([(moment.start, moment.end) for moment in actual])
    assert len(actual) > 20
    assert max(moment.end for moment in actual) > 280
    overlap = temporal_iou(spans, spans)[~np.eye(len(spans), dtype=bool)]
    # Seconds are rounded after NMS.
    assert overlap.max() <= 0.5 - HARD_NMS_MARGIN + 1e-5
    assert overlap.max() > 0.3


def test_windows_fall_back_to_full_video_only_once(finder: Finder) -> None:
    grounder = Grounder(finder)
    video = long_video(300, dog=(200, 210))
    actual, nothing = grounder.ground_batch([(video, "dog"), (video, "cat")])
    assert all(195 < moment.start < moment.end < 215 for moment in actual)
    # As published, the fallback applies once for the video, not for each window.
    assert nothing == [Moment(0.0, 300.0, 1.0)]


def test_short_videos_are_unaffected_by_long_ones_in_batch() -> None:
    grounder = Grounder(Finder(PlantedBackend()))
    grounder.windows = Windows(100.0, 43.0, 14.5)
    before = Grounder(Finder(PlantedBackend(), None))
    videos = [long_video(200, dog=(150, 160)), long_video(120, cat=(3, 9))]
    pairs = [PAIRS[0], (videos[0], "dog"), *PAIRS[1:4], (videos[1], "cat"), (videos[0], "cat dog"), *PAIRS[4:]]
    answers = grounder.ground_batch(pairs, batch_size=3)
    assert answers == [grounder.ground(*pair) for pair in pairs]
    long = (1, 5, 6)
    assert [answers[i] for i in range(len(pairs)) if i not in long] == before.ground_batch(PAIRS)
    assert [round(answers[index][0].start / 10) for index in long] == [15, 0, 15]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_split_model_encodes_each_window_once(batch_size: int) -> None:
    model = Finder(PlantedBackend())
    pair = PlantedPair(model)
    grounder = Grounder(pair)
    video = long_video(300, dog=(200, 210), cat=(20, 30))
    pairs = [(video, "dog"), (video, "cat"), (video, "person dog"), (video, "person runs cat")]
    expected = Grounder(model).ground_batch(pairs)
    assert grounder.ground_batch(pairs, batch_size=batch_size) == expected
    assert pair.encoded == len(grounder.cut(video)) == 11
    encoded = grounder.encode(video)
    assert isinstance(encoded, EncodedWindows)
    assert grounder.ground_batch([(encoded, query) for _, query in pairs]) == expected
    assert pair.encoded == 22
    assert grounder.encode(encoded) is encoded


def test_encoded_windows_survive_save_and_load(tmp_path: Path) -> None:
    grounder = Grounder(PlantedPair(Finder(PlantedBackend())))
    video = long_video(120, dog=(100, 110))
    encoded = grounder.encode(video)
    encoded.save(tmp_path / "long.npz")
    back = EncodedWindows.load(tmp_path / "long.npz")
    assert (back.windows, back.duration, back.name) == (tuple(grounder.cut(video)), 120.0, "long")
    assert [part.key for part in back.parts] == [part.key for part in encoded.parts]  # type: ignore[union-attr]
    assert grounder.ground(back, "dog") == grounder.ground(video, "dog")
    with raises(FeatureError, "unknown_format", "'drn-encoding/1'"):
        EncodedVideo.load(tmp_path / "long.npz")
    changed = dict(np.load(tmp_path / "long.npz"))
    changed["features"][1, 0, 0] += 1
    np.savez(tmp_path / "long.npz", **changed)
    with raises(FeatureError, "digest_mismatch", tmp_path / "long.npz"):
        EncodedWindows.load(tmp_path / "long.npz")


def test_encoded_windows_are_rejected_for_single_encoding() -> None:
    pair = Grounder(PlantedPair(Finder(PlantedBackend())))
    encoded = pair.encode(long_video(120))
    with raises(ModelFileError, "query_part_required", "long"):
        Grounder(PlantedBackend()).ground(encoded, "dog")
    with raises(ModelFileError, "query_part_required"):
        Grounder(Finder(PlantedBackend())).encode(long_video(120))
    with raises(FeatureError, "encoding_of_another_model", "long", "1" * 12, "2" * 12):
        Grounder(PlantedPair(Finder(PlantedBackend()), "2" * 64)).ground(encoded, "dog")
    with raises(FeatureError, "feature_width_mismatch", "long", "planted", 9, 8):
        pair.ground(long_video(120, dim=9), "dog")


def test_two_hour_video_is_grounded_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = long_video(7200, 256, dog=(5000, 5010), cat=(100, 112))
    assert video.features.shape == (21599, 256)
    np.save(tmp_path / "long.npy", video.features)
    size = (tmp_path / "long.npy").stat().st_size
    monkeypatch.setattr(videos_module, "MAPPED_BYTES", size - 1)
    backend: Backend = Finder(PlantedBackend(dim=256))
    grounder = Grounder(backend)
    backend.planted.batches = collections.deque(maxlen=1)  # type: ignore[attr-defined]
    queries = [" ".join(words) for words in itertools.product(("person", "runs", "opens", "door", ""), ("cat", "dog"))]
    tracemalloc.start()
    mapped = Video.load(tmp_path / "long.npy", video.duration, video.num_frames)
    answers = grounder.ground_batch([(mapped, query) for query in 2 * queries])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(mapped.features, np.memmap)
    # A batch of 32 windows has 1 MB, and the features 22 MB.
    assert peak < size / 4
    assert [round(moments[0].start / 100) for moments in answers] == 10 * [1, 50]


@pytest.mark.parametrize("sizes", [(50, 43, 22), (40, 43, 10), (50, 0, 0), (50, 43, -1), (1e9, 43, 10), ("50", 43, 10)])
def test_invalid_window_sizes_are_rejected(sizes: tuple[Any, ...]) -> None:
    with raises(ModelFileError, "invalid_setting"):
        Windows(*sizes)


def test_window_sizes_derive_from_training_durations() -> None:
    actual = Windows.of([10.0 * n for n in range(1, 22)], [float(n) for n in range(1, 22)])
    assert actual == Windows(longest=210.0, length=200.0, overlap=20.0)
    # If moments fill their videos, adjacent windows overlap by half.
    assert Windows.of([30.0, 30.0], [30.0, 29.0]) == Windows(30.0, 30.0, 15.0)
