"""Test `runtime.core.video`: feature files, clip timing, and pooling of clips into segments."""

from __future__ import annotations

import math
import pickle
import re
import struct
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.errors import FeatureError
from runtime.core.io import torch_reader
from runtime.core.pooling import ClipTiming, max_over_rows, pool_segments, segment_rows
from runtime.core.video import Origin, Video, load_features
from tests.array_bytes import npy, npz, zipped
from tests.raising import raises


def naive_rows(num_frames: int, num_segments: int, pooling: str) -> tuple[list[list[int]], list[tuple]]:
    """Return the clips and the borders in frames of each segment, for windows of 16 frames every 8.

    Computes in integers, one segment at a time, like the published loader and that of the authors.
    """
    rows, borders = [], []
    for index in range(num_segments):
        if pooling == "mmaction2":
            start = (num_frames - 1) * index // num_segments
            end = (num_frames - 1) * (index + 1) // num_segments
            rows.append(list(range(start // 8, end // 8 + 1)))
        else:
            start, end = (math.floor(1 + Fraction((num_frames - 1) * k, num_segments)) for k in (index, index + 1))
            if end - start <= 16:
                rows.append([start // 8])
            else:
                rows.append(list(range(start // 8, (end - 1) // 8 + 1)))
        borders.append((start, end))
    return rows, borders


def naive_pooling(features: np.ndarray, rows: list[list[int]]) -> list[list[float]]:
    last = len(features) - 1
    return [
        [max(float(features[min(row, last), channel]) for row in clips) for channel in range(features.shape[1])]
        for clips in rows
    ]


@settings(max_examples=200)
@given(
    num_frames=st.integers(2, 40) | st.integers(2, 3000),
    num_clips=st.integers(1, 60),
    num_segments=st.sampled_from([4, 8, 16, 32, 64]),
    pooling=st.sampled_from(["mmaction2", "drn"]),
    seed=st.integers(0, 9),
)
def test_pooling_equals_naive_loop_over_published_rule(
    num_frames: int, num_clips: int, num_segments: int, pooling: str, seed: int
) -> None:
    features = np.random.default_rng(seed).normal(size=(num_clips, 3)).astype(np.float32)
    segments = pool_segments(features, num_frames, num_segments, pooling, ClipTiming())  # type: ignore[arg-type]
    rows, borders = naive_rows(num_frames, num_segments, pooling)
    assert segments.features.tolist() == naive_pooling(features, rows)
    assert segments.spans.dtype == np.float64
    assert segments.spans.tolist() == [[start / num_frames, end / num_frames] for start, end in borders]


@given(st.integers(2, 5000), st.integers(1, 100))
def test_segments_of_any_count_cover_video_without_gaps(num_frames: int, num_segments: int) -> None:
    for pooling, first, last in (("mmaction2", 0, num_frames - 1), ("drn", 1, num_frames)):
        start, stop, spans = segment_rows(num_frames, num_segments, pooling, ClipTiming())  # type: ignore[arg-type]
        assert len(start) == len(stop) == len(spans) == num_segments
        assert (start <= stop).all()
        assert (spans[0, 0], spans[-1, 1]) == (first / num_frames, last / num_frames)
        assert (spans[1:, 0] == spans[:-1, 1]).all()
        assert (spans[:, 0] <= spans[:, 1]).all()


def test_segments_match_hand_computed_clips() -> None:
    # 33 frames in 2 segments of mmaction2: frames 0-16 and 16-32, so clips 0-2 and 2-4.
    video = Video(np.arange(5, dtype=np.float32)[:, None], 33, 1.0)
    assert video.segments(2).features.tolist() == [[2], [4]]
    assert video.segments(2).spans.tolist() == [[0, 16 / 33], [16 / 33, 32 / 33]]
    # Of the authors: frames 1-17 and 17-33, both one window long: clips 0 and 2.
    assert video.segments(2, "drn").features.tolist() == [[0], [2]]
    # 37 frames: 1-19 and 19-37, longer than a window: clips 0-2 and 2-4.
    assert Video(video.features, 37, 1.0).segments(2, "drn").features.tolist() == [[2], [4]]


def test_pooling_depends_on_clip_timing() -> None:
    features = np.arange(40, dtype=np.float32)[:, None]
    assert pool_segments(features, 33, 2, "mmaction2", ClipTiming(1, 1)).features.tolist() == [[16], [32]]
    assert pool_segments(features, 33, 2, "mmaction2", ClipTiming()).features.tolist() == [[2], [4]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_segments_are_float32_for_any_stored_dtype(dtype: type) -> None:
    # Converted once for a video, not for each query.
    assert Video(np.arange(18).reshape(9, 2).astype(dtype), 100, 3.0).segments(32).features.dtype == np.float32


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 64))
def test_frames_and_clips_are_inverse_to_within_one_stride(num_clips: int, window: int, stride: int) -> None:
    clock = ClipTiming(window, stride)
    frames = clock.num_frames(num_clips)
    assert (clock.num_clips(1), ClipTiming().num_clips(900)) == (1, 111)
    assert clock.num_clips(frames) == num_clips
    assert clock.num_clips(frames + stride - 1) == num_clips
    assert clock.num_clips(frames + stride) == num_clips + 1


def test_segments_are_cached_per_segment_count_and_rule() -> None:
    video = Video(np.arange(18.0).reshape(9, 2), 100, 3.0)
    assert video.segments(32) is video.segments(32)
    assert video.segments(32) is not video.segments(16)
    with raises(FeatureError, "invalid_setting", "'mean'"):
        video.segments(32, "mean")  # type: ignore[arg-type]


def test_missing_frame_count_is_derived_from_clips(tmp_path: Path) -> None:
    np.save(tmp_path / "door.npy", np.ones((115, 4), np.float32))
    video = Video.load(tmp_path / "door.npy", duration=30.96)
    assert (video.num_frames, video.duration, video.name) == (928, 30.96, "door")
    video = Video.load(tmp_path / "door.npy", 30.96, num_frames=930, name="hall")
    assert (video.num_frames, video.name) == (930, "hall")
    assert Video.load(tmp_path / "door.npy", 30.96, clock=ClipTiming(4, 4)).num_frames == 460


def test_npy_and_pt_files_load_same_features(golden: Path, tmp_path: Path) -> None:
    source = golden / "mini" / "C3D_unit16_overlap0.5_merged" / "AAAA1.pt"
    features = load_features(source)
    assert features.dtype == np.float32
    np.save(tmp_path / "AAAA1.npy", features)
    np.testing.assert_array_equal(load_features(tmp_path / "AAAA1.npy"), features)


@pytest.mark.parametrize(
    ("num_frames", "duration", "code"),
    [
        *[(100, duration, "invalid_frame_count") for duration in (0, -1, math.nan, math.inf, 1e300)],
        *[(count, 3.0, "invalid_frame_count") for count in (1, 0, -5, 1 << 40)],
        *[(90, 90.1, "frame_rate_out_of_range"), (241, 1.0, "frame_rate_out_of_range")],
    ],
)
def test_impossible_video_length_is_rejected(num_frames: int, duration: float, code: str) -> None:
    with raises(FeatureError, code, "kitchen", duration if num_frames == 100 else num_frames):
        Video(np.ones((9, 2)), num_frames, duration, name="kitchen")


def test_frame_rates_and_large_values_within_limits_are_accepted() -> None:
    for num_frames, duration in ((90, 90.0), (240, 1.0)):
        Video(np.ones((9, 2)), num_frames, duration)
    with np.errstate(all="raise"):
        Video(np.full((400, 400), 6e4, np.float16), 100, 1.0)
        Video(np.full((20, 20), 1.7e308), 100, 1.0)


@pytest.mark.parametrize("field", ["duration", "num_frames", "offset"])
@pytest.mark.parametrize("value", ["21", None, True, [21], 3j, b"21", np.full(3, 21.0), np.array("21"), object()])
def test_video_field_of_wrong_type_is_rejected(field: str, value: Any) -> None:
    with raises(FeatureError, "invalid_argument", field):
        Video(np.ones((9, 2)), **{"num_frames": 100, "duration": 4.0, "offset": 0.0, field: value})


def test_video_num_frames_accepts_integers_only() -> None:
    for value, code, named in (
        (100.5, "invalid_argument", ["num_frames", 100.5]),
        (math.nan, "invalid_argument", ["num_frames", "nan"]),
        (math.inf, "invalid_argument", ["num_frames", "inf"]),
        (10**400, "invalid_frame_count", []),
    ):
        with raises(FeatureError, code, *named):
            Video(np.ones((9, 2)), value, 4.0)  # type: ignore[arg-type]
    for number in (np.int64(100), np.float32(100), np.array(100), 100.0):
        assert Video(np.ones((9, 2)), number, number / 25).end == 4.0  # type: ignore[arg-type]


CONSTANT = {
    "zero": np.zeros((9, 3), np.float32),
    "equal_rows": np.tile(np.arange(3.0), (3000, 1)),
    "single_zero": np.zeros((1, 3)),
    "tiny": 1e-30 * np.random.default_rng(0).normal(size=(9, 3)),
    "tiny_half": (1e-7 * np.arange(27).reshape(9, 3) / 27).astype(np.float16),
    "rounded": (100 + 1e-5 * np.random.default_rng(0).normal(size=(9, 3))).astype(np.float32),
    "huge": np.full((9, 3), 60000, np.float16),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_video_constant_features_are_rejected(kind: str) -> None:
    video = Video(CONSTANT[kind], ClipTiming().num_frames(len(CONSTANT[kind])), 1.0 + len(CONSTANT[kind]) / 4)
    with raises(FeatureError, "constant_features"):
        video.segments(4)


def test_nearly_constant_or_single_clip_video_is_accepted() -> None:
    noise = np.random.default_rng(0).normal(size=(9, 3))
    varying = [100 + 1e-2 * noise, (0.01 + 1e-4 * noise).astype(np.float32), np.float16([[-6e4], [6e4]])]
    for row in (0, 1, 1500, 2999):
        varying.append(np.zeros((3000, 3)))
        varying[-1][row, 1] = 1e-4
    for features in (*varying, np.ones((1, 3))):
        Video(features, ClipTiming().num_frames(len(features)), 1 + len(features) / 4).check(ClipTiming())


@pytest.mark.parametrize(
    ("num_frames", "num_clips"),
    # Four times as many clips, a quarter, and just above the limit; also for short videos.
    [(928, 460), (928, 28), (928, 173), (928, 76), (32, 12), (48, 20), (80, 1), (16, 4)],
)
def test_video_clips_contradicting_frames_are_rejected(num_frames: int, num_clips: int) -> None:
    video = Video(np.arange(num_clips + 1.0)[:num_clips, None], num_frames, num_frames / 30)
    with raises(FeatureError, "clip_timing_mismatch") as raised:
        video.segments(4)
    assert {str(num_frames), str(num_clips)} <= set(re.findall(r"\d+", str(raised.value)))


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "warned"),
    [
        (928, 115, False),
        (928, 104, False),
        (928, 90, True),
        (928, 150, True),
        (16, 3, True),
        (40, 2, True),
        (24, 1, False),
    ],
)
def test_video_clips_near_frames_are_accepted(
    num_frames: int, num_clips: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    origin = Origin()
    for _ in range(2):
        Video(np.arange(num_clips + 1.0)[1:, None], num_frames, num_frames / 30, origin=origin).segments(4)
    assert len(caplog.records) == warned


@pytest.mark.parametrize(
    ("features", "code", "values"),
    [
        (np.ones(4), "wrong_array", ["(4,)"]),
        (np.ones((2, 3), complex), "wrong_array", ["complex128"]),
        ([[1.0, 2.0]], "wrong_array", ["list"]),
        (np.ones((0, 4)), "no_clips", ["(0, 4)"]),
        (np.ones((4, 0)), "no_clips", ["(4, 0)"]),
        (np.array([[1.0, 2.0], [np.nan, np.inf]]), "non_finite_features", [2, "clip 1"]),
        (np.array([[1.0], [np.inf]], np.float16), "non_finite_features", [1, "clip 1"]),
        (np.array([[np.inf], [-np.inf]]), "non_finite_features", [2]),
        (np.full((9, 2), 1e38, np.float32), "features_too_large", ["1.0e+38"]),
    ],
)
def test_unusable_features_are_rejected_naming_the_video(features: np.ndarray, code: str, values: list[object]) -> None:
    with raises(FeatureError, code, "kitchen", *values), np.errstate(all="raise"):
        Video(features, 100, 1.0, "kitchen")


def with_size(content: bytes, size: int) -> bytes:
    """Return an archive whose directory gives this size of its last member."""
    offset = content.rindex(b"PK\1\2") + 24
    return content[:offset] + struct.pack("<I", size) + content[offset + 4 :]


ONES = np.ones((10, 10), np.float32)
BAD_FILES = {
    "empty.npy": (b"", "empty_file"),
    "gone.npy": (None, "missing_file"),
    "npz.npy": (npz(a=ONES), "ambiguous_features"),
    "text.npy": (b"not an array", "damaged_file"),
    "integers.npy": (npy(ONES.astype(int)), "wrong_array"),
    "two.npz": (npz(a=ONES, b=ONES), "damaged_file"),
    "none.npz": (npz(), "ambiguous_features"),
    "objects.npz": (npz(a=np.array([{}], object)), "damaged_file"),
    "text.npz": (b"PK no archive", "damaged_file"),
    "text_inside.npz": (zipped(b"1 2 3", "features.txt"), "damaged_file"),
    "bzip2.npz": (zipped(npy(ONES), kind=zipfile.ZIP_BZIP2), "damaged_file"),
    "lzma.npz": (zipped(npy(ONES), kind=zipfile.ZIP_LZMA), "damaged_file"),
    "checksum.npz": (npz(a=ONES).replace(ONES.tobytes(), (2 * ONES).tobytes()), "damaged_file"),
    "size.npz": (with_size(zipped(npy(np.zeros(10**6)), kind=zipfile.ZIP_DEFLATED), 200), "damaged_file"),
    "text.pt": (b"not a tensor", "not_a_torch_file"),
    # A dict as written by torch before 1.6.
    "dict.pt": (
        b"".join(pickle.dumps(part, 2) for part in (torch_reader.MAGIC_NUMBER, 1001, {}, {"a": 1}, [])),
        "wrong_array",
    ),
    "features.txt": (b"1 2 3", "wrong_suffix"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_without_features_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    content, code = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with raises(FeatureError, code, tmp_path / name):
        Video.load(tmp_path / name, 1.0)


def test_features_load_without_torch(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    source = golden / "mini" / "C3D_unit16_overlap0.5_merged" / "CCCC3.pt"
    assert Video.load(source, 1.33, 32).features.shape[1] == 16


def test_pooled_segments_and_spans_equal_published_loader(golden: Path) -> None:
    from runtime.datasets.dataset import DataSet

    reference = np.load(golden / "dataset_mini.npz")
    data_set = DataSet(golden / "mini")
    for index in range(7):
        video = data_set.video(str(reference[f"mini_{index}_vid_name"]))
        assert video.num_frames == reference[f"mini_{index}_num_frames"]
        segments = video.segments(int(reference[f"mini_{index}_num_proposals"]))
        np.testing.assert_array_equal(segments.features, reference[f"mini_{index}_pooled"])
        np.testing.assert_array_equal(segments.spans, reference[f"mini_{index}_proposals"])
        assert segments.features.dtype == reference[f"mini_{index}_pooled"].dtype


def test_max_over_rows_is_exact_for_float16() -> None:
    finite = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    features = np.random.default_rng(0).permutation(finite)[:63360].reshape(40, -1)
    first, last = np.array([0, 3, 39, 12]), np.array([5, 3, 45, 30])
    pooled = max_over_rows(features, first, last)
    assert pooled.dtype == np.float16
    for row, start, stop in zip(pooled, first, last, strict=True):
        assert np.array_equal(row, features[start : stop + 1].max(axis=0))
