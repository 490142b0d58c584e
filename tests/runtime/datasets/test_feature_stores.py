"""Test `runtime.datasets.feature_stores`: one feature file per video, or one HDF5 file."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import DeviceError, FeatureError, MissingFeatures, excerpt
from runtime.core.pooling import ClipTiming
from runtime.core.video import load_features
from runtime.datasets.dataset import DataSet
from runtime.datasets.feature_stores import FeatureArchive, FeatureFiles, open_store
from tests.raising import raises, records

h5py = pytest.importorskip("h5py", reason="features in HDF5 need h5py")

CLIPS = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return one file with groups for videos, as in ActivityNet, and datasets for videos, as in TACoS."""
    with h5py.File(tmp_path / "features.hdf5", "w") as file:
        file["v_a/c3d_features"] = CLIPS
        file["v_a/other"] = CLIPS + 1
        file["s1-d1"] = CLIPS + 2
        file["v_only/whatever"] = CLIPS + 3
        file["v_two/x"] = file["v_two/y"] = CLIPS
        file["v_big_endian"] = CLIPS.astype(">f4")
        file["v_words/c3d_features"] = np.ones((6, 4), np.int32)
    return tmp_path / "features.hdf5"


def test_hdf5_groups_and_datasets_load_by_video_name(published: Path) -> None:
    store = FeatureArchive(published)
    np.testing.assert_array_equal(store.load("v_a"), CLIPS)
    np.testing.assert_array_equal(store.load("s1-d1.avi"), CLIPS + 2)
    np.testing.assert_array_equal(store.load("v_only"), CLIPS + 3)
    np.testing.assert_array_equal(store.load("v_big_endian"), CLIPS)
    assert store.load("v_big_endian").dtype == np.float32
    assert store.num_clips("v_a") == 6
    assert store.path("v_a") == published


def test_missing_or_invalid_hdf5_entry_is_named(published: Path) -> None:
    store = FeatureArchive(published)
    for video, code, values in (
        ("v_gone", "missing_features", ["'v_gone'", "features.hdf5"]),
        ("v_two", "ambiguous_features", ["'v_two'", "features.hdf5", "'c3d_features'", "x, y"]),
        ("v_words", "wrong_array", ["'v_words'", "int32", "(6, 4)"]),
        ("v_a/other", "invalid_video_name", ["'v_a/other'"]),
    ):
        with raises(FeatureError, code, *values):
            store.load(video)


@pytest.mark.parametrize("other", ["v.npz", "v.avi.npy"])
def test_two_files_of_one_video_are_reported_once(tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "v.npy", CLIPS)
    np.save(tmp_path / "w.npy", CLIPS)
    (tmp_path / other).write_bytes((tmp_path / "v.npy").read_bytes())
    store = FeatureFiles(tmp_path)
    store.load("w")
    assert not caplog.records
    used = store.path("v.avi").name
    store.load("v.avi")
    assert used == ("v.npy" if other == "v.npz" else "v.avi.npy")
    assert len(records(caplog, logging.WARNING, "v.npy", other, code="ambiguous_features")) == len(caplog.records) == 1


def test_external_hdf5_links_are_not_followed(tmp_path: Path, published: Path) -> None:
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["v_out"] = h5py.ExternalLink(str(published), "/s1-d1")
        file["v_soft"] = h5py.SoftLink("/v_out")
        file["out"] = h5py.ExternalLink(str(published), "/")
        file["v_within"] = h5py.SoftLink("/out/s1-d1")
        file["v_inside/x"] = h5py.ExternalLink(str(published), "/s1-d1")
        (tmp_path / "raw.bin").write_bytes(CLIPS.tobytes())
        file.create_dataset("v_raw", (6, 4), "f4", external=[(str(tmp_path / "raw.bin"), 0, h5py.h5f.UNLIMITED)])
        layout = h5py.VirtualLayout((6, 4), "f4")
        layout[:] = h5py.VirtualSource(str(published), "s1-d1", (6, 4))
        file.create_virtual_dataset("v_virtual", layout)
    store = FeatureArchive(tmp_path / "links.h5")
    for video in ("v_out", "v_soft", "v_within", "v_inside", "v_raw", "v_virtual"):
        with raises(FeatureError, "features_outside_file"):
            store.load(video)


