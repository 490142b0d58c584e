"""Stories of videos that nobody labelled: what happens is what their own sentences say.

ActivityNet Captions and TACoS have no human action labels, so the features that are simulated for them follow the
content words of the very sentences that are asked. Recall on such features says that training, decoding and metrics
work together on these annotations; it says less than that on simulated Charades-STA, where text never touches them.
"""

from __future__ import annotations

import json
from pathlib import Path

from runtime.core.errors import AnnotationError
from runtime.core.io.files import read_json
from runtime.core.io.text_files import read_text
from runtime.core.tokenizer import STOP_WORDS, tokenize
from runtime.datasets.dataset import Annotation, DataSet
from train.simulation.scenario import CLOCK, REFERENCE_VIDEOS, Plan, Story, seeded_order

STATEMENT = (
    "The features are simulated from the words of the sentences themselves: recall on this data set says that the "
    "machinery works, and no more."
)
# Where the annotations have no frame count: a clip a second.
FRAMES_A_SECOND = CLOCK.stride


def captions_plan(annotations: Path, videos: int | None, seed: int) -> Plan:
    """Read annotations in the layout of ActivityNet Captions or TACoS into a plan; see `train.simulate.simulate`.

    Raises:
        AnnotationError: the directory is of another layout, or a file is malformed.
    """
    data_set = DataSet(annotations)
    paths = {split: data_set.annotations_path(split) for split in data_set.splits}
    if any(path.suffix != ".json" for path in paths.values()):
        raise AnnotationError(
            f"{annotations} is {data_set.preset.title}; features are simulated for Charades-STA, ActivityNet Captions "
            "and TACoS, and for made-up videos without --annotations.",
            code="unsupported_layout",
        )
    told: dict[str, list[Annotation]] = {}
    texts, moments, chosen = {}, {}, dict[str, None]()
    for split, path in paths.items():
        entries = read_json(path, "annotations by video")
        keep = set(seeded_order(entries, seed)[:videos])
        texts[path.name] = (
            read_text(path, "annotations")
            if videos is None
            else json.dumps({name: entry for name, entry in entries.items() if name in keep}) + "\n"
        )
        chosen.update(dict.fromkeys(name for name in entries if name in keep))
        moments[split] = 0
        for annotation in data_set.annotations(split, invalid="drop", quiet=True):
            told.setdefault(annotation.video, []).append(annotation)
            moments[split] += annotation.video in keep
    stories = {name: _story(data_set, name, told.get(name, ())) for name in data_set.durations}
    return Plan(
        stories=[stories[name] for name in chosen],
        reference=[stories[name] for name in seeded_order(stories, seed)[:REFERENCE_VIDEOS]],
        texts=texts,
        parts=_words_parts,
        siblings=lambda action: [],
        facts={"kind": f"real annotations ({data_set.preset.title})", "moments": moments},
        statement=STATEMENT,
        directory="features",
    )


def _story(data_set: DataSet, name: str, annotations: list[Annotation] | tuple[()]) -> Story:
    duration = data_set.durations[name]
    num_frames = data_set.num_frames.get(name, max(CLOCK.window, round(duration * FRAMES_A_SECOND)))
    actions = ((content_words(annotation.sentence), annotation.start, annotation.end) for annotation in annotations)
    return Story(name, num_frames, duration, "", (), tuple(action for action in actions if action[0]))


def content_words(sentence: str) -> str:
    """Return the words of a sentence that name something to be seen, each once, in alphabetic order."""
    words = {token.lower() for token in tokenize(sentence) if token.isalpha()}
    return " ".join(sorted(words - STOP_WORDS))


def _words_parts(action: str) -> list[tuple[str, float]]:
    words = action.split()
    return [(f"word {word}", 1 / len(words)) for word in words]
