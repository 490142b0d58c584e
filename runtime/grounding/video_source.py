"""Open the video that the options name: a feature file, a video of a data set, or a video file."""

from __future__ import annotations

import dataclasses
import logging
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

log = logging.getLogger("drn")

# A film may be longer or shorter than the features' video by this many seconds, or this share of it: tables round
# durations, and some count the sound.
SAME_SECONDS = 1.0
SAME_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class VideoArguments:
    """The options that name a video; `check` rejects combinations that exclude each other.

    Attributes:
        features, duration, num_frames: a feature file, and what it does not contain.
        data, video: the directory of a data set and a name in it.
        video, extractor, partial: a video file, what makes its features, and whether a damaged one will do.
        footage: the video file that features were made of.
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
        """Raise GroundingError unless just one video was named, with all that it needs and nothing more."""
        if self.partial and self.extractor is None and self.footage is None:
            raise GroundingError(
                "--partial is about a video file; pass --video FILE --extractor FILE, or leave it out.",
                code="conflicting_options",
            )
        if self.extractor is not None:
            if self.video is None or self.features is not None or self.data is not None:
                raise GroundingError(
                    "--extractor makes features of a video file; pass --video FILE with it, and nothing else.",
                    code="conflicting_options",
                )
            if self.footage is not None:
                raise GroundingError(
                    "--video FILE is the footage already; leave --footage out.", code="conflicting_options"
                )
            if self._tells_length:
                raise GroundingError(
                    "A video file contains its duration and frames; leave --duration and --num-frames out.",
                    code="conflicting_options",
                )
        elif self.features is not None and self.data is None and self.video is None:
            if self.duration is None:
                raise GroundingError(
                    "--features needs --duration, the length of that video in seconds.", code="missing_option"
                )
        elif self.data is not None and self.video is not None and self.features is None:
            if self._tells_length:
                raise GroundingError(
                    "--data knows the duration and frames of its videos; leave --duration and --num-frames out.",
                    code="conflicting_options",
                )
        else:
            raise GroundingError(
                "Say which video: either --features FILE --duration SECONDS, or --data DIR --video NAME, or --video "
                "FILE --extractor FILE.",
                code="missing_option",
            )

    @property
    def film(self) -> Path | None:
        """The video file, where there is one."""
        return Path(self.video) if self.extractor is not None and self.video is not None else self.footage

    @property
    def _tells_length(self) -> bool:
        return self.duration is not None or self.num_frames is not None


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """The video that is asked about.

    Attributes:
        video: its features.
        truths: sentence to starts and ends in seconds from the first picture, where the data set knows them.
        footage: its frames, where the file is at hand.
    """

    video: Video
    truths: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    footage: VideoFile | None = None

    def truths_of(self, sentence: str) -> Sequence[tuple[float, float]]:
        """Return what is known of a sentence, whatever stands around its words, in the time of players."""
        offset = self.video.offset
        known = self.truths.get(" ".join(sentence.split()), ())
        return [(start + offset, end + offset) for start, end in known]


def open_video_source(
    choice: VideoArguments, features: Features, device: Device = "auto", threads: int | None = None
) -> VideoSource:
    """Return the video that a user named, with its features, which are extracted where they are not there yet.

    Args:
        choice: what `VideoArguments.check` let pass.
        features: what the model takes.
        device, threads: for the extractor.

    Raises:
        VideoFileError: the film and the features are of different lengths.
    """
    film = choice.film
    if choice.extractor is not None:
        assert film is not None
        network = open_extractor(choice.extractor, device, threads)
        network.manifest.check_fits(features)
        opened = probe(film)
        video = load_or_extract(film, network, partial=choice.partial, threads=threads, footage=opened)
        return VideoSource(video, footage=opened)
    video_file = probe(film) if film else None
    if video_file:
        video_file.check_whole(choice.partial)
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
    if video_file and abs(video_file.duration - video.duration) > max(SAME_SECONDS, SAME_SHARE * video.duration):
        raise VideoFileError(
            f"{video_file.path} lasts {video_file.duration:.1f} s and {video.name} {video.duration:.1f} s; give the "
            "video file that its features were made of.",
            code="footage_mismatch",
        )
    if video_file and not video.offset:
        video = dataclasses.replace(video, offset=video_file.offset)
    return VideoSource(video, truths, video_file)


def _truths(data_set: DataSet, video: str) -> dict[str, list[tuple[float, float]]]:
    """Return the moments that the data set gives for this video's sentences, cut off at its end, each once."""
    truths: dict[str, list[tuple[float, float]]] = {}
    for split in data_set.splits:
        for annotation in data_set.annotations(split, invalid="keep", quiet=True):
            for start, end in annotation.moments if annotation.video == video else ():
                known, moment = truths.setdefault(annotation.sentence, []), (start, min(end, data_set.durations[video]))
                if moment[0] < moment[1] and moment not in known:
                    known.append(moment)
    return truths