def test_soft_links_within_the_file_are_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["all/rgb/v_a"] = CLIPS
        file["v_absolute"] = h5py.SoftLink("/all/rgb/v_a")
        file["v_relative"] = h5py.SoftLink("all/./rgb//v_a")
        file["v_twice"] = h5py.SoftLink("v_absolute")
        file["rgb"] = h5py.SoftLink("/all/rgb")
        file["v_through"] = h5py.SoftLink("/rgb/v_a")
        file["v_group/c3d_features"] = h5py.SoftLink("/all/rgb/v_a")
        file["all/rgb/v_nested"] = h5py.SoftLink("v_a")
        file["v_nested"] = h5py.SoftLink("/all/rgb/v_nested")
        file["v_raw/x"] = CLIPS
        file["v_to_group"] = h5py.SoftLink("/v_raw")
        file["v_nothing"] = h5py.SoftLink("/all/gone")
        file["v_beyond"] = h5py.SoftLink("/all/rgb/v_a/x")
        file["v_circle"] = h5py.SoftLink("/v_circle")
        file["v_growing"] = h5py.SoftLink("v_growing/v_growing")
        file["v_here"], file["v_there"] = h5py.SoftLink("v_there"), h5py.SoftLink("v_here")
    store = FeatureArchive(tmp_path / "links.h5")
    for video in ("v_absolute", "v_relative", "v_twice", "v_through", "v_group", "v_nested", "v_to_group"):
        np.testing.assert_array_equal(store.load(video), CLIPS)
        assert store.num_clips(video) == len(CLIPS)
    for video in ("v_nothing", "v_beyond", "v_circle", "v_growing", "v_here"):
        with raises(FeatureError, "broken_link"):
            store.load(video)


def test_invalid_or_truncated_hdf5_file_is_named(tmp_path: Path, published: Path) -> None:
    (tmp_path / "text.h5").write_text("no features")
    (tmp_path / "short.h5").write_bytes(published.read_bytes()[:700])
    for name in ("text.h5", "short.h5"):
        with raises(FeatureError, "unreadable_file", tmp_path / name):
            FeatureArchive(tmp_path / name).load("v_a")
    with raises(FeatureError, "missing_file", tmp_path / "gone.h5"):
        FeatureArchive(tmp_path / "gone.h5").load("v_a")


def test_missing_h5py_error_names_install_command(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with raises(DeviceError, "missing_library", "pip install '.[hdf5]'"):
        FeatureArchive(published).load("v_a")


def test_stamp_and_content_depend_on_file_and_video(published: Path, tmp_path: Path) -> None:
    store = FeatureArchive(published)
    stamp, content, file_stamp = store.stamp("v_a"), store.content("v_a"), store.file_stamp("v_a")
    assert stamp != store.stamp("s1-d1")
    assert content != store.content("s1-d1")
    assert file_stamp == store.file_stamp("v_a")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["v_a"] = CLIPS
        file["v_new"] = CLIPS
    (tmp_path / "other.h5").replace(published)
    # The file that is open is not read any more.
    np.testing.assert_array_equal(store.load("v_new"), CLIPS)
    assert store.stamp("v_a") != stamp
    assert store.file_stamp("v_a") != file_stamp
    assert store.content("v_a") == content
    published.unlink()
    assert store.file_stamp("v_a") is None
    with raises(FeatureError, "missing_file", published):
        store.load("v_a")


def test_feature_files_match_with_or_without_video_suffix(tmp_path: Path) -> None:
    np.save(tmp_path / "s1-d1.npy", CLIPS)
    np.savez(tmp_path / "v_a.npz", features=CLIPS + 1)
    store = FeatureFiles(tmp_path)
    np.testing.assert_array_equal(store.load("s1-d1.avi"), CLIPS)
    np.testing.assert_array_equal(store.load("v_a"), CLIPS + 1)
    assert (store.num_clips("s1-d1"), store.num_clips("v_a")) == (6, 6)
    with raises(FeatureError, "invalid_video_name", "'../x'"):
        store.load("../x")


def test_features_in_two_places_are_rejected(tmp_path: Path, published: Path) -> None:
    assert isinstance(open_store(tmp_path, None), FeatureArchive)
    (tmp_path / "features").mkdir()
    with raises(FeatureError, "ambiguous_features", tmp_path, "features.hdf5", "features/"):
        open_store(tmp_path, None)
    published.rename(tmp_path / "a.h5")
    (tmp_path / "features").rmdir()
    (tmp_path / "b.hdf5").touch()
    with raises(FeatureError, "ambiguous_features", tmp_path, "a.h5", "b.hdf5"):
        open_store(tmp_path, None)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_decompression_bomb_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    load: Any = load_features
    if suffix == ".npz":
        monkeypatch.setattr("runtime.core.io.array_files.MAX_UNFOLDED_BYTES", 1000)
        np.savez_compressed(path, np.zeros((1000, 400), np.float32))
    else:
        load = lambda path: FeatureArchive(path).load("bomb")  # noqa: E731
        with h5py.File(path, "w") as file:
            # Chunks that are never written take no space.
            file.create_dataset("bomb", (200_000, 400), "f4", compression="gzip", chunks=(1000, 400))
    with raises(FeatureError, "unfolds_too_large", path):
        load(path)


def captions(directory: Path, entry: dict[str, Any], clips: int) -> DataSet:
    """Return a data set of one video with this number of clips."""
    entry = {"timestamps": [[0, 1]], "sentences": ["A man sits."], **entry}
    (directory / "train.json").write_text(json.dumps({"v.avi": entry}))
    (directory / "features").mkdir()
    np.save(directory / "features" / "v.npy", np.random.default_rng(0).random((clips, 4), np.float32))
    return DataSet(directory)


def test_frame_count_is_derived_from_clips_when_missing(tmp_path: Path) -> None:
    data_set = captions(tmp_path, {"duration": 60.0}, clips=100)
    assert data_set.video("v.avi").num_frames == data_set.frames("v.avi") == ClipTiming().num_frames(100)


def test_mismatched_frame_count_splits_clips_with_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "fits").mkdir()
    (tmp_path / "other").mkdir()
    entry = {"fps": 30.0, "num_frames": 1000}
    assert captions(tmp_path / "fits", entry, clips=ClipTiming().num_clips(1000) - 1).frames("v.avi") == 1000
    assert not caplog.records
    # Half of the expected clips, as with a window of 64 and a stride of 16 frames.
    data_set = captions(tmp_path / "other", entry, clips=60)
    with caplog.at_level(logging.WARNING, "drn"):
        video = data_set.video("v.avi")
        data_set.frames("v.avi")
    assert len(caplog.records) == len(records(caplog, logging.WARNING, "'v.avi'", 60, 1000, 124)) == 1
    segments = video.segments(4)
    np.testing.assert_allclose(segments.spans[:, 0], [0, 0.25, 0.5, 0.75], atol=0.01)
    # The last segment has the last quarter of the clips, and segments do not repeat one clip.
    np.testing.assert_array_equal(segments.features[-1], video.features[45:].max(axis=0))


