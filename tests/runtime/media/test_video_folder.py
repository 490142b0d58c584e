"""Test `runtime.media.video_folder`, and `runtime.extract` on directories."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import CheckFailed, VideoFileError
from runtime.datasets.dataset import DataSet
from runtime.extract import extract
from runtime.media.extractors import ClipExtractor
from runtime.media.video_folder import videos_in
from tests.films import film, truncated
from tests.raising import raises, records

pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the extractors of these tests")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of two videos, one of them in a subdirectory, and of files that are no videos."""
    (tmp_path / "videos" / "day two").mkdir(parents=True)
    film(tmp_path / "videos" / "hall.mkv", 40)
    yard = film(tmp_path / "videos" / "day two" / "Yard.mp4", 48)
    yard.rename(yard.with_suffix(".MP4"))
    for name in ("notes.txt", ".hidden.mp4", "mp4"):
        (tmp_path / "videos" / name).write_text("no video")
    return tmp_path / "videos"


def test_videos_in_lists_files_and_no_link_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [path.relative_to(folder).as_posix() for path in videos_in(folder)] == ["day two/Yard.MP4", "hall.mkv"]
    (tmp_path / "other").mkdir()
    outside = film(tmp_path / "other" / "outside.mkv", 40)
    (folder / "linked.mkv").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "loop").symlink_to(folder)
    (folder / "again.mkv").symlink_to("hall.mkv")
    assert {path.name for path in videos_in(folder)} == {"Yard.MP4", "hall.mkv", "again.mkv"}
    assert records(caplog, logging.WARNING, folder / "linked.mkv")


def test_damaged_video_is_skipped_with_exit_code_1(
    folder: Path, tmp_path: Path, tiny: Path, run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = truncated(film(tmp_path / "w.mkv", 90), folder / "cut.mkv")
    (folder / "text.avi").write_text("no video")
    outcome = run_command(extract, folder, "--extractor", tiny, "--output", tmp_path / "data", code=1)
    assert isinstance(outcome.error, CheckFailed)
    assert outcome.error.code == "videos_failed"
    assert records(caplog, logging.WARNING, damaged)
    assert records(caplog, logging.WARNING, folder / "text.avi")
    assert DataSet(tmp_path / "data").durations.keys() == {"hall", "Yard"}


def test_repeated_extraction_extracts_new_videos_only(
    folder: Path, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract((folder,), tiny, tmp_path / "data")
    named = DataSet(extract((folder / "hall.mkv",), tiny, tmp_path / "named"))
    film(folder / "new.mkv", 40)
    shapes: list[int] = []
    run = ClipExtractor.extract
    monkeypatch.setattr(ClipExtractor, "extract", lambda self, clips: (shapes.append(len(clips)), run(self, clips))[1])
    extract((folder,), tiny, tmp_path / "data")
    assert shapes == [4]
    data = DataSet(tmp_path / "data")
    assert data.durations.keys() == {"hall", "Yard", "new"}
    assert (data.video("hall").features == named.video("hall").features).all()


def test_equal_names_in_subdirectories_are_rejected(folder: Path, tmp_path: Path, tiny: Path) -> None:
    film(folder / "day two" / "hall.mkv", 40)
    with raises(VideoFileError, "ambiguous_video_name", folder / "hall.mkv", "hall"):
        extract((folder,), tiny, tmp_path / "data")


def test_missing_video_file_is_answered_with_similar_names(folder: Path, tmp_path: Path, tiny: Path) -> None:
    with raises(VideoFileError, "missing_file", folder / "hal.mkv", "'hall.mkv'"):
        extract((folder / "hal.mkv",), tiny, tmp_path / "data")
    with raises(VideoFileError, "missing_file", tmp_path / "gone" / "hal.mkv"):
        extract((tmp_path / "gone" / "hal.mkv",), tiny, tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with raises(VideoFileError, "missing_file", tmp_path / "empty"):
        extract((tmp_path / "empty",), tiny, tmp_path / "data")
    assert not (tmp_path / "data").exists()
