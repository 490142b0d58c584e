"""Select the clips on which an extractor is calibrated, and compared with FP32."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from export.tracing.synthetic_clips import synthetic_clips
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.core.pooling import ClipTiming
from runtime.media.extraction import check_length
from runtime.media.frames import clips
from runtime.media.video_file import probe, read_frames

# A clip of I3D has 2.4 MB and takes seconds to compute; ranges of more clips differ little.
MAX_REAL_CLIPS = 64


@dataclasses.dataclass(frozen=True)
class ExtractorClips:
    """The clips of one build, each (1, window, height, width, 3) uint8.

    Attributes:
        calibration: clips to measure ranges on.
        compared: clips to compare features on, by their origin: synthetic, real.
    """

    calibration: Sequence[np.ndarray]
    compared: Mapping[str, Sequence[np.ndarray]]

    @classmethod
    def select(cls, manifest: ExtractorManifest, videos: Sequence[Path], *, calibrated: bool) -> ExtractorClips:
        """Return the clips for a build.

        Args:
            videos: video files; empty for synthetic clips only.
            calibrated: whether to calibrate on every second clip of the videos and compare on the others. Otherwise,
                features are compared on synthetic clips and on all clips of the videos.

        Raises:
            VideoFileError: a video cannot be decoded, or is too short for one clip.
        """
        real = real_clips(manifest, videos) if videos else []
        if calibrated:
            return cls(real[::2], {"real": real[1::2]})
        synthetic = list(synthetic_clips(manifest))
        return cls((), {"synthetic": synthetic, "real": real} if videos else {"synthetic": synthetic})


def real_clips(manifest: ExtractorManifest, videos: Sequence[Path]) -> list[np.ndarray]:
    """Return clips of videos, evenly spaced over all of them, at most `MAX_REAL_CLIPS`."""
    clock = ClipTiming(manifest.window, manifest.stride)
    files = [probe(path) for path in videos]
    for video_file in files:
        video_file.check_undamaged(False)
        check_length(video_file, clock)
    step = -(-sum(clock.num_clips(video_file.num_frames) for video_file in files) // MAX_REAL_CLIPS)
    everything = itertools.chain.from_iterable(
        clips(read_frames(video_file, manifest.framing), clock.window, clock.stride) for video_file in files
    )
    return [clip[None] for clip in itertools.islice(everything, 0, None, step)]
