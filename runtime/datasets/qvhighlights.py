"""QVHighlights as published, a JSON row for each query, and the common form, which is the same with a preset beside it.

The common form is what `train.prepare` writes: `train.jsonl`, `val.jsonl`, `test.jsonl`, `vocabulary.json` and
`dataset.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, excerpt, reading
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format, is_number, parse_json, read_lines
from runtime.core.names import by_fold, near_name
from runtime.core.video import MAX_FRAMES
from runtime.datasets.presets import PRESETS, Preset
from runtime.datasets.schema import Annotation, Row, Times
from runtime.datasets.validation import SPLITS, VideoTable, sentence_of

FORMAT = "drn-dataset/1"
HIDDEN = (math.nan, math.nan)
ABOUT, WORDS = "dataset.json", "vocabulary.json"


class QVHighlights:
    """`{"qid", "query", "vid", "duration", "relevant_windows": [[start, end], ...]}` a line, seconds; see
    `DatasetFormat`.

    Splits are `SPLIT.jsonl` or, as published, `highlight_SPLIT_release.jsonl`.

    Raises:
        AnnotationError: a row or `dataset.json` is malformed, or one name stands for two videos.
    """

    unit, correction = "lines", "correct the line or leave it out"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._about = _read_about(root / ABOUT) if (root / ABOUT).exists() else {}
        self.preset: Preset = self._about.get("preset", PRESETS["qvhighlights"])
        self.simulated = bool(self._about.get("simulated"))
        self._splits: dict[str, list[Row]] = {}
        videos = VideoTable()
        for split in SPLITS:
            if self.path(split).exists():
                self._splits[split] = list(_read_rows(self.path(split), videos))
        self.durations = videos.durations
        self.num_frames: dict[str, int] = self._about.get("num_frames", {})

    @staticmethod
    def claims(root: Path) -> list[Path]:
        """Return the files of a directory that are of this format."""
        names = [ABOUT, *(name for split in SPLITS for name in _names(split))]
        return [root / name for name in names if (root / name).exists()]

    def path(self, split: str) -> Path:
        common, published = (self.root / name for name in _names(split))
        if common.exists() and published.exists():
            raise AnnotationError(
                f"{self.root} holds {split} twice, {common.name} and {published.name}; remove one.",
                code="duplicate_split",
            )
        return published if published.exists() else common

    def files(self, split: str) -> list[Path]:
        siblings = (self.root / name for name in (ABOUT, WORDS))
        return [self.path(split), *(path for path in siblings if path.exists())]

    def words(self) -> Mapping[str, int] | None:
        path = self.root / WORDS
        return read_json(path, "word to id") if path.exists() else None

    def feature_place(self) -> Path | None:
        location = self._about.get("features")
        return self.root / location if location else None

    def videos(self, split: str) -> set[str]:
        return {row.annotation.video for row in self._splits.get(split, [])}

    def rows(self, split: str) -> Iterator[Row]:
        if split not in self._splits:
            raise AnnotationError(
                f"{self.path(split)} does not exist, so there is no split {excerpt(split)} in this data set; there are "
                f"{', '.join(self._splits) or 'none'}.",
                code="missing_split",
            )
        for row in self._splits[split]:
            if math.isnan(row.annotation.start):
                raise AnnotationError(
                    f"{row.place}: relevant_windows is missing, as in a published test split, whose moments are kept "
                    "secret; such a split can neither be trained on nor scored.",
                    code="unpublished_moments",
                )
            yield row

    def check_known(self, video: str, location: str) -> None:
        if video not in self.durations:
            files = ", ".join(self.path(split).name for split in self._splits)
            near = near_name(by_fold(self.durations), video)
            raise AnnotationError(
                f"{location}: the video {excerpt(video)} is not in {files}; check the name.{near}",
                code="unlisted_video",
            )


def _names(split: str) -> tuple[str, str]:
    return f"{split}.jsonl", f"highlight_{split}_release.jsonl"


def _read_about(path: Path) -> dict[str, Any]:
    """Return `dataset.json` with its preset read."""
    value = read_json(path, "what a data set in the common form says of itself")
    check_format(value, FORMAT, f"{path}", AnnotationError, "prepare it again")
    with reading(path, "a description of a data set", AnnotationError, "prepare the data set again"):
        counts, location = value.get("num_frames", {}), value.get("features")
        if not all(is_number(count) and 2 <= count <= MAX_FRAMES for count in counts.values()):
            raise ValueError("num_frames should map videos to frame counts")
        if location is not None and (not isinstance(location, str) or "\0" in location):
            raise ValueError("features should be a path")
        return {**value, "preset": Preset.from_dict(value["preset"])}
    raise AssertionError


def _read_rows(path: Path, videos: VideoTable) -> Iterator[Row]:
    lines = read_lines(path, "a JSON object a line")
    if not lines:
        raise AnnotationError(
            f'{path} is empty; a row a line is expected: {{"qid", "query", "vid", "duration", ...}}.', code="empty_file"
        )
    seen: set[int | str] = set()
    for number, line in enumerate(lines, 1):
        location = f"{path}, line {number}"
        row = _row(line, location)
        name, qid = row["vid"], row["qid"]
        videos.add(name, row["duration"], location)
        if qid in seen:
            raise AnnotationError(
                f"{location}: the qid {excerpt(qid)} is in an earlier line too; give every query its own.",
                code="duplicate_query",
            )
        seen.add(qid)
        # A split whose moments are secret still names its videos; `rows` refuses it.
        windows = _windows(row["relevant_windows"], location) if "relevant_windows" in row else (HIDDEN,)
        sentence = sentence_of(row["query"], location)
        (start, end), several = windows[0], windows if len(windows) > 1 else ()
        yield Row(Annotation(name, start, end, sentence, number, qid, several), str(number), location)


def _row(line: str, location: str) -> dict[str, Any]:
    row = parse_json(line, location, advice="correct the line")
    kinds: dict[str, Any] = {"qid": (int, str), "query": str, "vid": str, "duration": (int, float)}
    for key, kind in kinds.items():
        if not isinstance(row, dict) or not isinstance(row.get(key), kind) or isinstance(row[key], bool):
            raise AnnotationError(
                f"{location}: a JSON object with qid, query, vid, duration and relevant_windows is expected, and its "
                f"{key} is missing or of another kind; correct the line, and keep data sets of different formats in "
                "different directories.",
                code="malformed_row",
            )
    return row


def _windows(value: Any, location: str) -> tuple[Times, ...]:
    good = isinstance(value, list) and all(
        isinstance(window, list) and len(window) == 2 and all(map(is_number, window)) for window in value
    )
    if not good or not value:
        raise AnnotationError(
            f"{location}: relevant_windows should be [[start, end], ...] in seconds, and is {excerpt(value)}.",
            code="malformed_row",
        )
    return tuple((float(start), float(end)) for start, end in value)
