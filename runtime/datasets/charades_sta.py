"""Read Charades-STA as published, with a line for each sentence and tables of videos and words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.core.errors import AnnotationError, excerpt
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import read_lines
from runtime.datasets.json_rows import malformed
from runtime.datasets.presets import PRESETS
from runtime.datasets.schema import Annotation, Row
from runtime.datasets.validation import (
    SPLITS,
    check_distinct_names,
    check_video_name,
    missing_split,
    unlisted_video,
)

DURATIONS, FRAMES, WORDS = "Charades_duration.json", "Charades_frames_info.json", "Charades_word2id.json"
TABLES = (DURATIONS, FRAMES, WORDS)
FEATURE_DIRECTORY = "C3D_unit16_overlap0.5_merged"


class CharadesSTA:
    """`Charades_sta_SPLIT.txt` with lines `VIDEO START END##SENTENCE`, and JSON tables; see `DatasetFormat`."""

    unit, correction, simulated = "lines", "correct the line or leave it out", False

    def __init__(self, root: Path) -> None:
        self.root, self.preset = root, PRESETS["charades-sta"]
        self.durations: dict[str, float] = self._table(DURATIONS, "video to seconds")
        self.num_frames: dict[str, int] = self._table(FRAMES, "video to frame count")
        for name in self.durations:
            check_video_name(name, str(root / DURATIONS))
        check_distinct_names(self.durations, str(root / DURATIONS))

    @staticmethod
    def claims(root: Path) -> list[Path]:
        """Return the files of a directory that have this format."""
        named = [root / name for name in TABLES if (root / name).exists()]
        return [*named, *sorted(root.glob("Charades_sta_*.txt"))]

    def path(self, split: str) -> Path:
        return self.root / f"Charades_sta_{split}.txt"

    def files(self, split: str) -> list[Path]:
        return [self.path(split), *(self.root / name for name in TABLES)]

    def words(self) -> Mapping[str, int]:
        return self._table(WORDS, "word to id")

    def feature_location(self) -> Path:
        return self.root / FEATURE_DIRECTORY

    def videos(self, split: str) -> set[str]:
        return {line.split(maxsplit=1)[0] for line in self._lines(split) if line.strip()}

    def rows(self, split: str) -> Iterator[Row]:
        path = self.path(split)
        lines = self._lines(split)
        if not lines:
            raise AnnotationError(
                f"Expected lines VIDEO START END##SENTENCE in {path}, got an empty file. Copy the file again.",
                code="empty_file",
            )
        for number, line in enumerate(lines, 1):
            location = f"{path}, line {number}"
            yield Row(self._parse(line, location, number), str(number), location)

    def _lines(self, split: str) -> list[str]:
        path = self.path(split)
        if not path.exists():
            raise missing_split(split, path, [name for name in SPLITS if self.path(name).exists()])
        return read_lines(path, "lines of VIDEO START END##SENTENCE")

    def check_known(self, video: str, location: str) -> None:
        for table, name in ((self.durations, DURATIONS), (self.num_frames, FRAMES)):
            if video not in table:
                raise unlisted_video(video, table, [name], location)

    def _table(self, name: str, description: str) -> dict[str, Any]:
        table = read_json(self.root / name, description)
        if not isinstance(table, dict) or not table:
            raise AnnotationError(
                f"{self.root / name}: expected a JSON object ({description}), got {excerpt(table)[:60]}. Correct the "
                "file.",
                code="unexpected_structure",
            )
        for key, value in table.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # Counts and ids start at 1.
            if not is_number or not 0 < value < 1e15 or (name != DURATIONS and value < 1):
                raise AnnotationError(
                    f"{self.root / name}: expected {description}, got {excerpt(key)} to {excerpt(value)}. Correct the "
                    "entry.",
                    code="unexpected_structure",
                )
        return table

    def _parse(self, line: str, location: str, number: int) -> Annotation:
        parts = line.strip().split("##")
        fields = parts[0].split()
        if len(parts) != 2 or len(fields) != 3 or not parts[1].strip():
            raise malformed(location, "VIDEO START END##SENTENCE", line.strip())
        try:
            start, end = float(fields[1]), float(fields[2])
        except ValueError:
            start = end = math.nan
        if not (math.isfinite(start) and math.isfinite(end)):
            raise malformed(location, "a start and an end in seconds", fields[1:])
        self.check_known(fields[0], location)
        return Annotation(fields[0], start, end, parts[1].strip(), number)
