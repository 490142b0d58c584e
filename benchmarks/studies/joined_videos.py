"""Measure recall in long videos, concatenated from those of a data set, without and with windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.backends.base import Device
from runtime.core.cli import command
from runtime.core.decoding import PUBLISHED_COUNT
from runtime.core.errors import GroundingError
from runtime.core.metrics import IOU_THRESHOLDS, Report, format_table, report
from runtime.core.moments import Moment
from runtime.core.pooling import ClipTiming
from runtime.core.video import Video
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder

SINGLE = "single videos"


@dataclasses.dataclass(frozen=True)
class Joined:
    """A video concatenated from several.

    Attributes:
        video: the long video.
        parts: name of a video to its start and duration in the long one, in seconds.
    """

    video: Video
    parts: dict[str, tuple[float, float]]


def joined_videos(
    model: Path,
    data: Path,
    *,
    join: int = 10,
    split: str = "test",
    seed: int = 0,
    limit: int | None = None,
    device: Device = "cpu",
    threads: int | None = 1,
) -> dict[str, Report]:
    """Concatenate the videos of a split in groups, and ground each sentence in the long video of its group.

    A sentence may also describe another video of the group, so that recall is lower than in single videos (first row).

    Args:
        model: .onnx or .pt file whose manifest has windows.
        data: directory of the data set.
        join: videos per group, in random order.
        split: train or test.
        seed: random seed of the order.
        limit: maximum number of groups.
        device: auto, cpu or cuda.
        threads: number of CPU threads.

    Returns:
        The metrics in single videos, in long ones without windows, and in long ones with windows.
    """
    if join < 2:
        raise GroundingError(f"Expected --join of at least 2, got {join}.", code="invalid_option")
    data_set, grounder = DataSet(data), Grounder.load(model, device, threads)
    windows = grounder.windows
    if windows is None:
        raise GroundingError(
            f"The manifest of {model} has no windows. Train or convert the model again.", code="missing_field"
        )
    annotations = data_set.annotations(split)
    names = sorted({annotation.video for annotation in annotations})
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    groups = [order[start : start + join] for start in range(0, len(order), join)][:limit]
    by_video: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        by_video.setdefault(annotation.video, []).append(annotation)
    in_windows = dataclasses.replace(windows, longest=windows.length)
    methods = {SINGLE: None, "joined, whole": None, "joined, in windows": in_windows}
    picks: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    truth = []
    for group in tqdm(groups, desc="joining", unit="video", leave=False, disable=None):
        videos = {name: data_set.video(name) for name in group}
        long = join_videos(list(videos.values()), grounder.manifest.features.clock)
        queries = [annotation for name in group for annotation in by_video[name]]
        truth.append(data_set.spans(queries))
        for method, method_windows in methods.items():
            grounder.windows, single = method_windows, method == SINGLE
            pairs = [(videos[query.video] if single else long.video, query.sentence) for query in queries]
            parts = [(0.0, videos[query.video].duration) if single else long.parts[query.video] for query in queries]
            answers = grounder.ground_batch(pairs, PUBLISHED_COUNT, presence=False)
            picks[method] += [_picks(moments, *part) for moments, part in zip(answers, parts, strict=True)]
    protocol = grounder.manifest.decoding.protocol
    reports = {
        method: report(dict.fromkeys(IOU_THRESHOLDS, np.stack(rows)), np.concatenate(truth), protocol)
        for method, rows in picks.items()
    }
    print(format_table(list(reports.items())))
    print(f"{sum(map(len, truth))} queries of {split}, {len(groups)} long videos of {join} each, percent.")
    if data_set.simulated:
        print("The features are simulated: recall on them is not comparable with published numbers.")
    return reports


def join_videos(videos: Sequence[Video], clock: ClipTiming) -> Joined:
    """Concatenate the clips of videos, at the mean frame rate."""
    rate = sum(video.num_frames for video in videos) / sum(video.duration for video in videos)
    counts = [min(len(video.features), clock.num_clips(video.num_frames)) for video in videos]
    features = np.concatenate([video.features[:count] for video, count in zip(videos, counts, strict=True)])
    firsts = np.cumsum([0, *counts[:-1]]) * clock.stride
    num_frames = clock.num_frames(sum(counts))
    long = Video(features, num_frames, num_frames / rate, "+".join(video.name for video in videos))
    parts = {video.name: (first / rate, video.num_frames / rate) for video, first in zip(videos, firsts, strict=True)}
    return Joined(long, parts)


def _picks(moments: Sequence[Moment], start: float, length: float) -> np.ndarray:
    """Return (6, 3) start, end and score as fractions of a part of a video; NaN after the last moment."""
    picks = np.full((PUBLISHED_COUNT, 3), np.nan, np.float32)
    for rank, moment in enumerate(moments):
        picks[rank] = (moment.start - start) / length, (moment.end - start) / length, moment.score
    return picks


if __name__ == "__main__":
    command(joined_videos)
