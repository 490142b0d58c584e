"""Open a video that command-line options specify: a feature file, a video of a data set, or a video file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.artifacts.manifest import Features
from runtime.backends.base import Device
from runtime.core.errors import GroundingError, VideoFileError
from runtime.core.video import Origin, Video
from runtime.datasets.dataset import DataSet
from runtime.media.extraction import load_or_extract
from runtime.media.extractors import open_extractor
from runtime.media.video_file import VideoFile, probe

# Accepted difference of the durations of a video file and its annotations, in seconds and as a fraction: published
# tables round durations, and some include the audio track.
DURATION_TOLERANCE_SECONDS = 1.0
DURATION_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class VideoArguments:
    """The options that specify a video, in one of three combinations.

    Attributes:
        features, duration, num_frames: a feature file, the duration of its video in seconds, and its frame count.
        data, video: the directory of a data set, and the name of a video in it.
        video, extractor, partial: a video file, the extractor of its features, and whether a damaged file is accepted.
        footage: the video file that belongs to the features of the first two combinations.
    """

    features: Path | None = None
    duration: float | None = None
    num_frames: int | None = None
    data: Path | None = None
    video: str | None = None
    extractor: Path | None = None
    partial: bool = False
    footage: Path | None = None

    def check(self) -> None:
        """Raise GroundingError unless exactly one combination of options is complete."""
        has_length = self.duration is not None or self.num_frames is not None
        conflict = ""
        if self.partial and self.extractor is None and self.footage is None:
            conflict = "--partial applies to video files only. Pass --video FILE --extractor FILE, or remove --partial."
        elif self.extractor is not None:
            if self.video is None or self.features is not None or self.data is not None:
                conflict = "--extractor needs --video FILE, without --features and --data. Change the options."
            elif self.footage is not None:
                conflict = "--footage does not apply to --extractor, which reads --video FILE. Remove --footage."
            elif has_length:
                conflict = "A video file contains its duration and frame count. Remove --duration and --num-frames."
        elif self.features is not None and self.data is None and self.video is None:
            if self.duration is None:
                raise GroundingError(
                    "--features needs the duration of the video. Pass --duration SECONDS.", code="missing_option"
                )
        elif self.data is not None and self.video is not None and self.features is None:
            if has_length:
                conflict = "--data contains the duration and frame count. Remove --duration and --num-frames."
        else:
            raise GroundingError(
                "No video was given. Pass either --features FILE --duration SECONDS, or --data DIR --video NAME, or "
                "--video FILE --extractor FILE.",
                code="missing_option",
            )
        if conflict:
            raise GroundingError(conflict, code="conflicting_options")

    @property
    def video_path(self) -> Path | None:
        """Return the path of the video file; None without one."""
        return Path(self.video) if self.extractor is not None and self.video is not None else self.footage


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """An open video.

    Attributes:
        truths: annotated moments by sentence, start and end in seconds from the first frame; empty without a data set.
    """

    video: Video
    truths: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    video_file: VideoFile | None = None

    def truths_of(self, sentence: str) -> Sequence[tuple[float, float]]:
        """Return the ground truth of a sentence, in seconds of the video file; white space is normalized."""
        offset = self.video.offset
        moments = self.truths.get(" ".join(sentence.split()), ())
        return [(start + offset, end + offset) for start, end in moments]


def open_video_source(
    choice: VideoArguments, features: Features, device: Device = "auto", threads: int | None = None
) -> VideoSource:
    """Open a video and its features, which are extracted and cached if necessary.

    Raises:
        VideoFileError: the video file cannot be decoded, or its duration differs from that of the features.
        FeatureError: the features cannot be read, or do not fit the model.
        AnnotationError: the data set cannot be read.
        ModelFileError, DeviceError: the extractor cannot be opened.
    """
    path = choice.video_path
    if choice.extractor is not None:
        assert path is not None
        extractor = open_extractor(choice.extractor, device, threads)
        extractor.manifest.check_fits(features)
        opened = probe(path)
        video = load_or_extract(path, extractor, partial=choice.partial, threads=threads, video_file=opened)
        return VideoSource(video, video_file=opened)
    video_file = probe(path) if path else None
    if video_file:
        video_file.check_undamaged(choice.partial)
    truths: Mapping[str, Sequence[tuple[float, float]]] = {}
    if choice.features is not None:
        assert choice.duration is not None
        origin = Origin("Correct --num-frames, or use --features with this clip timing.")
        video = Video.load(choice.features, choice.duration, choice.num_frames, clock=features.clock, origin=origin)
    else:
        assert choice.data is not None
        assert choice.video is not None
        data_set = DataSet(choice.data)
        data_set.check_clock(features.clock)
        video, truths = data_set.video(choice.video), _truths(data_set, choice.video)
    if video_file:
        tolerance = max(DURATION_TOLERANCE_SECONDS, DURATION_TOLERANCE * video.duration)
        if abs(video_file.duration - video.duration) > tolerance:
            raise VideoFileError(
                f"Expected a video file of {video.duration:.1f} s for {video.name}, got {video_file.path} of "
                f"{video_file.duration:.1f} s. Give the file that the features were extracted from.",
                code="footage_mismatch",
            )
        if not video.offset:
            video = dataclasses.replace(video, offset=video_file.offset)
    return VideoSource(video, truths, video_file)


def _truths(data_set: DataSet, video: str) -> dict[str, list[tuple[float, float]]]:
    """Return the distinct moments of each sentence about a video, clipped to its duration."""
    truths: dict[str, list[tuple[float, float]]] = {}
    duration = data_set.durations[video]
    for split in data_set.splits:
        for annotation in data_set.annotations(split, invalid="keep", quiet=True):
            for start, end in annotation.moments if annotation.video == video else ():
                moments, moment = truths.setdefault(annotation.sentence, []), (start, min(end, duration))
                if moment[0] < moment[1] and moment not in moments:
                    moments.append(moment)
    return truths
