"""A data set in the published Charades-STA layout: sentences, moments, clocks, and where the features are."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.errors import AnnotationError, FeatureError, GroundingError
from runtime.files import read_json, sha256
from runtime.manifest import Features
from runtime.videos import Video, load_features
from runtime.vocabulary import Vocabulary

log = logging.getLogger("drn")

Invalid = Literal["error", "drop", "keep"]

TABLES = ("Charades_duration.json", "Charades_frames_info.json", "Charades_word2id.json")
FEATURE_DIRECTORY = "C3D_unit16_overlap0.5_merged"


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One sentence of a data set and the moment it describes.

    Attributes:
        video: its name.
        start, end: seconds, as written in the file.
        sentence: as written in the file.
        line: where it stands in the file, from 1.
    """

    video: str
    start: float
    end: float
    sentence: str
    line: int


class DataSet:
    """A directory in the published Charades-STA layout.

    Raises:
        AnnotationError: the directory or one of its tables is missing or malformed.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise AnnotationError(
                f"The data directory {self.root} does not exist; give a directory in the Charades-STA layout, "
                "or make one with `python -m train.simulate --output DIR`."
            )
        self.durations: dict[str, float] = self._table("Charades_duration.json", "video to seconds")
        self.num_frames: dict[str, int] = self._table("Charades_frames_info.json", "video to frame count")

    @functools.cached_property
    def words(self) -> dict[str, int]:
        return self._table("Charades_word2id.json", "word to id")

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        try:
            return Vocabulary(self.words)
        except GroundingError as error:
            raise AnnotationError(f"{self.root / 'Charades_word2id.json'}: {error}") from error

    @functools.cached_property
    def simulated(self) -> bool:
        """Whether the features are simulated, so that recall on them says nothing of published numbers."""
        return (self.root / "simulated.json").is_file()

    def annotations_path(self, split: str) -> Path:
        return self.root / f"Charades_sta_{split}.txt"

    def annotations(self, split: str, invalid: Invalid = "error", quiet: bool = False) -> list[Annotation]:
        """Return the sentences of a split in file order.

        Ends past the end of the video are common in the published files and are left as they are; `span` clips them.

        Args:
            split: `train` or `test`.
            invalid: what to do with a moment that ends before it starts, or starts after its video has ended:
                `error`, `drop` with a warning that names the lines, or `keep` as the published code does.
            quiet: whether nothing is said of moments that are cut off at the end of their video.

        Raises:
            AnnotationError: a line is malformed or names an unknown video, or is invalid under `error`.
        """
        path = self.annotations_path(split)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise AnnotationError(f"{path} does not exist, so there is no split {split!r} in this data set.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise AnnotationError(f"{path} cannot be read as text: {error}.") from error
        if not lines:
            raise AnnotationError(f"{path} is empty; one annotation a line is expected: VIDEO START END##SENTENCE.")
        annotations, dropped, clipped = [], [], 0
        for number, line in enumerate(lines, 1):
            annotation = self._parse(line, f"{path}, line {number}", number)
            problem = self._problem(annotation)
            if problem and invalid == "error":
                raise AnnotationError(f"{path}, line {number}: {problem}; correct the line or leave it out.")
            if problem and invalid == "drop":
                dropped.append(f"{number} ({problem})")
                continue
            clipped += annotation.end > self.durations[annotation.video]
            annotations.append(annotation)
        if dropped:
            log.warning("%s: left out %d lines: %s.", path.name, len(dropped), "; ".join(dropped))
        if clipped and not quiet:
            log.info(
                "%s: %d of %d moments end after their video and are cut off there.",
                path.name,
                clipped,
                len(annotations),
            )
        if not annotations:
            raise AnnotationError(f"{path} holds no usable annotation.")
        return annotations

    def span(self, annotation: Annotation) -> tuple[float, float]:
        """Return the moment as fractions of its video; the end is clipped at 1, as published, the start is not."""
        duration = self.durations[annotation.video]
        return annotation.start / duration, min(annotation.end / duration, 1.0)

    def digest(self, split: str) -> str:
        """Return the SHA-256 of a split's annotation file and of the tables it is read with."""
        names = (self.annotations_path(split).name, *TABLES)
        return hashlib.sha256("".join(sha256(self.root / name) for name in names).encode()).hexdigest()

    def spans(self, annotations: Sequence[Annotation]) -> np.ndarray:
        """Return the moments as fractions of their videos, (N, 2) float64; see `span`."""
        return np.array([self.span(annotation) for annotation in annotations], np.float64).reshape(-1, 2)

    def feature_path(self, video: str) -> Path:
        """Return the feature file of a video, `.pt` before `.npy`.

        Raises:
            FeatureError: neither exists.
        """
        for suffix in (".pt", ".npy"):
            path = self.root / FEATURE_DIRECTORY / f"{video}{suffix}"
            if path.is_file():
                return path
        raise FeatureError(
            f"There are no features of {video!r}: {self.root / FEATURE_DIRECTORY / video}.pt (or .npy) is missing."
        )

    def video(self, name: str) -> Video:
        """Return a video with its features and clock.

        Raises:
            AnnotationError: the tables do not know it.
            FeatureError: its features are missing or unusable.
        """
        self._check_known(name, "--video")
        return Video(load_features(self.feature_path(name)), self.num_frames[name], self.durations[name], name)

    def features(self) -> Features:
        """Return what the clip features of this data set are, read off its first annotated video."""
        first = self.annotations(
            "train" if self.annotations_path("train").is_file() else "test", invalid="keep", quiet=True
        )[0]
        return Features(dim=self.video(first.video).features.shape[1])

    def _table(self, name: str, what: str) -> dict[str, Any]:
        table = read_json(self.root / name, what)
        if not isinstance(table, dict) or not table:
            raise AnnotationError(f"{self.root / name} should map {what}, and holds something else.")
        for key, value in table.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
                raise AnnotationError(f"{self.root / name} should map {what}, and maps {key!r} to {value!r}.")
        return table

    def _parse(self, line: str, place: str, number: int) -> Annotation:
        parts = line.strip().split("##")
        fields = parts[0].split()
        if len(parts) != 2 or len(fields) != 3 or not parts[1].strip():
            raise AnnotationError(
                f"{place}: expected VIDEO START END##SENTENCE and found {line.strip()[:80]!r}; correct the line."
            )
        try:
            start, end = float(fields[1]), float(fields[2])
        except ValueError:
            start = end = math.nan
        if not (math.isfinite(start) and math.isfinite(end)):
            raise AnnotationError(
                f"{place}: start and end should be seconds, and are {fields[1]!r} and {fields[2]!r}; correct the line."
            )
        self._check_known(fields[0], place)
        return Annotation(fields[0], start, end, parts[1].strip(), number)

    def _check_known(self, video: str, place: str) -> None:
        for table, name in (
            (self.durations, "Charades_duration.json"),
            (self.num_frames, "Charades_frames_info.json"),
        ):
            if video not in table:
                raise AnnotationError(f"{place}: the video {video!r} is not in {name}; add it there or check the name.")

    def _problem(self, annotation: Annotation) -> str | None:
        duration = self.durations[annotation.video]
        if annotation.start < 0:
            return f"the moment starts at {annotation.start:g} s, before its video"
        if annotation.start >= duration:
            return f"the moment starts at {annotation.start:g} s and its video ends at {duration:g} s"
        if annotation.end <= annotation.start:
            return f"the moment ends at {annotation.end:g} s, not after its start at {annotation.start:g} s"
        return None
