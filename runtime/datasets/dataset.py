"""Read a data set in a published layout: sentences, moments, lengths of videos, words and features."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.artifacts.manifest import Features
from runtime.core.errors import AnnotationError, FeatureError, GroundingError, as_sentence, excerpt
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import check_directory, check_file, read_json
from runtime.core.io.text_files import is_number
from runtime.core.pooling import ClipTiming
from runtime.core.tokenizer import Vocabulary, word_table
from runtime.core.video import Origin, Video, check_frame_rate
from runtime.datasets.charades_sta import FEATURE_DIRECTORY as FEATURE_DIRECTORY
from runtime.datasets.feature_stores import FeatureStore, open_store
from runtime.datasets.formats import Annotation as Annotation
from runtime.datasets.formats import Row, open_format
from runtime.datasets.presets import Preset
from runtime.datasets.schema import Times
from runtime.datasets.validation import SPLITS

log = logging.getLogger("drn")

Invalid = Literal["error", "drop", "keep"]

# Maximum number of videos whose clips are counted before a long computation.
CHECKED_VIDEOS = 256
# Maximum number of videos whose clips are counted for the median frame rate of a data set without frame counts.
COUNTED_VIDEOS = 16
# Limits for the last end of a moment as a share of its video, over all videos. Published splits have 0.07 to 1.12.
# Seconds instead of milliseconds or frames give at most 0.04, the opposite at least 25.
MIN_LARGEST_END, MAX_MEDIAN_END = 0.05, 2.0
# If all moments of longer videos end in the first second, moments are fractions of their videos.
MIN_FRACTION_SECONDS = 10.0
# With fewer videos, units that do not match are a warning.
MIN_VIDEOS_FOR_UNITS = 3
# File of `runtime.extract` with a note on each extracted video.
NOTES = "extracted.json"
# Maximum number of dropped rows in a warning.
MAX_NAMED = 20


class DataSet:
    """A directory in the layout of Charades-STA, ActivityNet Captions, TACoS or QVHighlights, or in the common form.

    The files in the directory determine the format; see docs/formats.md. Features are in the published directory
    (Charades-STA: `C3D_unit16_overlap0.5_merged/`), in `features/`, or in one HDF5 file.

    Raises:
        AnnotationError: the directory or a table is missing or malformed, or the directory has several formats.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        check_directory(
            self.root,
            "The data directory",
            AnnotationError,
            "use a layout of docs/formats.md, or create a data set with `python -m train.simulate --output DIR`",
        )
        self._layout = open_format(self.root)
        self.durations: dict[str, float] = self._layout.durations
        # Frame counts in the annotations; `frames` returns that of any video.
        self.num_frames: dict[str, int] = self._layout.num_frames
        self._warned_of_stride = False
        self._rated: set[str] = set()
        self.origin = Origin(
            "Use features with this clip timing, or prepare the data set with `python -m train.prepare --clock WINDOW "
            "STRIDE` and train a model on it."
        )

    @property
    def preset(self) -> Preset:
        """Return the default options of this data set."""
        return self._layout.preset

    @property
    def splits(self) -> list[str]:
        """Return the names of the existing splits."""
        return [split for split in SPLITS if self.annotations_path(split).is_file()]

    @functools.cached_property
    def published_words(self) -> Mapping[str, int] | None:
        """Return the published word table of the data set, if it has one."""
        return self._layout.words()

    @functools.cached_property
    def words(self) -> Mapping[str, int]:
        """Return word to id from the published table or, without one, from the training split."""
        if self.published_words is not None:
            return self.published_words
        training = self.annotations("train", invalid="keep", quiet=True)
        return word_table(annotation.sentence for annotation in training)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the vocabulary of `words`."""
        try:
            return Vocabulary(self.words)
        except GroundingError as error:
            raise AnnotationError(f"{self._layout.files('train')[-1]}: {error}", code=error.code) from error

    @functools.cached_property
    def simulated(self) -> bool:
        """Return whether the features are simulated; recall on them is not comparable with published numbers."""
        return self._layout.simulated or (self.root / "simulated.json").is_file()

    def annotations_path(self, split: str) -> Path:
        """Return the path of the annotation file of a split, which may not exist."""
        return self._layout.path(split)

    def annotations(self, split: str, invalid: Invalid = "error", quiet: bool = False) -> list[Annotation]:
        """Return the sentences of a split in file order.

        Ends after the end of the video are common in published files and are not changed; `span` clips them.

        Args:
            split: `train`, `val` or `test`.
            invalid: policy for moments that end before they start, or start after their video: `error`; `drop` with a
                warning; or `keep` as the published code does. `drop` keeps the other moments of a sentence.
            quiet: do not log the number of moments that end after their video.

        Raises:
            AnnotationError: a row is malformed or has an unknown video, or is invalid under `error`.
        """
        annotations, dropped, clipped = [], [], 0
        first_problem = ""
        for row, annotation, problems in self.checked_rows(split):
            if problems and not first_problem:
                first_problem = f"{row.location}: {problems[0]}. {as_sentence(self._layout.correction)}"
            if problems and invalid == "drop":
                dropped.append(f"{row.label} ({problems[0]})")
                if annotation is None:
                    continue
                row = dataclasses.replace(row, annotation=annotation)
            retained = row.annotation
            clipped += any(end > self.durations[retained.video] for _, end in retained.moments)
            annotations.append(retained)
        # Raised after all rows are read: if all moments are in another unit, `checked_rows` raises its own error.
        if first_problem and invalid == "error":
            raise AnnotationError(first_problem, code="impossible_moment")
        path = self.annotations_path(split)
        if dropped:
            more = f"; and {len(dropped) - MAX_NAMED} more" if len(dropped) > MAX_NAMED else ""
            named = "; ".join(dropped[:MAX_NAMED])
            log.warning("%s: dropped %d %s: %s%s.", path.name, len(dropped), self._layout.unit, named, more)
        if clipped and not quiet:
            log.info("%s: clipped %d of %d moments at the end of their video.", path.name, clipped, len(annotations))
        if not annotations:
            raise AnnotationError(f"{path} has no valid annotation. Correct or replace the file.", code="empty_split")
        return annotations

    def checked_rows(self, split: str) -> Iterator[tuple[Row, Annotation | None, list[str]]]:
        """Yield the rows of a split with the result of the check of their moments.

        Yields:
            The row as it is; its annotation with the valid moments only (None if it has none); and the problem of each
            invalid moment.

        Raises:
            AnnotationError: a row is malformed or has an unknown video; or, after all rows, moments and durations have
                different units.
        """
        ends: dict[str, float] = {}
        for row in self._layout.rows(split):
            annotation, valid, problems = row.annotation, [], []
            end = max(end for _, end in annotation.moments)
            ends[annotation.video] = max(end, ends.get(annotation.video, 0.0))
            for moment in annotation.moments:
                problem = self._problem(annotation.video, *moment)
                if problem:
                    problems.append(problem)
                else:
                    valid.append(moment)
            yield row, annotation.narrowed(tuple(valid)) if valid else None, problems
        self._check_units(split, ends)

    def _check_units(self, split: str, ends: Mapping[str, float]) -> None:
        """Raise AnnotationError (code `units_mismatch`) if moments and durations seem to have different units.

        Args:
            ends: video to the end of its last moment, as read, in seconds.
        """
        shares = {video: end / self.durations[video] for video, end in ends.items()}
        if not shares:
            return
        last = max(shares, key=lambda video: shares[video])
        median_duration = float(np.median([self.durations[video] for video in ends]))
        are_fractions = max(ends.values()) <= 1 and median_duration > MIN_FRACTION_SECONDS
        fits = shares[last] > MIN_LARGEST_END and float(np.median(list(shares.values()))) < MAX_MEDIAN_END
        if fits and not are_fractions:
            return
        message = (
            f"{self.annotations_path(split)}: expected moments in seconds, got a last end of {ends[last]:g} in "
            f"{self.durations[last]:g} seconds, in {excerpt(last)} of {len(shares)} videos. Correct the unit of "
            "moments or durations (docs/formats.md)."
        )
        if len(shares) >= MIN_VIDEOS_FOR_UNITS:
            raise AnnotationError(message, code="units_mismatch")
        log.warning("%s", message)

    def videos(self, split: str) -> set[str]:
        """Return the names of the videos of a split without parsing their annotations."""
        return self._layout.videos(split)

    def span(self, annotation: Annotation) -> tuple[float, float]:
        """Return start and end of a sentence's first moment as fractions of the video.

        As in the published code, the end is clipped at 1.
        """
        return self._fractions(annotation.video, (annotation.start, annotation.end))

    def spans(self, annotations: Sequence[Annotation]) -> np.ndarray:
        """Return the first moments of N sentences as fractions of their videos, (N, 2) float64; see `span`."""
        return np.array([self.span(annotation) for annotation in annotations], np.float64).reshape(-1, 2)

    def truths(self, annotations: Sequence[Annotation]) -> np.ndarray:
        """Return all moments of N sentences as fractions of their videos.

        Returns:
            (N, W, 2) float64 for at most W moments of a sentence, NaN after the last; or (N, 2) if each sentence has
            one.
        """
        width = max((len(annotation.moments) for annotation in annotations), default=1)
        if width == 1:
            return self.spans(annotations)
        truths = np.full((len(annotations), width, 2), np.nan)
        for row, annotation in zip(truths, annotations):
            row[: len(annotation.moments)] = [self._fractions(annotation.video, one) for one in annotation.moments]
        return truths

    @property
    def files(self) -> list[Path]:
        """Return the annotation files and tables of all splits, without the features."""
        siblings = (path for path in self.root.glob("*.json") if path.name in (NOTES, "dataset.json"))
        return [*dict.fromkeys(path for split in self.splits for path in self._layout.files(split)), *siblings]

    def digest(self, split: str) -> str:
        """Return a SHA-256 of the annotation file of a split and the tables with which it is read."""
        paths = self._layout.files(split)
        for path in paths:
            check_file(path, "The annotation file", AnnotationError, "complete the data set")
        return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()

    @functools.cached_property
    def store(self) -> FeatureStore:
        """Return the store of the clip features."""
        return open_store(self.root, self._layout.feature_location())

    def feature_path(self, video: str) -> Path:
        """Return the file with the features of a video; FeatureError if there is none. See `FeatureFiles`."""
        return self.store.path(video)

    def frames(self, video: str, num_clips: int | None = None) -> int:
        """Return the frame count of a video, in which its segments are counted.

        It is that of the annotations if they have one. Otherwise it is computed from the number of clips, and also if
        the preset has `spread` and the clips do not match the frames (TACoS, whose features are published at several
        strides). Segments are then equal parts of the clips.

        Args:
            num_clips: number of clips, if they have been read already.

        Raises:
            AnnotationError: frames and duration contradict each other; see `check_frame_rate`.
        """
        num_frames, clock = self.num_frames.get(video), self.preset.features.clock
        if num_frames is not None:
            self._check_rate(video, num_frames, self._usual_rate)
            if not self.preset.spread:
                return num_frames
        clips = self.store.num_clips(video) if num_clips is None else num_clips
        if num_frames is None:
            self._check_rate(video, clock.num_frames(clips), self._usual_rate)
        else:
            if clock.fits(num_frames, clips):
                return num_frames
            if not self._warned_of_stride:
                self._warned_of_stride = True
                log.warning(
                    "%s: expected %d clips for the %d frames of %r, got %d. Segments of such videos are equal parts of "
                    "their clips; this warning appears once.",
                    self.root, clock.num_clips(num_frames), num_frames, video, clips,
                )  # fmt: skip
        return clock.num_frames(clips)

    def video(self, name: str) -> Video:
        """Return a video with its features.

        Raises:
            AnnotationError: the annotations do not list it.
            FeatureError: its features are missing or invalid.
        """
        self._layout.check_known(name, "--video")
        features = self.store.load(name)
        self._check_features(name)
        frames = self.frames(name, len(features))
        counted = None if frames == self.num_frames.get(name) else self.preset.features.clock
        return Video(features, frames, self.durations[name], name, self.origin, counted, offset=self.offset(name))

    def offset(self, name: str) -> float:
        """Return the seconds from the start of a video file to its first picture, from the note of `runtime.extract`.

        The offset is 0 without a note. Durations and annotations of a data set start at the first picture.

        Raises:
            AnnotationError: the note does not match its digest, or the offset is not a number (code `damaged_note`).
        """
        offset = self._note(name).get("offset", 0.0)
        if not is_number(offset):
            raise AnnotationError(
                f"{self.root / NOTES}: expected a number for the offset of {excerpt(name)}, got {excerpt(offset)}. "
                "Extract the video again.",
                code="damaged_note",
            )
        return float(offset)

    def offsets(self) -> dict[str, float]:
        """Return the offsets that are not 0, in seconds by video; see `offset`."""
        return {name: offset for name in sorted(self._notes) if (offset := self.offset(name))}

    def _note(self, name: str) -> Mapping[str, Any]:
        """Return the note of `runtime.extract` on a video after checking its digest; empty if there is none."""
        note = self._notes.get(name)
        if not isinstance(note, dict):
            return {}
        content = {key: value for key, value in note.items() if key != "digest"}
        if "digest" in note and note["digest"] != json_digest(content):
            raise AnnotationError(
                f"{self.root / NOTES}: the note on {excerpt(name)} does not match its digest. Extract the video again.",
                code="damaged_note",
            )
        return content

    def _check_features(self, name: str) -> None:
        """Raise FeatureError if the features of a video do not match the digest in its note."""
        expected = self._note(name).get("features")
        if expected and sha256(path := self.feature_path(name)) != expected:
            raise FeatureError(
                f"{path} does not match the digest in {NOTES}, because it was changed or damaged. Extract the video "
                "again.",
                code="damaged_features",
            )

    @functools.cached_property
    def _notes(self) -> Mapping[str, Any]:
        path = self.root / NOTES
        value = read_json(path, "notes on extracted videos") if path.is_file() else {}
        videos = value.get("videos") if isinstance(value, dict) else None
        if not isinstance(videos, dict):
            return {}
        counts = collections.Counter(str(note.get("extractor")) for note in videos.values() if isinstance(note, dict))
        if len(counts) > 1:
            log.warning(
                "%s has features of %d extractors; the most common one has %d of %d videos. Extract all video files "
                "with one command `python -m runtime.extract`.",
                self.root, len(counts), max(counts.values()), sum(counts.values()),
            )  # fmt: skip
        return videos

    def features(self) -> Features:
        """Return the properties of the clip features, with the width of those of the first annotated video."""
        split = "train" if "train" in self.splits else "test"
        first = self.annotations(split, invalid="keep", quiet=True)[0]
        return dataclasses.replace(self.preset.features, dim=self.video(first.video).features.shape[1])

    def check_clips(
        self, videos: Sequence[str], clock: ClipTiming | None = None, store: FeatureStore | None = None
    ) -> None:
        """Check frames, durations and clips of videos before a long computation, without reading their features.

        Args:
            videos: names of videos; the clips of at most `CHECKED_VIDEOS`, evenly spaced, are counted.
            clock: clip timing of the features; default: that of the preset.
            store: store of the features; default: that of this data set.

        Raises:
            AnnotationError: frames and duration contradict each other; see `check_frame_rate`.
            FeatureError: clips and frames contradict each other; see `Origin.check`.
        """
        clock, store = clock or self.preset.features.clock, store or self.store
        usual_rate = self._median_rate(clock, store)
        for video in self.num_frames.keys() & set(videos):
            self._check_rate(video, self.num_frames[video], usual_rate)
        for video in _sample(videos, CHECKED_VIDEOS):
            clips, num_frames = store.num_clips(video), self.num_frames.get(video)
            frames = clock.num_frames(clips) if num_frames is None else num_frames
            self._check_rate(video, frames, usual_rate)
            if not self.preset.spread:
                self.origin.check(video, clips, frames, clock)

    def _check_rate(self, video: str, num_frames: int, usual_rate: float | None) -> None:
        """Raise AnnotationError for an impossible frame rate; warn about an unusual one, once for each video."""
        name = f"The video {excerpt(video)}"
        usual_rate = None if video in self._rated else usual_rate
        self._rated.add(video)
        check_frame_rate(name, num_frames, self.durations[video], AnnotationError, usual_rate)

    @functools.cached_property
    def _usual_rate(self) -> float | None:
        return self._median_rate(self.preset.features.clock, self.store)

    def _median_rate(self, clock: ClipTiming, store: FeatureStore) -> float | None:
        """Return the median frame rate; None if too few videos have frame counts or features.

        Without frame counts, the clips of `COUNTED_VIDEOS` videos are counted.
        """
        counts = dict(self.num_frames)
        for video in [] if counts else _sample(sorted(self.durations), COUNTED_VIDEOS):
            with contextlib.suppress(GroundingError):
                counts[video] = clock.num_frames(store.num_clips(video))
        return median_rate(count / self.durations[video] for video, count in counts.items() if video in self.durations)

    def check_clock(self, clock: ClipTiming) -> None:
        """Warn if the clip timing of this data set differs from `clock`, that of a model."""
        self.origin.check_clock(str(self.root), self.preset.features.clock, clock)

    def _fractions(self, video: str, window: Times) -> tuple[float, float]:
        duration = self.durations[video]
        return window[0] / duration, min(window[1] / duration, 1.0)

    def _problem(self, video: str, start: float, end: float) -> str | None:
        duration = self.durations[video]
        if start < 0:
            return f"the moment starts at {start:g} s, before its video"
        if start >= duration:
            return f"the moment starts at {start:g} s, but its video ends at {duration:g} s"
        if end <= start:
            return f"the moment ends at {end:g} s, not after its start at {start:g} s"
        return None


def median_rate(rates: Iterable[float]) -> float | None:
    """Return the median of frame rates, in frames per second; None for too few videos."""
    known = list(rates)
    return float(np.median(known)) if len(known) >= MIN_VIDEOS_FOR_UNITS else None


def _sample(videos: Sequence[str], count: int) -> Sequence[str]:
    """Return at most `count` of `videos`, evenly spaced."""
    return videos[:: max(1, -(-len(videos) // count))]


def one_per_moment(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Return one annotation for each moment of each sentence, for training and for the prior."""
    return [annotation.narrowed((window,)) for annotation in annotations for window in annotation.moments]
