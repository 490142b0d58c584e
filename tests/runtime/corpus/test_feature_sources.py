"""A data set, a directory and Parquet give the same videos, and an error affects one video only."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import AnnotationError, DeviceError, GroundingError
from runtime.core.pooling import ClipTiming
from runtime.core.video import Video
from runtime.corpus.feature_sources import DataSetSource, VideoRef, open_source
from runtime.datasets.dataset import NOTES, DataSet
from tests.annotated import write_qvhighlights
from tests.raising import quotes, raises, records

pa = pytest.importorskip("pyarrow", reason="Parquet needs the extra [corpus]")
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("unchecked")

CLOCK = ClipTiming()
RNG = np.random.default_rng(0)
FEATURES = {f"v{index}": RNG.random((index + 2, 4)).astype(np.float32) for index in range(5)}
LENGTHS = {name: 1.5 * len(features) for name, features in FEATURES.items()}

Cell = Callable[[np.ndarray], Any]


def loaded(path: Path) -> dict[str, Video | str]:
    source = open_source(path)
    listing = source.listing()
    return {video.name: actual for video, actual in zip(listing, source.load(listing, CLOCK), strict=True)}


def check(actual: dict[str, Video | str]) -> None:
    assert list(actual) == list(FEATURES)
    for name, video in actual.items():
        assert isinstance(video, Video), video
        np.testing.assert_array_equal(video.features, FEATURES[name])
        assert (video.name, video.duration) == (name, LENGTHS[name])
        assert video.num_frames == CLOCK.num_frames(len(FEATURES[name]))
        # Pool the features as the network does.
        video.segments(8)


def write_parquet(path: Path, features: Any, group_rows: int = 2, options: Any = None, **columns: Any) -> Path:
    table = {"video": list(FEATURES), "duration": list(LENGTHS.values()), "features": features, **columns}
    parquet.write_table(pa.table(table), path, row_group_size=group_rows, **(options or {}))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_directory_with_durations_loads_videos(tmp_path: Path, suffix: str) -> None:
    for name, features in FEATURES.items():
        (np.save if suffix == ".npy" else np.savez)(tmp_path / f"{name}{suffix}", features)
    (tmp_path / "durations.json").write_text(json.dumps(LENGTHS))
    check(loaded(tmp_path))
    entry = {"duration": 3.0, "num_frames": 31}
    (tmp_path / "durations.json").write_text(
        json.dumps({**LENGTHS, "v0": entry, "v1": None, "none": 2.0, "../v2": 1.0})
    )
    actual = loaded(tmp_path)
    assert isinstance(actual["v0"], Video)
    assert (actual["v0"].duration, actual["v0"].num_frames) == (3.0, 31)
    assert quotes(str(actual["v1"]), "durations.json", "'v1'")
    assert quotes(str(actual["none"]), "'none'")
    assert quotes(str(actual["../v2"]), "'../v2'")
    assert isinstance(actual["v4"], Video)


def test_directory_reports_one_duration_in_another_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = CLOCK.num_frames(60)
    lengths = {f"v{index}": frames / 24 for index in range(6)}
    lengths |= {"ms": 1000 * frames / 24, "frames": frames, "v9": 0}
    (tmp_path / "durations.json").write_text(json.dumps(lengths))
    for name in lengths:
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((60, 4)))
    videos = loaded(tmp_path)
    assert {name for name, video in videos.items() if isinstance(video, str)} == {"ms", "v9"}
    assert quotes(str(videos["ms"]), "ms", frames, f"{lengths['ms']:g}")
    assert len(records(caplog, logging.WARNING, "frames", 1, 24, code="frame_rate_out_of_range")) == 1
    assert len(caplog.records) == 1


def test_directory_rejects_names_sharing_a_feature_file(tmp_path: Path) -> None:
    np.save(tmp_path / "v0.npy", FEATURES["v0"])
    for first, second in (("v0", "v0.avi"), ("v0.mp4", "v0.avi"), ("v0.MKV", "v0.webm")):
        (tmp_path / "durations.json").write_text(json.dumps({first: 3.0, second: 3.0}))
        with raises(AnnotationError, "ambiguous_video_name"):
            open_source(tmp_path)
        (tmp_path / "durations.json").write_text(json.dumps({first: 3.0, "v0.other": 3.0}))
        assert isinstance(loaded(tmp_path)[first], Video)


def change_features(path: Path, group: int, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of the features column of a row group."""
    group_of = parquet.ParquetFile(path).metadata.row_group(group)
    columns = [group_of.column(index) for index in range(group_of.num_columns)]
    column = next(column for column in columns if "features" in column.path_in_schema)
    content, start = path.read_bytes(), column.dictionary_page_offset or column.data_page_offset
    end = start + column.total_compressed_size
    path.write_bytes(content[:start] + change(content[start:end]) + content[end:])


