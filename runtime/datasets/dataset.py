"""A data set in a published layout: sentences, moments, clocks, words, and where the features are."""

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
from runtime.core.errors import AnnotationError, FeatureError, GroundingError, excerpt
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import check_directory, check_file, read_json
from runtime.core.io.text_files import is_number
from runtime.core.tokenizer import Vocabulary, word_table
from runtime.core.video import ClipTiming, Origin, Video, check_frame_rate
from runtime.datasets.charades_sta import FEATURE_DIRECTORY as FEATURE_DIRECTORY
from runtime.datasets.feature_stores import FeatureStore, open_store
from runtime.datasets.formats import Annotation as Annotation
from runtime.datasets.formats import Row, open_format
from runtime.datasets.presets import Preset
from runtime.datasets.schema import Times
from runtime.datasets.validation import SPLITS

log = logging.getLogger("drn")

Invalid = Literal["error", "drop", "keep"]

# Videos whose clips are counted before a long computation.
CHECKED_VIDEOS = 256
# And for the usual frame rate of a data set without frame counts, which the first of its videos waits for.
COUNTED_VIDEOS = 16
# Ends of moments as shares of their videos, the largest of each video. Over the splits of Charades-STA, ActivityNet,
# TACoS and QVHighlights the smallest is 0.07 and the largest 1.12, and each split has one of 1 or more. Seconds in
# place of milliseconds or frames give at most 0.04, the opposite at least 25.
MIN_LARGEST_END, MAX_MEDIAN_END = 0.05, 2.0
# Where no moment of longer videos ends after the first second, moments are fractions of their videos.
MIN_FRACTION_SECONDS = 10.0
# Fewer videos may be short excerpts of what is in them.
MIN_VIDEOS_FOR_UNITS = 3
# Of `runtime.extract`: what was extracted of each video.
NOTES = "extracted.json"
# Rows left out that a warning names, of however many.
NAMED = 20


