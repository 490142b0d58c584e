"""Measure the time and memory of grounding in a long video."""

from __future__ import annotations

import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from runtime.backends.base import Device
from runtime.core.cli import command
from runtime.core.errors import ModelFileError
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder

FRAME_RATE = 25
SEED = 0
# Mean length of the sentences of Charades-STA.
WORDS = 6


def long_video(
    model: Path, *, hours: float = 2.0, queries: int = 20, device: Device = "cpu", threads: int | None = 1
) -> dict[str, float]:
    """Ground random sentences in the windows of a video with random features, stored in a file.

    Args:
        model: .onnx or .pt file whose manifest has windows.
        hours: length of the video, at 25 frames per second.
        queries: number of sentences, in one batch.
        device: auto, cpu or cuda.
        threads: number of CPU threads.
    """
    grounder = Grounder.load(model, device, threads)
    if grounder.windows is None:
        raise ModelFileError(
            f"The manifest of {model} has no windows. Train or convert the model again.", code="missing_field"
        )
    features = grounder.manifest.features
    rng = np.random.default_rng(SEED)
    words = rng.choice(list(grounder.manifest.vocabulary.words), (queries, WORDS))
    num_frames = round(hours * 3600 * FRAME_RATE)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "long.npy"
        _write(path, features.clock.num_clips(num_frames), features.dim, rng)
        with Memory() as opening:
            video = Video.load(path, num_frames / FRAME_RATE, num_frames, clock=features.clock)
            windows = grounder.cut(video)
        with Memory() as grounding:
            answers = grounder.ground_batch([(video, " ".join(sentence)) for sentence in words])
        size = path.stat().st_size / 2**20
    results = {
        "windows": len(windows),
        "features_mib": size,
        "opening_s": opening.seconds,
        "asking_s": grounding.seconds,
        "peak_mib": grounding.peak_mib,
        "moments": float(sum(map(len, answers))),
    }
    print(f"{model.name}, NumPy {np.__version__}, {platform.machine()}, {threads} thread(s)")
    print(
        f"{hours:g} h in {len(windows)} windows of {windows[0].duration:.1f} s, {queries} queries: "
        f"{grounding.seconds:.1f} s of CPU time and at most {grounding.peak_mib:.0f} MiB besides the model; features "
        f"of {size:.0f} MiB, checked in {opening.seconds:.1f} s."
    )
    return results


def _write(path: Path, num_clips: int, dim: int, rng: np.random.Generator) -> None:
    array = np.lib.format.open_memmap(path, "w+", np.float32, (num_clips, dim))
    for start in range(0, num_clips, 1000):
        block = array[start : start + 1000]
        block[:] = np.maximum(rng.standard_normal(block.shape, np.float32), 0)
    array.flush()


class Memory:
    """Measures the anonymous memory of this process, without mapped files, during a `with` statement.

    Attributes:
        seconds: CPU time of the statement.
        peak_mib: maximum memory above that at its start.
    """

    def __enter__(self) -> Memory:
        self._done, self._initial, self.peak_mib = threading.Event(), _own_mib(), 0.0
        self._started = time.process_time()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._started
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak_mib = max(self.peak_mib, _own_mib() - self._initial)


def _own_mib() -> float:
    """Return the anonymous memory of this process, as Linux reports it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


if __name__ == "__main__":
    command(long_video)