@pytest.mark.parametrize(
    ("kind", "cell", "columns"),
    [
        (pa.list_(pa.list_(pa.float32())), lambda f: f.tolist(), ()),
        (pa.large_list(pa.list_(pa.float32(), 4)), lambda f: f.tolist(), ()),
        (pa.list_(pa.float32()), lambda f: f.ravel().tolist(), ("shape",)),
        (pa.binary(), lambda f: f.tobytes(), ("shape",)),
        (pa.large_binary(), lambda f: f.astype("<f8").tobytes(), ("shape", "dtype")),
        (
            pa.struct({"data": pa.list_(pa.float32()), "shape": pa.list_(pa.int64())}),
            lambda f: {"data": f.ravel().tolist(), "shape": list(f.shape)},
            (),
        ),
    ],
    ids=["lists", "fixed lists", "numbers and shape", "bytes", "bytes of another type", "Ray Data's tensors"],
)
def test_parquet_loads_each_column_type(tmp_path: Path, kind: Any, cell: Cell, columns: tuple[str, ...]) -> None:
    about = {"shape": [list(f.shape) for f in FEATURES.values()], "dtype": ["float64"] * len(FEATURES)}
    cells = pa.array([cell(features) for features in FEATURES.values()], kind)
    path = write_parquet(tmp_path / "features.parquet", cells, **{name: about[name] for name in columns})
    check(loaded(path))
    check(loaded(tmp_path))


def test_parquet_loads_fixed_shape_tensors(tmp_path: Path) -> None:
    values = RNG.random((5, 3, 4)).astype(np.float32)
    write_parquet(tmp_path / "tensors.parquet", pa.FixedShapeTensorArray.from_numpy_ndarray(values))
    for video, expected in zip(loaded(tmp_path).values(), values, strict=True):
        assert isinstance(video, Video)
        np.testing.assert_array_equal(video.features, expected)


