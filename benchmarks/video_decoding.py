"""Measure frames per second from a video file to the network's clips, compared with PyAV alone."""

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
    """Time decoding on one thread: PyAV's own loop to RGB arrays, and all that stands before an extractor.

    Both are timed in turns, and the ratio is the median of the rounds', so that a busy machine slows both.

    Args:
        videos: video files.
        rounds: how often each is timed.
    """
    import av

    if not videos:
        raise VideoFileError("No video was given; name the files to time.")
    ratios = {}
    print(f"PyAV {av.__version__}, NumPy {np.__version__}, {platform.machine()}, one thread, {rounds} rounds\n")
    print("| video | size | PyAV, frames/s | clips, frames/s | ratio |\n| --- | --- | --- | --- | --- |")
    for path in videos:
        found = probe(path)
        ways: tuple[Callable[[], Iterator[Any]], ...] = (
            lambda path=path: _bare(path),
            lambda found=found: clips(read_frames(found, ResizeCrop(), threads=1), 16, 8),
        )
        seconds = [[_seconds(way) for way in ways] for _ in range(rounds)]
        ratios[path.stem] = statistics.median(bare / ours for bare, ours in seconds)
        bare, ours = (found.num_frames / statistics.median(column) for column in zip(*seconds, strict=True))
        print(f"| {path.stem} | {found.width} x {found.height} | {bare:.0f} | {ours:.0f} | {ratios[path.stem]:.2f} |")
    return ratios


def _bare(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def _seconds(way: Callable[[], Iterator[Any]]) -> float:
    started = time.perf_counter()
    for _ in way():
        pass
    return time.perf_counter() - started


if __name__ == "__main__":
    command(footage)