def test_crash_or_hang_of_hdf5_reader_raises_one_error(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureArchive(published)
    expected = store.load("v_a")
    for timeout_s in (60, 0.2):
        process = store._reader._process
        assert process is not None
        # A stopped process does not reply to any request.
        os.kill(process.pid, signal.SIGSTOP)
        if timeout_s == 60:
            threading.Timer(0.2, process.kill).start()
        with monkeypatch.context() as patch, raises(FeatureError, "damaged_file", published):
            patch.setattr("runtime.core.io.hdf5_reader.TIMEOUT_S", timeout_s)
            store.load("v_a")
        np.testing.assert_array_equal(store.load("v_a"), expected)


def test_archive_is_read_by_threads_and_forked_processes(published: Path) -> None:
    store = FeatureArchive(published)
    expected = store.load("v_a")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        read = list(pool.map(store.load, ["v_a"] * 40))
    with multiprocessing.get_context("fork").Pool(2) as processes:
        read += processes.map(store.load, ["v_a"] * 4)
    for features in (*read, store.load("v_a")):
        np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize(
    ("archive", "stored", "requested"),
    [
        (False, "Vid\u00e9o1", "Vide\u0301o1"),
        (False, "Vide\u0301o1", "Vid\u00e9o1.mp4"),
        (False, "v_ABC", "v_abc"),
        (True, "Vide\u0301o1", "Vid\u00e9o1.mp4"),
    ],
)
def test_missing_features_error_names_similar_video(tmp_path: Path, archive: bool, stored: str, requested: str) -> None:
    store: FeatureFiles | FeatureArchive
    if archive:
        with h5py.File(tmp_path / "features.h5", "w") as file:
            file[stored] = CLIPS
        store = FeatureArchive(tmp_path / "features.h5")
    else:
        np.save(tmp_path / f"{stored}.npy", CLIPS)
        store = FeatureFiles(tmp_path)
    for _ in range(2):
        with raises(MissingFeatures, "missing_features", excerpt(stored)):
            store.load(requested)
    with pytest.raises(MissingFeatures) as caught:
        store.load("other")
    assert stored not in str(caught.value)
