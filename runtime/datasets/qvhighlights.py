"""Read QVHighlights as published, with a JSON row for each query, and the common form, which adds a preset.

`train.prepare` writes the common form: `train.jsonl`, `val.jsonl`, `test.jsonl`, `vocabulary.json` and `dataset.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, excerpt, reading
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format, is_number
from runtime.core.video import MAX_FRAMES
from runtime.datasets.json_rows import intervals, malformed, read_rows
from runtime.datasets.presets import PRESETS, Preset
from runtime.datasets.schema import Annotation, Row, Times
from runtime.datasets.validation import SPLITS, VideoTable, missing_split, sentence_of, unlisted_video

FORMAT = "drn-dataset/1"
HIDDEN = (math.nan, math.nan)
DESCRIPTION, WORDS = "dataset.json", "vocabulary.json"


class QVHighlights:
    """Lines of `{"qid", "query", "vid", "duration", "relevant_windows": [[start, end], ...]}`; see `DatasetFormat`.

    Splits are `SPLIT.jsonl` or, as published, `highlight_SPLIT_release.jsonl`. Times are in seconds.
    """

    unit, correction = "lines", "correct the line or leave it out"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._description = _read_description(root / DESCRIPTION) if (root / DESCRIPTION).exists() else {}
        self.preset: Preset = self._description.get("preset", PRESETS["qvhighlights"])
        self.simulated = bool(self._description.get("simulated"))
        self._splits: dict[str, list[Row]] = {}
        videos = VideoTable()
        for split in SPLITS:
            if self.path(split).exists():
                self._splits[split] = list(_read_rows(self.path(split), videos))
        self.durations = videos.durations
        self.num_frames: dict[str, int] = self._description.get("num_frames", {})

    @staticmethod
    def claims(root: Path) -> list[Path]:
        """Return the files of a directory that have this format."""
        names = [DESCRIPTION, *(name for split in SPLITS for name in _names(split))]
        return [root / name for name in names if (root / name).exists()]

    def path(self, split: str) -> Path:
        common, published = (self.root / name for name in _names(split))
        if common.exists() and published.exists():
            raise AnnotationError(
                f"{self.root} has two files of the split {split}, {common.name} and {published.name}. Remove one file.",
                code="duplicate_split",
            )
        return published if published.exists() else common

    def files(self, split: str) -> list[Path]:
        siblings = (self.root / name for name in (DESCRIPTION, WORDS))
        return [self.path(split), *(path for path in siblings if path.exists())]

    def words(self) -> Mapping[str, int] | None:
        path = self.root / WORDS
        return read_json(path, "word to id") if path.exists() else None

    def feature_location(self) -> Path | None:
        location = self._description.get("features")
        return self.root / location if location else None

    def videos(self, split: str) -> set[str]:
        return {row.annotation.video for row in self._splits.get(split, [])}

    def rows(self, split: str) -> Iterator[Row]:
        if split not in self._splits:
            raise missing_split(split, self.path(split), self._splits)
        for row in self._splits[split]:
            if math.isnan(row.annotation.start):
                raise AnnotationError(
                    f"{row.location}: the row has no relevant_windows, because the moments of test splits are not "
                    "published. Train and evaluate on another split.",
                    code="unpublished_moments",
                )
            yield row

    def check_known(self, video: str, location: str) -> None:
        if video not in self.durations:
            raise unlisted_video(video, self.durations, [self.path(split).name for split in self._splits], location)


def _names(split: str) -> tuple[str, str]:
    return f"{split}.jsonl", f"highlight_{split}_release.jsonl"


def _read_description(path: Path) -> dict[str, Any]:
    """Return the content of `dataset.json` with its preset as a `Preset`."""
    advice = "prepare the data set again with `python -m train.prepare`"
    value = read_json(path, "description of a data set")
    check_format(value, FORMAT, f"{path}", AnnotationError, advice)
    with reading(path, "a description of a data set", AnnotationError, advice):
        counts, location = value.get("num_frames", {}), value.get("features")
        if not all(is_number(count) and 2 <= count <= MAX_FRAMES for count in counts.values()):
            raise ValueError(f"its num_frames are not from 2 to {MAX_FRAMES} frames for each video")
        if location is not None and (not isinstance(location, str) or "\0" in location):
            raise ValueError(f"its features are {excerpt(location)}, not a path")
        return {**value, "preset": Preset.from_dict(value["preset"])}
    raise AssertionError


def _read_rows(path: Path, videos: VideoTable) -> Iterator[Row]:
    seen: set[int | str] = set()
    for number, location, row in read_rows(path):
        _check_kinds(row, location)
        name, qid = row["vid"], row["qid"]
        videos.add(name, row["duration"], location)
        if qid in seen:
            raise AnnotationError(
                f"{location}: an earlier line has the same qid {excerpt(qid)}. Use a different qid for each query.",
                code="duplicate_query",
            )
        seen.add(qid)
        windows = _windows(row, location)
        sentence = sentence_of(row["query"], location)
        (start, end), several = windows[0], windows if len(windows) > 1 else ()
        yield Row(Annotation(name, start, end, sentence, number, qid, several), str(number), location)


def _check_kinds(row: dict[str, Any], location: str) -> None:
    kinds: dict[str, Any] = {"qid": (int, str), "query": str, "vid": str, "duration": (int, float)}
    for key, kind in kinds.items():
        if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            raise AnnotationError(
                f"{location}: expected a JSON object with qid, query, vid, duration and relevant_windows, but {key} is "
                "missing or has another type. Correct the line.",
                code="malformed_row",
            )


def _windows(row: dict[str, Any], location: str) -> tuple[Times, ...]:
    if "relevant_windows" not in row:
        # The videos of a split without published moments can be listed, but `rows` raises an error.
        return (HIDDEN,)
    windows = intervals(row, "relevant_windows", location)
    if not windows:
        raise malformed(location, "relevant_windows [[start, end], ...]", windows)
    return tuple(windows)
