"""The neutral form that every published layout is read into."""

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
        video: its name.
        start, end: seconds, as written in the file.
        sentence: as written in the file.
        line: its number in the file, from 1: the line, or in a JSON file the how-many-eth sentence.
        qid: its own name where the data set gives it one.
        several: all moments it describes, where there are several; `start` and `end` are the first.
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
        """Every moment it describes, one or more, in seconds."""
        return self.several or ((self.start, self.end),)

    def narrowed(self, moments: tuple[Times, ...]) -> Annotation:
        """Return the same sentence with only these of its moments."""
        (start, end), *others = moments
        return dataclasses.replace(self, start=start, end=end, several=moments if others else ())


@dataclasses.dataclass(frozen=True)
class Row:
    """An annotation as it is read, before its times are judged.

    Attributes:
        annotation: what it says.
        label: how a list of rows calls it.
        place: how a message begins that is about it: the file, and where in it.
    """

    annotation: Annotation
    label: str
    place: str


class DatasetFormat(Protocol):
    """A directory in one of the published formats.

    Attributes:
        preset: what is usual for the data set.
        durations: video to seconds.
        num_frames: video to frame count, where the annotations have it.
        unit: what its rows are called: lines or sentences.
        correction: what to do with a row that makes no sense, as the end of a message.
        simulated: whether the annotations themselves say that their features are.
    """

    preset: Preset
    durations: dict[str, float]
    num_frames: dict[str, int]
    unit: str
    correction: str
    simulated: bool

    def path(self, split: str) -> Path:
        """Return the annotation file of a split, whether or not there is one."""

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split in file order; AnnotationError where one is malformed."""

    def videos(self, split: str) -> set[str]:
        """Return the names of the videos of a split, without a look at what is said of them."""

    def files(self, split: str) -> list[Path]:
        """Return all that decides what the rows of a split, and their words, are read as."""

    def words(self) -> Mapping[str, int] | None:
        """Return the word table, or None where the format has none."""

    def feature_place(self) -> Path | None:
        """Return the directory or HDF5 file of the features; None for the usual places."""

    def check_known(self, video: str, location: str) -> None:
        """Raise AnnotationError, beginning with `place`, if the annotations do not know a video."""