class DataSet:
    """A directory in the layout of Charades-STA, ActivityNet Captions, TACoS or QVHighlights, or in the common form.

    The files that are there decide which one it is; see docs/formats.md. Features lie where the data set publishes them
    (Charades-STA: `C3D_unit16_overlap0.5_merged/`), in `features/`, or in one HDF5 file.

    Raises:
        AnnotationError: the directory or one of its tables is missing or malformed, or holds a mixture of formats.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        check_directory(
            self.root,
            "The data directory",
            AnnotationError,
            "give a directory in a published layout (docs/formats.md lists them), or make one with "
            "`python -m train.simulate --output DIR`",
        )
        self._layout = open_format(self.root)
        self.durations: dict[str, float] = self._layout.durations
        # Frame counts in the annotations; `frames` returns those of every video.
        self.num_frames: dict[str, int] = self._layout.num_frames
        self._told_of_stride = False
        self._rated: set[str] = set()
        self.origin = Origin(
            "Use features of these videos with this clip timing. A data set with another clip timing is prepared by "
            "`python -m train.prepare --clock WINDOW STRIDE` and needs a model that was trained on it."
        )

    @property
    def preset(self) -> Preset:
        """Return the default options of this data set."""
        return self._layout.preset

    @property
    def splits(self) -> list[str]:
        """The splits that are there."""
        return [split for split in SPLITS if self.annotations_path(split).is_file()]

    @functools.cached_property
    def published_words(self) -> Mapping[str, int] | None:
        """The word table that the data set came with, if it did."""
        return self._layout.words()

    @functools.cached_property
    def words(self) -> Mapping[str, int]:
        """Word to id, as published; of the words of the training split where nothing is."""
        if self.published_words is not None:
            return self.published_words
        training = self.annotations("train", invalid="keep", quiet=True)
        return word_table(annotation.sentence for annotation in training)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        try:
            return Vocabulary(self.words)
        except GroundingError as error:
            raise AnnotationError(f"{self._layout.files('train')[-1]}: {error}", code=error.code) from error

    @functools.cached_property
    def simulated(self) -> bool:
        """Return whether the features are simulated; recall on them is not comparable with published numbers."""
        return self._layout.simulated or (self.root / "simulated.json").is_file()

    def annotations_path(self, split: str) -> Path:
        return self._layout.path(split)

    def annotations(self, split: str, invalid: Invalid = "error", quiet: bool = False) -> list[Annotation]:
        """Return the sentences of a split in file order.

        Ends past the end of the video are common in the published files and are left as they are; `span` clips them.

        Args:
            split: `train`, `val` or `test`.
            invalid: what to do with a moment that ends before it starts, or starts after its video has ended:
                `error`, `drop` with a warning that names the rows, or `keep` as the published code does. Of a sentence
                with several moments, the others stay.
            quiet: whether nothing is said of moments that are cut off at the end of their video.

        Raises:
            AnnotationError: a row is malformed or names an unknown video, or is invalid under `error`.
        """
        annotations, dropped, clipped = [], [], 0
        first_problem = ""
        for row, annotation, problems in self.judged(split):
            if problems and not first_problem:
                first_problem = f"{row.place}: {problems[0]}; {self._layout.correction}."
            if problems and invalid == "drop":
                dropped.append(f"{row.label} ({problems[0]})")
                if annotation is None:
                    continue
                row = dataclasses.replace(row, annotation=annotation)
            retained = row.annotation
            clipped += any(end > self.durations[retained.video] for _, end in retained.moments)
            annotations.append(retained)
        # After all rows: where all moments are in another unit, no single row is wrong.
        if first_problem and invalid == "error":
            raise AnnotationError(first_problem, code="impossible_moment")
        path = self.annotations_path(split)
        if dropped:
            more = f"; and {len(dropped) - NAMED} more" if len(dropped) > NAMED else ""
            named = "; ".join(dropped[:NAMED])
            log.warning("%s: left out %d %s: %s%s.", path.name, len(dropped), self._layout.unit, named, more)
        if clipped and not quiet:
            log.info(
                "%s: %d of %d moments end after their video and are cut off there.",
                path.name,
                clipped,
                len(annotations),
            )
        if not annotations:
            raise AnnotationError(f"{path} holds no usable annotation.", code="empty_split")
        return annotations

    def judged(self, split: str) -> Iterator[tuple[Row, Annotation | None, list[str]]]:
        """Yield each row of a split as it is, with the moments that make sense (None: it has none), and what is wrong
        with the others; AnnotationError where a row is malformed or names an unknown video, and in the end where
        moments and durations are in different units."""
        ends: dict[str, float] = {}
        for row in self._layout.rows(split):
            annotation, good, problems = row.annotation, [], []
            end = max(end for _, end in annotation.moments)
            ends[annotation.video] = max(end, ends.get(annotation.video, 0.0))
            for moment in annotation.moments:
                problem = self._problem(annotation.video, *moment)
                if problem:
                    problems.append(problem)
                else:
                    good.append(moment)
            yield row, annotation.narrowed(tuple(good)) if good else None, problems
        self._check_units(split, ends)

    def _check_units(self, split: str, ends: Mapping[str, float]) -> None:
        """Raise AnnotationError (code `units_mismatch`) if moments and durations have different units.

        Args:
            split: of the moments.
            ends: video to the end of its last moment, in seconds as they are read.
        """
        shares = {video: end / self.durations[video] for video, end in ends.items()}
        if not shares:
            return
        last = max(shares, key=lambda video: shares[video])
        usual_seconds = float(np.median([self.durations[video] for video in ends]))
        are_fractions = max(ends.values()) <= 1 and usual_seconds > MIN_FRACTION_SECONDS
        fits = shares[last] > MIN_LARGEST_END and float(np.median(list(shares.values()))) < MAX_MEDIAN_END
        if fits and not are_fractions:
            return
        message = (
            f"{self.annotations_path(split)}: of {len(shares)} videos, {excerpt(last)} has the moment that ends "
            "furthest: at "
            f"{ends[last]:g} of {self.durations[last]:g} seconds. Moments or durations seem to be in another unit; "
            "correct them (docs/formats.md has the units of each format)."
        )
        if len(shares) >= MIN_VIDEOS_FOR_UNITS:
            raise AnnotationError(message, code="units_mismatch")
        log.warning("%s", message)

    def videos(self, split: str) -> set[str]:
        """Return the names of the videos of a split, without a look at what is said of them."""
        return self._layout.videos(split)

    def span(self, annotation: Annotation) -> tuple[float, float]:
        """Return the moment as fractions of its video; the end is clipped at 1, as published, the start is not."""
        return self._fractions(annotation.video, (annotation.start, annotation.end))

    def spans(self, annotations: Sequence[Annotation]) -> np.ndarray:
        """Return the moments as fractions of their videos, (N, 2) float64; see `span`."""
        return np.array([self.span(annotation) for annotation in annotations], np.float64).reshape(-1, 2)

    def truths(self, annotations: Sequence[Annotation]) -> np.ndarray:
        """Return all moments of every sentence as fractions of their videos, (N, W, 2) float64, NaN after the last.

        Where each has one moment, as in most data sets, W is left out: (N, 2), as `spans`.
        """
        most = max((len(annotation.moments) for annotation in annotations), default=1)
        if most == 1:
            return self.spans(annotations)
        truths = np.full((len(annotations), most, 2), np.nan)
        for row, annotation in zip(truths, annotations):
            row[: len(annotation.moments)] = [self._fractions(annotation.video, one) for one in annotation.moments]
        return truths

    @property
    def files(self) -> list[Path]:
        """The files of all splits, and the tables that they are read with; not the features."""
        siblings = (path for path in self.root.glob("*.json") if path.name in (NOTES, "dataset.json"))
        return [*dict.fromkeys(path for split in self.splits for path in self._layout.files(split)), *siblings]

    def digest(self, split: str) -> str:
        """Return the SHA-256 of a split's annotation file and of the tables it is read with."""
        paths = self._layout.files(split)
        for path in paths:
            check_file(path, "The annotation file", AnnotationError, "the data set is not complete without it")
        return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()

    @functools.cached_property
    def store(self) -> FeatureStore:
        """Return the store of the clip features."""
        return open_store(self.root, self._layout.feature_place())

    def feature_path(self, video: str) -> Path:
        """Return the file that holds the features of a video: `.pt` before `.npy` before `.npz`, or an HDF5 file.

        Raises:
            FeatureError: there is none.
        """
        return self.store.path(video)

    def frames(self, video: str, num_clips: int | None = None) -> int:
        """Return the frames of a video, as its segments are counted in.

        They are read from the annotations. Where these have none, frames are counted from the clips by the clock of
        the data set's features, and so they are where the preset says `spread` and the clips of the file are not as
        many as the clock makes of the frames (TACoS, whose features are published at several strides): segments
        are then equal parts of the clips, and so of the video.

        Args:
            video: its name.
            num_clips: of its features, where they have been read already.

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
            if not self._told_of_stride:
                self._told_of_stride = True
                log.warning(
                    "%s: %d clips of %r do not fit its %d frames, of which the clock makes %d; segments of such videos "
                    "are equal parts of their clips (said once).",
                    self.root, clips, video, num_frames, clock.num_clips(num_frames),
                )  # fmt: skip
        return clock.num_frames(clips)

    def video(self, name: str) -> Video:
        """Return a video with its features and clock.

        Raises:
            AnnotationError: the annotations do not know it.
            FeatureError: its features are missing or unusable.
        """
        self._layout.check_known(name, "--video")
        features = self.store.load(name)
        self._check_features(name)
        frames = self.frames(name, len(features))
        counted = None if frames == self.num_frames.get(name) else self.preset.features.clock
        return Video(features, frames, self.durations[name], name, self.origin, counted, offset=self.offset(name))

    def offset(self, name: str) -> float:
        """Return the seconds from the start of a video file to its first picture, as `runtime.extract` noted them.

        It is 0 where there is no note. Durations and annotations of a data set count from the first picture.

        Raises:
            AnnotationError: the note does not match its digest (code `damaged_note`), or the offset is no number.
        """
        note = self._note(name)
        offset = note.get("offset", 0.0)
        if not is_number(offset):
            raise AnnotationError(
                f"{self.root / NOTES}: the offset of {excerpt(name)} is no number; extract the video again."
            )
        return float(offset)

    def offsets(self) -> dict[str, float]:
        """Return the offsets that are not 0, in seconds by video; raises as `offset`."""
        return {name: offset for name in sorted(self._notes) if (offset := self.offset(name))}

    def _note(self, name: str) -> Mapping[str, Any]:
        """Return what `runtime.extract` noted about a video, compared with its digest where it has one."""
        note = self._notes.get(name)
        if not isinstance(note, dict):
            return {}
        content = {key: value for key, value in note.items() if key != "digest"}
        if "digest" in note and note["digest"] != json_digest(content):
            raise AnnotationError(
                f"{self.root / NOTES}: the note on {excerpt(name)} was changed or damaged, since it does not match its "
                "digest. Extract the video again.",
                code="damaged_note",
            )
        return content

    def _check_features(self, name: str) -> None:
        """Raise FeatureError if the features of a video are not those that `runtime.extract` noted."""
        noted = self._note(name).get("features")
        if not noted:
            return
        path = self.feature_path(name)
        if sha256(path) != noted:
            raise FeatureError(
                f"{path} was changed or damaged, since it does not match the digest in {NOTES}. Extract the "
                "video again.",
                code="damaged_features",
            )

    @functools.cached_property
    def _notes(self) -> Mapping[str, Any]:
        path = self.root / NOTES
        value = read_json(path, "notes on extracted videos") if path.is_file() else {}
        videos = value.get("videos") if isinstance(value, dict) else None
        if not isinstance(videos, dict):
            return {}
        makers = collections.Counter(str(note.get("extractor")) for note in videos.values() if isinstance(note, dict))
        if len(makers) > 1:
            log.warning(
                "%s holds features of %d extractors: %d of %d videos have those of the most common one. Give all its "
                "video files to `python -m runtime.extract` in one command.",
                self.root, len(makers), max(makers.values()), sum(makers.values()),
            )  # fmt: skip
        return videos

    def features(self) -> Features:
        """Return what the clip features of this data set are, their width read off its first annotated video."""
        split = "train" if "train" in self.splits else "test"
        first = self.annotations(split, invalid="keep", quiet=True)[0]
        return dataclasses.replace(self.preset.features, dim=self.video(first.video).features.shape[1])

    def check_clips(
        self, videos: Sequence[str], clock: ClipTiming | None = None, store: FeatureStore | None = None
    ) -> None:
        """Compare frames, durations and clips of `videos` before a long computation, without reading their features.

        Args:
            videos: names; the clips of at most `CHECKED_VIDEOS` of them are counted, evenly spaced.
            clock: clip timing of the features; that of the preset when not given.
            store: where features are; those of this data set when not given.

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
        """Raise AnnotationError for an impossible frame rate; warn of an unusual one, once for each video."""
        name = f"The video {excerpt(video)}"
        usual_rate = None if video in self._rated else usual_rate
        self._rated.add(video)
        check_frame_rate(name, num_frames, self.durations[video], AnnotationError, usual_rate)

    @functools.cached_property
    def _usual_rate(self) -> float | None:
        return self._median_rate(self.preset.features.clock, self.store)

    def _median_rate(self, clock: ClipTiming, store: FeatureStore) -> float | None:
        """Return the median of the frames per second; None if too few videos have frame counts or features.

        Without frame counts, the clips of `COUNTED_VIDEOS` videos are counted.
        """
        counts = dict(self.num_frames)
        for video in [] if counts else _sample(sorted(self.durations), COUNTED_VIDEOS):
            with contextlib.suppress(GroundingError):
                counts[video] = clock.num_frames(store.num_clips(video))
        return median_rate(count / self.durations[video] for video, count in counts.items() if video in self.durations)

    def check_clock(self, clock: ClipTiming) -> None:
        """Warn if clips of this data set lie on other frames than those that a model learnt from."""
        self.origin.check_clock(str(self.root), self.preset.features.clock, clock)

    def _fractions(self, video: str, window: Times) -> tuple[float, float]:
        duration = self.durations[video]
        return window[0] / duration, min(window[1] / duration, 1.0)

    def _problem(self, video: str, start: float, end: float) -> str | None:
        duration = self.durations[video]
        if start < 0:
            return f"the moment starts at {start:g} s, before its video"
        if start >= duration:
            return f"the moment starts at {start:g} s and its video ends at {duration:g} s"
        if end <= start:
            return f"the moment ends at {end:g} s, not after its start at {start:g} s"
        return None


def median_rate(rates: Iterable[float]) -> float | None:
    """Return the median of the frames per second of a data set; None for too few videos."""
    known = list(rates)
    return float(np.median(known)) if len(known) >= MIN_VIDEOS_FOR_UNITS else None


def _sample(videos: Sequence[str], count: int) -> Sequence[str]:
    """Return at most `count` of `videos`, evenly spaced."""
    return videos[:: max(1, -(-len(videos) // count))]


def one_per_moment(annotations: Iterable[Annotation]) -> list[Annotation]:
    """Return one annotation for every moment of each sentence, as networks and priors learn from them."""
    return [annotation.narrowed((window,)) for annotation in annotations for window in annotation.moments]
