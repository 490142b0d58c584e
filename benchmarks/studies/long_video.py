"""Measure the time and memory that a long video takes."""

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
# A made-up sentence is as long as one of Charades-STA.
WORDS = 6


def long_video(
    model: Path, *, hours: float = 2.0, queries: int = 20, device: Device = "cpu", threads: int | None = 1
) -> dict[str, float]:
    """Ground made-up sentences in a video of made-up features, in a file, as the model cuts it.

    Args:
        model: .onnx or .pt file whose manifest tells of windows.
        hours: length of the video, at 25 frames a second.
        queries: asked together.
        device: auto, cpu or cuda.
        threads: CPU threads.
    """
    grounder = Grounder.load(model, device, threads)
    if grounder.windows is None:
        raise ModelFileError(
            f"{model} does not tell how long videos are cut; train or convert it again.", code="missing_field"
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
        with Memory() as asking:
            answers = grounder.ground_batch([(video, " ".join(sentence)) for sentence in words])
        size = path.stat().st_size / 2**20
    found = {
        "windows": len(windows),
        "features_mib": size,
        "opening_s": opening.seconds,
        "asking_s": asking.seconds,
        "peak_mib": asking.peak_mib,
        "moments": float(sum(map(len, answers))),
    }
    print(f"{model.name}, NumPy {np.__version__}, {platform.machine()}, {threads} thread(s)")
    print(
        f"{hours:g} h in {len(windows)} windows of {windows[0].duration:.1f} s, {queries} queries: "
        f"{asking.seconds:.1f} s of CPU time and at most {asking.peak_mib:.0f} MiB beyond the open model; the features "
        f"are {size:.0f} MiB, looked through in {opening.seconds:.1f} s."
    )
    return found


def _write(path: Path, num_clips: int, dim: int, rng: np.random.Generator) -> None:
    array = np.lib.format.open_memmap(path, "w+", np.float32, (num_clips, dim))
    for start in range(0, num_clips, 1000):
        block = array[start : start + 1000]
        block[:] = np.maximum(rng.standard_normal(block.shape, np.float32), 0)
    array.flush()


class Memory:
    """Watches the process's own memory while the block runs: not the pages of mapped files, which can be dropped.

    Attributes:
        seconds: of CPU time that the block took, which other work on the machine hardly changes.
        peak_mib: most memory beyond that at its start.
    """

    def __enter__(self) -> Memory:
        self._done, self._before, self.peak_mib = threading.Event(), _own_mib(), 0.0
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
            self.peak_mib = max(self.peak_mib, _own_mib() - self._before)


def _own_mib() -> float:
    """Return the anonymous memory of this process, as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


if __name__ == "__main__":
    command(long_video)
