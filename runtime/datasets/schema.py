"""Define the common form into which every published layout is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from runtime.datasets.presets import Preset

Times = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One sentence of a data set and the moment it describes.

    Attributes:
        start, end: seconds, as written in the file.
        line: number of the line, or of the sentence in a JSON file, starting at 1.
        qid: id of the sentence, if the data set has ids.
        several: all moments, if there are several; `start` and `end` are the first.
    """

    video: str
    start: float
    end: float
    sentence: str
    line: int
    qid: int | str | None = None
    several: tuple[Times, ...] = ()

    @property
    def name(self) -> int | str:
        """Return the id of the query in prediction files."""
        return self.line if self.qid is None else self.qid

    @property
    def moments(self) -> tuple[Times, ...]:
        """Return all moments, one or more, in seconds."""
        return self.several or ((self.start, self.end),)

    def narrowed(self, moments: tuple[Times, ...]) -> Annotation:
        """Return the annotation with only these of its moments, at least one."""
        (start, end), *others = moments
        return dataclasses.replace(self, start=start, end=end, several=moments if others else ())


@dataclasses.dataclass(frozen=True)
class Row:
    """An annotation as it is read, before its times are checked.

    Attributes:
        label: short name of the row in messages that list several rows.
        location: file and line or sentence, with which messages begin.
    """

    annotation: Annotation
    label: str
    location: str


class DatasetFormat(Protocol):
    """A directory in one of the published formats.

    Attributes:
        preset: default options of the data set.
        durations: video to seconds.
        num_frames: video to frame count; empty if the annotations have none.
        unit: name of its rows: lines or sentences.
        correction: instruction for an invalid row, as an imperative without a full stop.
        simulated: whether the annotations state that the features are simulated.
    """

    preset: Preset
    durations: dict[str, float]
    num_frames: dict[str, int]
    unit: str
    correction: str
    simulated: bool

    def path(self, split: str) -> Path:
        """Return the path of the annotation file of a split, which may not exist."""

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split in file order; AnnotationError if one is malformed."""

    def videos(self, split: str) -> set[str]:
        """Return the names of the videos of a split without parsing their annotations."""

    def files(self, split: str) -> list[Path]:
        """Return the files from which the rows of a split and the words are read."""

    def words(self) -> Mapping[str, int] | None:
        """Return the word table; None if the format has none."""

    def feature_location(self) -> Path | None:
        """Return the directory or HDF5 file of the features; None for the default, see `open_store`."""

    def check_known(self, video: str, location: str) -> None:
        """Raise AnnotationError, whose message begins with `location`, if the annotations do not list a video."""
