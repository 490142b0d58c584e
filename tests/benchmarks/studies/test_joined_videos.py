"""Test `benchmarks.studies.joined_videos`: moments are located in the concatenated videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies.joined_videos import join_videos, joined_videos
from runtime.core.pooling import ClipTiming
from runtime.core.video import Video


def test_join_videos_parts_match_frame_positions() -> None:
    clock = ClipTiming()
    clips = [np.full((count, 4), count, np.float32) for count in (10, 30)]
    videos = [Video(c, clock.num_frames(len(c)) + 3, 5.0 * len(c), str(len(c))) for c in clips]
    joined = join_videos(videos, clock)
    assert len(joined.video.features) == 40
    seconds = joined.video.duration / joined.video.num_frames
    start, length = joined.parts["30"]
    assert start / seconds == pytest.approx(10 * clock.stride)
    assert length / seconds == pytest.approx(videos[1].num_frames)
    assert joined.parts["10"][0] == 0


def test_results_are_listed_per_video_layout(models: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    actual = joined_videos(models / "drn.onnx", planted, join=3, limit=1)
    assert list(actual) == ["single videos", "joined, whole", "joined, in windows"]
    assert actual["single videos"].queries > 3
    said = capsys.readouterr().out
    assert "1 long videos of 3 each" in said
    assert "simulated" in said
