"""Measure recall in long videos joined from a data set's, grounded in one piece and in windows."""

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
from runtime.core.video import ClipTiming, Video
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder

SINGLE = "single videos"


@dataclasses.dataclass(frozen=True)
class Joined:
    """A video made of several, and where each of them starts and how long it is there, in seconds."""

    video: Video
    places: dict[str, tuple[float, float]]


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
    """Put the videos of a split one after the other, so many at a time, and ask each sentence of all of them together.

    A sentence may fit another of the videos joined as well as its own, so that no model reaches what it does in single
    videos, which stands in the first row.

    Args:
        model: .onnx or .pt file whose manifest tells of windows.
        data: directory of the data set.
        join: videos in a row, in a seeded order.
        split: train or test.
        seed: of that order.
        limit: make only the first so many long videos.
        device: auto, cpu or cuda.
        threads: CPU threads.
    """
    if join < 2:
        raise GroundingError(f"--join is at least 2, and {join} was given.")
    data_set, grounder = DataSet(data), Grounder.load(model, device, threads)
    windows = grounder.windows
    if windows is None:
        raise GroundingError(f"{model} does not tell how long videos are cut; train or convert it again.")
    annotations = data_set.annotations(split)
    names = sorted({annotation.video for annotation in annotations})
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    groups = [order[start : start + join] for start in range(0, len(order), join)][:limit]
    about: dict[str, list[Annotation]] = {}
    for annotation in annotations:
        about.setdefault(annotation.video, []).append(annotation)
    in_windows = dataclasses.replace(windows, longest=windows.length)
    ways = {SINGLE: None, "joined, whole": None, "joined, in windows": in_windows}
    picks: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    truth = []
    for group in tqdm(groups, desc="joining", unit="video", leave=False, disable=None):
        videos = {name: data_set.video(name) for name in group}
        long = join_videos(list(videos.values()), grounder.manifest.features.clock)
        asked = [annotation for name in group for annotation in about[name]]
        truth.append(data_set.spans(asked))
        for way, cut in ways.items():
            grounder.windows, single = cut, way == SINGLE
            pairs = [(videos[annotation.video] if single else long.video, annotation.sentence) for annotation in asked]
            places = [(0.0, videos[a.video].duration) if single else long.places[a.video] for a in asked]
            answers = grounder.ground_batch(pairs, PUBLISHED_COUNT, presence=False)
            picks[way] += [_picks(moments, *place) for moments, place in zip(answers, places, strict=True)]
    protocol = grounder.manifest.decoding.protocol
    reports = {
        way: report(dict.fromkeys(IOU_THRESHOLDS, np.stack(rows)), np.concatenate(truth), protocol)
        for way, rows in picks.items()
    }
    print(format_table(list(reports.items())))
    print(f"{sum(map(len, truth))} queries of {split}, {len(groups)} long videos of {join} each, percent.")
    if data_set.simulated:
        print("Features are simulated: not comparable with published numbers.")
    return reports


def join_videos(videos: Sequence[Video], clock: ClipTiming) -> Joined:
    """Return videos one after the other, each as long as its clips; a second lasts as many frames in all of them."""
    rate = sum(video.num_frames for video in videos) / sum(video.duration for video in videos)
    counts = [min(len(video.features), clock.num_clips(video.num_frames)) for video in videos]
    features = np.concatenate([video.features[:count] for video, count in zip(videos, counts, strict=True)])
    firsts = np.cumsum([0, *counts[:-1]]) * clock.stride
    num_frames = clock.num_frames(sum(counts))
    long = Video(features, num_frames, num_frames / rate, "+".join(video.name for video in videos))
    places = {video.name: (first / rate, video.num_frames / rate) for video, first in zip(videos, firsts, strict=True)}
    return Joined(long, places)


def _picks(moments: Sequence[Moment], start: float, length: float) -> np.ndarray:
    """Return moments as (6, 3) picks, as fractions of the part that starts at `start`, NaN after the last."""
    picks = np.full((PUBLISHED_COUNT, 3), np.nan, np.float32)
    for rank, moment in enumerate(moments):
        picks[rank] = (moment.start - start) / length, (moment.end - start) / length, moment.score
    return picks


if __name__ == "__main__":
    command(joined_videos)
