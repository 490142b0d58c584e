"""Read the JSON format of ActivityNet Captions and TACoS: one file per split, with the sentences of each video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import is_number
from runtime.datasets.json_rows import is_interval, malformed
from runtime.datasets.presets import PRESETS, Preset
from runtime.datasets.schema import Annotation, Row
from runtime.datasets.validation import MAX_FRAME_RATE, SPLITS, VideoTable, missing_split, sentence_of, unlisted_video

# Video to its length, timestamps and sentences.
Entries = Mapping[str, Mapping[str, Any]]


# Seconds of a video, its frame count or None, and the length of a second in the unit of its timestamps.
Clock = tuple[float, Optional[int], float]


class Captions:
    """`{"VIDEO": {"timestamps": [[start, end], ...], "sentences": [...], ...}}` in `SPLIT.json`; see `DatasetFormat`.

    Args:
        clock_of: reads the entry of a video; raises TypeError, KeyError or ValueError if it has no length.
        clock: description of the keys that `clock_of` reads, for messages.
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
                    duration, num_frames, self._second[name] = clock_of(entry)
                except (KeyError, TypeError, ValueError, ArithmeticError):
                    raise AnnotationError(
                        f"{location}: expected {clock}, timestamps and sentences, got {excerpt(list(entry))[:80]}. "
                        "Correct the entry, or use one directory for each data set.",
                        code="missing_field",
                    ) from None
                videos.add(name, duration, location, num_frames)
        self.durations, self.num_frames = videos.durations, videos.num_frames

    def path(self, split: str) -> Path:
        return self.root / f"{split}.json"

    def files(self, split: str) -> list[Path]:
        return [self.path(split)]

    def words(self) -> None:
        return None

    def feature_location(self) -> None:
        return None

    def videos(self, split: str) -> set[str]:
        return set(self._entries(split))

    def rows(self, split: str) -> Iterator[Row]:
        number = 0
        for name, entry in self._entries(split).items():
            location = f"{self.path(split)}, video {excerpt(name)}"
            times, sentences = entry.get("timestamps"), entry.get("sentences")
            if not isinstance(times, list) or not isinstance(sentences, list) or len(times) != len(sentences):
                lists = (times, sentences)
                raise malformed(location, "equally many timestamps and sentences", lists, "correct the entry")
            for index, (window, sentence) in enumerate(zip(times, sentences), 1):
                number += 1
                row_location = f"{location}, sentence {index}"
                if not is_interval(window):
                    raise malformed(row_location, "timestamps [start, end]", window, "correct the timestamps")
                start, end = (float(value) / self._second[name] for value in window)
                annotation = Annotation(name, start, end, sentence_of(sentence, row_location), number)
                yield Row(annotation, f"{name} sentence {index}", row_location)

    def check_known(self, video: str, location: str) -> None:
        if video not in self.durations:
            raise unlisted_video(video, self.durations, [f"{split}.json" for split in self._splits], location)

    def _entries(self, split: str) -> Entries:
        if split not in self._splits:
            raise missing_split(split, self.path(split), self._splits)
        return self._splits[split]


def _clock_in_seconds(entry: Mapping[str, Any]) -> Clock:
    if "num_frames" in entry or "fps" in entry:
        raise ValueError
    return entry["duration"], None, 1.0


def _clock_in_frames(entry: Mapping[str, Any]) -> Clock:
    rate, count = entry["fps"], entry["num_frames"]
    if "duration" in entry or not is_number(rate) or not 0 < rate <= MAX_FRAME_RATE:
        raise ValueError
    return count / rate, count, rate


def activitynet(root: Path, splits: Mapping[str, Entries]) -> Captions:
    """Return ActivityNet Captions as published for grounding, with durations and timestamps in seconds."""
    return Captions(root, splits, PRESETS["activitynet"], _clock_in_seconds, "a duration in seconds")


def tacos(root: Path, splits: Mapping[str, Entries]) -> Captions:
    """Return TACoS as published for grounding, with `fps`, `num_frames`, and timestamps in frame numbers."""
    return Captions(root, splits, PRESETS["tacos"], _clock_in_frames, "fps and num_frames")


def read_splits(root: Path) -> dict[str, Entries]:
    """Return the content of the files `train.json`, `val.json` and `test.json` that exist in a directory, by split.

    Raises:
        AnnotationError: a file is not a JSON object of videos.
    """
    paths = {split: root / f"{split}.json" for split in SPLITS}
    return {split: _entries(path) for split, path in paths.items() if path.exists()}


def _entries(path: Path) -> Entries:
    entries = read_json(path, "annotations by video")
    if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
        raise AnnotationError(
            f"Expected a JSON object of videos with timestamps and sentences in {path}, got {excerpt(entries)[:80]}. "
            "Correct the file, or move it to another directory.",
            code="unexpected_structure",
        )
    return entries
