"""Measure frames per second from a video file to the clips of a feature extractor, relative to PyAV alone."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from runtime.artifacts.extractor_manifest import ResizeCrop
from runtime.core.cli import command
from runtime.core.errors import VideoFileError
from runtime.media.frames import clips
from runtime.media.video_file import probe, read_frames


def footage(videos: tyro.conf.Positional[tuple[Path, ...]], *, rounds: int = 9) -> dict[str, float]:
    """Time decoding on one thread in turns: PyAV's loop to RGB arrays, and clips as for a feature extractor.

    Args:
        videos: video files.
        rounds: number of turns; the ratio is the median over turns.
    """
    import av

    if not videos:
        raise VideoFileError("Expected at least one video, got none. Pass the files to time.", code="missing_option")
    ratios = {}
    print(f"PyAV {av.__version__}, NumPy {np.__version__}, {platform.machine()}, one thread, {rounds} rounds\n")
    print("| video | size | PyAV, frames/s | clips, frames/s | ratio |\n| --- | --- | --- | --- | --- |")
    for path in videos:
        video = probe(path)
        loops: tuple[Callable[[], Iterator[Any]], ...] = (
            lambda path=path: _frames(path),
            lambda video=video: clips(read_frames(video, ResizeCrop(), threads=1), 16, 8),
        )
        seconds = [[_seconds(loop) for loop in loops] for _ in range(rounds)]
        ratios[path.stem] = statistics.median(pyav / ours for pyav, ours in seconds)
        pyav, ours = (video.num_frames / statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"| {path.stem} | {video.width} x {video.height} | {pyav:.0f} | {ours:.0f} | {ratios[path.stem]:.2f} |")
    return ratios


def _frames(path: Path) -> Iterator[np.ndarray]:
    """Yield RGB frames decoded by PyAV."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def _seconds(loop: Callable[[], Iterator[Any]]) -> float:
    started = time.perf_counter()
    for _ in loop():
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    command(footage)
