"""Read the JSON format that ActivityNet Captions and TACoS share: one file per split, with the sentences of each
video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import is_number
from runtime.core.names import by_fold, near_name
from runtime.datasets.presets import Preset
from runtime.datasets.schema import Annotation, Row
from runtime.datasets.validation import SPLITS, VideoTable, sentence_of

# Video to what is said of it.
Entries = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Clock:
    """The length of a video.

    Attributes:
        duration: seconds.
        num_frames: frames; None where the annotations have none.
        second: how much a second is in the unit of the timestamps.
    """

    duration: float
    num_frames: int | None
    second: float


class Captions:
    """`{"VIDEO": {"timestamps": [[start, end], ...], "sentences": [...], ...}}` in `SPLIT.json`; see `DatasetFormat`.

    Args:
        root: the directory.
        splits: the content of its files, by split.
        preset: of the data set.
        clock_of: reads the length of a video off its entry; TypeError, KeyError or ValueError if there is none.
        clock: what `clock_of` looks for, for messages.

    Raises:
        AnnotationError: a file is malformed, or two give one video different lengths.
    """

    unit, correction, simulated = "sentences", "correct the entry or leave it out", False

    def __init__(
        self,
        root: Path,
        splits: Mapping[str, Entries],
        preset: Preset,
        clock_of: Callable[[Mapping[str, Any]], Clock],
        clock: str,
    ) -> None:
        self.root, self.preset, self._splits = root, preset, splits
        self._second: dict[str, float] = {}
        videos = VideoTable()
        for split, entries in self._splits.items():
            for name, entry in entries.items():
                location = f"{self.path(split)}, video {excerpt(name)}"
                try:
                    result = clock_of(entry)
                except (KeyError, TypeError, ValueError, ArithmeticError):
                    raise AnnotationError(
                        f"{location}: {clock} are expected beside timestamps and sentences; correct the entry, and "
                        "keep data sets of different formats in different directories.",
                        code="missing_field",
                    ) from None
                videos.add(name, result.duration, location, result.num_frames)
                self._second[name] = result.second
        self.durations, self.num_frames = videos.durations, videos.num_frames

    def path(self, split: str) -> Path:
        return self.root / f"{split}.json"

    def files(self, split: str) -> list[Path]:
        return [self.path(split)]

    def words(self) -> None:
        return None

    def feature_place(self) -> None:
        return None

    def videos(self, split: str) -> set[str]:
        return set(self._entries(split))

    def rows(self, split: str) -> Iterator[Row]:
        number = 0
        for name, entry in self._entries(split).items():
            location = f"{self.path(split)}, video {excerpt(name)}"
            times, sentences = entry.get("timestamps"), entry.get("sentences")
            if not isinstance(times, list) or not isinstance(sentences, list) or len(times) != len(sentences):
                raise AnnotationError(
                    f"{location}: as many timestamps as sentences are expected; correct the entry.",
                    code="malformed_row",
                )
            for index, (window, sentence) in enumerate(zip(times, sentences), 1):
                number += 1
                where = f"{location}, sentence {index}"
                if not isinstance(window, list) or len(window) != 2 or not all(map(is_number, window)):
                    raise AnnotationError(
                        f"{where}: the timestamps should be [start, end], and are {excerpt(window)}.",
                        code="malformed_row",
                    )
                start, end = (float(value) / self._second[name] for value in window)
                annotation = Annotation(name, start, end, sentence_of(sentence, where), number)
                yield Row(annotation, f"{name} sentence {index}", where)

    def check_known(self, video: str, location: str) -> None:
        if video not in self.durations:
            files = ", ".join(f"{split}.json" for split in self._splits)
            near = near_name(by_fold(self.durations), video)
            raise AnnotationError(
                f"{location}: the video {excerpt(video)} is not in {files}; check the name.{near}",
                code="unlisted_video",
            )

    def _entries(self, split: str) -> Entries:
        if split not in self._splits:
            raise AnnotationError(
                f"{self.path(split)} does not exist, so there is no split {excerpt(split)} in this data set; there are "
                f"{', '.join(self._splits) or 'none'}.",
                code="missing_split",
            )
        return self._splits[split]


def read_splits(root: Path) -> dict[str, Entries]:
    """Return the content of the split files of a directory; AnnotationError for what is no such file."""
    paths = {split: root / f"{split}.json" for split in SPLITS}
    return {split: _entries(path) for split, path in paths.items() if path.exists()}


def _entries(path: Path) -> Entries:
    entries = read_json(path, "annotations by video")
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise AnnotationError(
            f"{path} should map videos to their timestamps and sentences, as ActivityNet Captions and TACoS do, and "
            "holds something else.",
            code="unexpected_structure",
        )
    return entries
