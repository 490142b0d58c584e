"""Read the human action labels of Charades, from which features for Charades-STA are simulated."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.core.errors import AnnotationError
from runtime.core.io.text_files import read_lines, read_text
from runtime.datasets.charades_sta import CharadesSTA
from runtime.datasets.schema import Annotation
from train.simulation.scenario import REFERENCE_VIDEOS, Scenario, SimulationPlan, seeded_order

SPLITS = ("train", "test")
TABLES = ("Charades_word2id.json", "Charades_fps_dict.json", "Charades_duration.json", "Charades_frames_info.json")
SOURCE_FILES = (
    *(f"Charades_sta_{split}.txt" for split in SPLITS),
    *TABLES,
    *(f"Charades_v1_{split}.csv" for split in SPLITS),
)
# Moments and action labels are rounded to tenths of a second.
SAME_TIME_S = 0.051


class VideoLabels(NamedTuple):
    """The labels of one video; `actions` are (action class, start, end), in seconds."""

    scene: str
    objects: tuple[str, ...]
    actions: tuple[tuple[str, float, float], ...]


def charades_plan(annotations: Path, videos: int | None, seed: int) -> SimulationPlan:
    """Read the Charades-STA annotations of a directory into a plan; see `train.simulate.simulate`.

    Args:
        annotations: directory of all `SOURCE_FILES`.
        videos: maximum number of videos per split, chosen by the seed; None for all.

    Raises:
        AnnotationError: a file is missing, a row is malformed, or a table lacks a video.
    """
    for name in SOURCE_FILES:
        if not (annotations / name).is_file():
            raise AnnotationError(
                f"{annotations} does not contain {name}. Pass --annotations with {', '.join(SOURCE_FILES)} of "
                "Charades-STA, or with train.json, val.json and test.json of ActivityNet Captions or TACoS.",
                code="missing_file",
            )
    published = CharadesSTA(annotations)
    labels: dict[str, VideoLabels] = {}
    for split in SPLITS:
        labels |= _read_labels(annotations / f"Charades_v1_{split}.csv")
    texts: dict[str, str] = {name: read_text(annotations / name, "a table") for name in TABLES}
    selected: dict[str, None] = {}
    annotated: dict[str, None] = {}
    moments, exact = {}, {}
    for split in SPLITS:
        path = published.path(split)
        rows = [row.annotation for row in published.rows(split)]
        names = list(dict.fromkeys(row.video for row in rows))
        annotated.update(dict.fromkeys(names))
        selection = set(seeded_order(names, seed)[:videos])
        selected.update(dict.fromkeys(name for name in names if name in selection))
        rows = [row for row in rows if row.video in selection]
        texts[path.name] = read_text(path, "annotations")
        if videos is not None:
            lines = read_lines(path, "annotations")
            texts[path.name] = "".join(f"{lines[row.line - 1]}\n" for row in rows)
        moments[split] = len(rows)
        exact[split] = sum(_is_action(row, labels) for row in rows)
    scenarios = {name: _scenario(name, labels, published) for name in annotated}
    classes = sorted({action for video in labels.values() for action, _, _ in video.actions})
    return SimulationPlan(
        scenarios=[scenarios[name] for name in selected],
        reference=[scenarios[name] for name in seeded_order(annotated, seed)[:REFERENCE_VIDEOS]],
        texts=texts,
        sources=SOURCE_FILES,
        action_parts=_class_parts,
        confusable_actions=functools.partial(_confusable_classes, classes),
        contents={"kind": "real annotations", "moments": moments, "moments_equal_to_an_action": exact},
    )


def _scenario(name: str, labels: Mapping[str, VideoLabels], published: CharadesSTA) -> Scenario:
    """Return the scenario of a video; AnnotationError if the labels lack it."""
    if name not in labels:
        raise AnnotationError(
            f"Video {name} is annotated but has no row in the Charades_v1 csv files. Add its row.",
            code="unlisted_video",
        )
    return Scenario(name, int(published.num_frames[name]), float(published.durations[name]), *labels[name])


def _read_labels(path: Path) -> dict[str, VideoLabels]:
    """Return the labels of every video of a Charades_v1 csv file.

    Intervals that end before they start are excluded; the published files contain a few.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, "a table of labels"), newline=""), strict=True)
    labels = {}
    try:
        missing = {"id", "scene", "objects", "actions"} - set(reader.fieldnames or ())
        if missing:
            raise AnnotationError(
                f"{path}, line 1: the columns {', '.join(sorted(missing))} are missing. Copy the file again.",
                code="missing_columns",
            )
        for row in reader:
            labels[row["id"]] = _parse_row(row, len(reader.fieldnames or ()), f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise AnnotationError(
            f"{path}, line {reader.line_num}: expected CSV, got an invalid line ({error}). Correct the line.",
            code="malformed_row",
        ) from None
    return labels


def _parse_row(row: dict[str, str | None], num_columns: int, location: str) -> VideoLabels:
    """Return the labels of one csv row; `location` is the file and line for messages."""
    if not row["id"] or row["actions"] is None or None in row.values():
        raise AnnotationError(
            f"{location}: expected {num_columns} columns with an id and actions, got fewer. Correct the line.",
            code="malformed_row",
        )
    actions = []
    for entry in filter(None, row["actions"].split(";")):
        try:
            name, start, end = entry.split()
            _class_number(name)
            action = (name, float(start), float(end))
        except ValueError:
            raise AnnotationError(
                f'{location}: expected actions such as "c077 12.10 18.00;...", got {entry[:60]!r}. Correct the line.',
                code="malformed_row",
            ) from None
        if action[1] < action[2]:
            actions.append(action)
    objects = tuple(sorted(set(filter(None, (row["objects"] or "").split(";")))))
    return VideoLabels(row["scene"] or "", objects, tuple(actions))


def _class_number(name: str) -> int:
    if not name.startswith("c"):
        raise ValueError(name)
    return int(name[1:])


# The strings in these parts seed the embeddings, so that changing them changes all simulated features.
def _class_parts(name: str) -> list[tuple[str, float]]:
    """Return the parts of an action class: itself, and parts that it shares with the adjacent class numbers."""
    number = _class_number(name)
    shared = [(f"class family {neighbor}", 0.4 / 3) for neighbor in (number - 1, number, number + 1)]
    return [(f"class {number}", 0.6), *shared]


def _confusable_classes(classes: Sequence[str], name: str) -> list[str]:
    """Return the classes with numbers close to `name`: Charades numbers the actions with an object consecutively."""
    number = _class_number(name)
    return [other for other in classes if 0 < abs(_class_number(other) - number) <= 2]


def _is_action(row: Annotation, labels: Mapping[str, VideoLabels]) -> bool:
    """Return whether a moment equals the interval of an action in its video."""
    actions = labels[row.video].actions if row.video in labels else ()
    return any(abs(row.start - start) < SAME_TIME_S and abs(row.end - end) < SAME_TIME_S for _, start, end in actions)
