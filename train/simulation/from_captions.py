"""Derive the events of videos without action labels from the content words of their sentences.

ActivityNet Captions and TACoS have no human action labels, so that their simulated features depend on the queries.
Recall on them only shows that training, decoding and metrics work together.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.core.errors import AnnotationError
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import read_text
from runtime.core.tokenizer import STOP_WORDS, tokenize
from runtime.datasets.dataset import Annotation, DataSet
from train.simulation.scenario import CLIP_TIMING, REFERENCE_VIDEOS, Scenario, SimulationPlan, seeded_order

STATEMENT = (
    "The features are simulated from the words of the sentences: recall on this data set only shows that the pipeline "
    "works."
)
# Used if the annotations have no frame counts: one clip per second.
FRAMES_PER_SECOND = CLIP_TIMING.stride


def captions_plan(annotations: Path, videos: int | None, seed: int) -> SimulationPlan:
    """Read annotations in the layout of ActivityNet Captions or TACoS into a plan.

    Args:
        annotations: directory with train.json, val.json and test.json.
        videos: maximum number of videos per split, chosen by the seed; None for all.

    Raises:
        AnnotationError: the directory is of another layout, or a file is malformed.
    """
    data_set = DataSet(annotations)
    paths = {split: data_set.annotations_path(split) for split in data_set.splits}
    if any(path.suffix != ".json" for path in paths.values()):
        raise AnnotationError(
            f"Expected --annotations of Charades-STA, ActivityNet Captions or TACoS, got {data_set.preset.title} in "
            f"{annotations}. Remove --annotations for synthetic videos.",
            code="unsupported_layout",
        )
    by_video: dict[str, list[Annotation]] = {}
    texts, moments, selected = {}, {}, dict[str, None]()
    for split, path in paths.items():
        entries = read_json(path, "annotations by video")
        selection = set(seeded_order(entries, seed)[:videos])
        texts[path.name] = (
            read_text(path, "annotations")
            if videos is None
            else json.dumps({name: entry for name, entry in entries.items() if name in selection}) + "\n"
        )
        selected.update(dict.fromkeys(name for name in entries if name in selection))
        moments[split] = 0
        for annotation in data_set.annotations(split, invalid="drop", quiet=True):
            by_video.setdefault(annotation.video, []).append(annotation)
            moments[split] += annotation.video in selection
    scenarios = {name: _scenario(data_set, name, by_video.get(name, ())) for name in data_set.durations}
    return SimulationPlan(
        scenarios=[scenarios[name] for name in selected],
        reference=[scenarios[name] for name in seeded_order(scenarios, seed)[:REFERENCE_VIDEOS]],
        texts=texts,
        sources=tuple(texts),
        action_parts=_word_parts,
        confusable_actions=lambda action: [],
        contents={"kind": f"real annotations ({data_set.preset.title})", "moments": moments},
        statement=STATEMENT,
        directory="features",
    )


def _scenario(data_set: DataSet, name: str, annotations: list[Annotation] | tuple[()]) -> Scenario:
    duration = data_set.durations[name]
    num_frames = data_set.num_frames.get(name, max(CLIP_TIMING.window, round(duration * FRAMES_PER_SECOND)))
    actions = ((content_words(annotation.sentence), annotation.start, annotation.end) for annotation in annotations)
    return Scenario(name, num_frames, duration, "", (), tuple(action for action in actions if action[0]))


def content_words(sentence: str) -> str:
    """Return the distinct words of a sentence other than stop words, in alphabetical order."""
    words = {token.lower() for token in tokenize(sentence) if token.isalpha()}
    return " ".join(sorted(words - STOP_WORDS))


def _word_parts(action: str) -> list[tuple[str, float]]:
    words = action.split()
    return [(f"word {word}", 1 / len(words)) for word in words]