def test_rows_across_files_and_groups_keep_their_order(tmp_path: Path) -> None:
    cells = pa.array([f.tolist() for f in FEATURES.values()])
    write_parquet(tmp_path / "b.parquet", cells, 2)
    table = pa.table({"video": ["w"], "duration": [2.0], "features": [[[1.0, 2.0]]], "num_frames": [40]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path)
    listing = source.listing()
    assert [video.name for video in listing] == ["w", *FEATURES]
    for start in range(len(listing)):
        actual = list(source.load(listing[start : start + 3], CLOCK))
        assert [video.name for video in actual] == [video.name for video in listing[start : start + 3]]
    assert next(source.load(listing, CLOCK)).num_frames == 40


def test_invalid_parquet_row_fails_only_that_row(tmp_path: Path) -> None:
    good, ragged, hollow, infinite = [[1.0, 2.0]] * 3, [[1.0], [1.0, 2.0], [3.0]], [[1.0, None]], [[1.0, np.inf]]
    cells = pa.array([good, ragged, None, hollow, infinite], pa.list_(pa.list_(pa.float32())))
    actual = [*loaded(write_parquet(tmp_path / "features.parquet", cells)).values()]
    assert isinstance(actual[0], Video)
    values = ["[1, 2]", "'v2'", "v3", "v4"]
    for problem, value in zip(actual[1:], values, strict=True):
        assert quotes(str(problem), value)
    numbers = pa.array([f.ravel().tolist() for f in FEATURES.values()])
    shapes = [None, [4], [2, 2], [5, 4], [-6, -4]]
    actual = [*loaded(write_parquet(tmp_path / "features.parquet", numbers, shape=shapes)).values()]
    assert [isinstance(video, Video) for video in actual] == [False, False, False, True, False]
    assert quotes(str(actual[0]), "shape")
    for column, columns, value in (
        ([["a"]] * 5, {}, "string"),
        ([1] * 5, {}, "int64"),
        ([{"x": [1.0]}] * 5, {}, "struct<x"),
        (cells, {"num_frames": [{"x": 1}] * 5}, "{'x': 1}"),
        ([b"abc"] * 5, {"shape": [[1, 1]] * 5}, "'v0'"),
    ):
        path = write_parquet(tmp_path / "features.parquet", pa.array(column), **columns)
        assert quotes(str(loaded(path)["v0"]), value)


def test_damaged_row_group_fails_only_its_videos(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "f.parquet", [features.tolist() for features in FEATURES.values()])
    change_features(path, 1, lambda column: b"\xff" * len(column))
    actual = loaded(path)
    assert [name for name, video in actual.items() if isinstance(video, Video)] == ["v0", "v1", "v4"]
    for name in ("v2", "v3"):
        assert quotes(actual[name], repr(name))
        assert "\n" not in actual[name]


@pytest.mark.parametrize("options", [{"compression": "none", "use_dictionary": False}, {"data_page_version": "2.0"}])
def test_parquet_page_checksums_are_compared(tmp_path: Path, options: dict[str, Any]) -> None:
    cells = [features.tolist() for features in FEATURES.values()]
    path = write_parquet(tmp_path / "features.parquet", cells, 5, {"write_page_checksum": True, **options})
    check(loaded(path))
    # The lowest bits of a value, which make another valid one.
    change_features(path, 0, lambda column: column[:-4] + bytes([column[-4] ^ 1]) + column[-3:])
    for name, problem in loaded(path).items():
        assert isinstance(problem, str), name
        assert quotes(problem, repr(name), path)


@pytest.mark.parametrize(
    ("columns", "code", "values"),
    [
        ({"name": ["a"]}, "missing_columns", ["'video'"]),
        ({"video": ["a"], "duration": [1.0]}, "missing_columns", ["'features'"]),
        ({"video": ["a", "a"], "duration": [1.0, 1.0], "features": [[[1.0]]] * 2}, "ambiguous_video_name", ["'a'"]),
        ({"video": [None, "a"], "duration": [1.0, 1.0], "features": [[[1.0]]] * 2}, "invalid_video_name", ["None"]),
        ({"video": pa.array([], pa.string()), "duration": [], "features": []}, "empty_file", []),
        ({"video": [["a"]], "duration": [1.0], "features": [[[1.0]]]}, "invalid_video_name", ["list<element: string>"]),
    ],
)
def test_parquet_wrong_columns_fail(tmp_path: Path, columns: dict[str, Any], code: str, values: list[str]) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "features.parquet")
    with raises(GroundingError, code, *values):
        open_source(tmp_path).listing()


def test_invalid_feature_source_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises(GroundingError, "missing_file", tmp_path / "none"):
        open_source(tmp_path / "none")
    (tmp_path / "features.parquet").write_text("no Parquet")
    with raises(GroundingError, "damaged_file", tmp_path / "features.parquet"):
        open_source(tmp_path).listing()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with raises(DeviceError, "missing_library", "pip install '.[corpus]'"):
        open_source(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "durations.json").write_text("[]")
    with raises(GroundingError, "unexpected_structure", other / "durations.json"):
        open_source(other)
    for name in ("features.parquet", "features.h5"):
        (other / name).touch()
        with raises(GroundingError, "ambiguous_features", name, "durations.json"):
            open_source(other)
        (other / name).unlink()


def test_missing_library_is_not_reported_per_video(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise DeviceError("no h5py")

    source = open_source(mini)
    monkeypatch.setattr("runtime.datasets.dataset.DataSet.video", lacking)
    with raises(DeviceError, "device_unavailable", "no h5py"):
        next(source.load([VideoRef("AAAA1")], CLOCK))


def test_digest_depends_on_durations_and_offsets(mini: Path) -> None:
    before = open_source(mini).digest()
    for offset, same in ((4.0, False), (0.0, True)):
        (mini / NOTES).write_text(json.dumps({"videos": {"AAAA1": {"offset": offset}}}))
        assert (open_source(mini).digest() == before) is same
    table = json.loads((mini / "Charades_duration.json").read_text())
    (mini / "Charades_duration.json").write_text(json.dumps({**table, "AAAA1": 31.0}))
    assert open_source(mini).digest() != before


def test_digest_depends_on_clip_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_qvhighlights(tmp_path)
    digests = set()
    for stride in (8, 16):
        features = dataclasses.replace(DataSet(tmp_path).preset.features, stride=stride)
        preset = dataclasses.replace(DataSet(tmp_path).preset, features=features)
        with monkeypatch.context() as patch:
            patch.setattr(DataSet, "preset", preset, raising=False)
            digests.add(DataSetSource(tmp_path).digest())
    assert len(digests) == 2
