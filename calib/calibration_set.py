"""Select the queries to calibrate on: training videos only, stratified by properties of sentences and videos."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from calib.errors import CalibrationError
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import Batch, collate
from runtime.core.tokenizer import tokenize
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import encode_queries
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

SAMPLES = 512
HELD_OUT = 512

LEAST_SAMPLES = 32
"""Each axis has `BINS` strata. With fewer samples some hold no more than a handful, and one odd video sets a range."""

LEAST_HELD_OUT = 8
BINS = 5
HELD_OUT_SHARE = 0.2
"""Of the training videos, for choosing between methods; the others are calibrated on."""


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Sentences of training videos.

    Attributes:
        data_set: where they are from.
        annotations: what ranges are measured on.
        held_out: sentences of other training videos, for choosing between methods.
        coverage: how the sentences are spread, for reports.
    """

    data_set: DataSet
    annotations: Sequence[Annotation]
    held_out: Sequence[Annotation]
    coverage: dict[str, Any]

    def __post_init__(self) -> None:
        forbid_test_videos(self.data_set, self.videos)
        shared = set(self.videos) & {annotation.video for annotation in self.held_out}
        assert not shared, shared

    @property
    def videos(self) -> list[str]:
        """The videos calibrated on, sorted."""
        return sorted({annotation.video for annotation in self.annotations})

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the sentences, moments and feature files calibrated on."""
        total = hashlib.sha256()
        for annotation in self.annotations:
            row = [annotation.video, annotation.start, annotation.end, annotation.sentence]
            total.update(json.dumps(row).encode() + b"\n")
        for video in self.videos:
            total.update(self.data_set.store.content(video))
        return total.hexdigest()

    def batches(self, manifest: Manifest, batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
        """Yield what a model of this manifest takes, queries of like length together. Videos are read as they come.

        Raises:
            FeatureError: a video has no features, or of another width.
        """
        grounder = Grounder(ManifestOnlyBackend(manifest))
        queries = encode_queries(grounder, self.annotations)
        order = sorted(range(len(queries)), key=lambda index: len(queries[index]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            videos = [grounder.segments(self.data_set.video(self.annotations[index].video)) for index in chosen]
            yield collate([queries[index] for index in chosen], videos)


def sample_calibration_set(
    data_set: DataSet,
    manifest: Manifest,
    samples: int = SAMPLES,
    seed: int = 0,
    exclude: Collection[str] = (),
    held_out: int = HELD_OUT,
    at_most: bool = False,
) -> CalibrationSet:
    """Draw a calibration set from the training split.

    One sentence at a time is added: the one whose query length, video length, moment position and moment length are
    rarest in the set so far, and which brings most words that it lacks; a video comes twice only after all others.

    Args:
        data_set: its `train` split is drawn from. Videos of its `test` split are refused.
        manifest: of the model, for its words and longest query.
        samples: how many sentences to calibrate on. A smaller data set gives all it has, with a warning.
        seed: of the videos held out, and of the order among equals.
        exclude: videos to leave alone.
        held_out: most sentences of videos not calibrated on, for choosing between methods.
        at_most: `samples` is a default limit, which the user did not set, so that fewer need no warning.

    Raises:
        CalibrationError: fewer than `LEAST_SAMPLES` were asked for or are there, or training videos are test videos.
    """
    if samples < LEAST_SAMPLES:
        raise CalibrationError(_too_few(f"{samples} calibration samples were asked for"), code="too_few_samples")
    annotations = data_set.annotations("train", invalid="drop")
    forbid_test_videos(data_set, {entry.video for entry in annotations})
    usable, words = _usable(annotations, manifest)
    rng = np.random.default_rng([seed, 21])
    apart = _apart(usable, seed)
    traits = _traits(data_set, usable, words)
    allowed = np.array([entry.video not in set(exclude) for entry in usable], bool)
    inside = np.array([entry.video not in apart for entry in usable], bool) & allowed
    if inside.sum() < LEAST_SAMPLES:
        raise CalibrationError(
            _too_few(f"{data_set.annotations_path('train')} has {inside.sum()} sentences to calibrate on"),
            code="too_few_samples",
        )
    if inside.sum() < samples and not at_most:
        log.warning(
            "%d calibration samples were asked for and %d are there besides what is held out; all are used.",
            samples,
            inside.sum(),
        )
    chosen = _spread(usable, words, traits, np.flatnonzero(inside), samples, rng)
    judged = _spread(
        usable, words, traits, np.flatnonzero(allowed & ~inside), held_out, np.random.default_rng([seed, 22])
    )
    return CalibrationSet(
        data_set,
        [usable[index] for index in chosen],
        [usable[index] for index in judged],
        {
            "asked": samples,
            "unusable": len(annotations) - len(usable),
            **_coverage(usable, words, traits, chosen),
            "held_out": {"sentences": len(judged), "videos": len({usable[index].video for index in judged})},
        },
    )


def sample_held_out(
    data_set: DataSet, manifest: Manifest, count: int = HELD_OUT, seed: int = 0, exclude: Collection[str] = ()
) -> list[Annotation]:
    """Return up to `count` training sentences to judge by, spread as in `sample_calibration_set`, none of a video in
    `exclude`.

    With the seed of `sample_calibration_set`, they are from the videos that it held out.

    Raises:
        CalibrationError: fewer than `LEAST_HELD_OUT` were asked for or are left, or training videos are test videos.
    """
    annotations = data_set.annotations("train", invalid="drop")
    forbid_test_videos(data_set, {entry.video for entry in annotations}, "The training split")
    usable, words = _usable(annotations, manifest)
    apart = _apart(usable, seed) - set(exclude)
    among = np.array([index for index, entry in enumerate(usable) if entry.video in apart], int)
    result = min(count, len(among))
    check_held_out(result)
    chosen = _spread(usable, words, _traits(data_set, usable, words), among, count, np.random.default_rng([seed, 22]))
    return [usable[index] for index in chosen]


def check_held_out(count: int) -> None:
    """Raise CalibrationError if so many held-out sentences are too few to judge by."""
    if count < LEAST_HELD_OUT:
        raise CalibrationError(
            f"{count} held-out training sentences are there to judge by and at least {LEAST_HELD_OUT} are needed, as "
            f"of fewer a single flip is over {100 // LEAST_HELD_OUT} points; raise --held-out, take a larger data set, "
            "or name a --method where one can be named.",
            code="too_few_held_out",
        )


def forbid_test_videos(data_set: DataSet, videos: Collection[str], what: str = "The calibration set") -> None:
    """Raise CalibrationError if one of `videos` is in the test split, because test results then mean nothing."""
    if "test" not in data_set.splits:
        log.warning("%s has no test split, so nothing can be held against it.", data_set.root)
        return
    # The names alone: what else is said of them is nothing to be looked at here.
    shared = sorted(set(videos) & data_set.videos("test"))
    if shared:
        raise CalibrationError(
            f"{what} holds {_videos(shared)} of the test split, and "
            "recall on test would then say nothing; take training videos that are not in it.",
            code="test_videos_used",
        )


def coverage_table(coverage: dict[str, Any]) -> str:
    """Return the coverage as text, a line for each axis: samples in each stratum, and the training split beside it."""
    lines = [
        f"{coverage['sentences']} sentences of {coverage['videos']} training videos; "
        f"{coverage['words']['covered']} of {coverage['words']['of']} words, "
        f"{100 * coverage['words']['of_all_tokens']:.1f} % of all tokens; "
        f"held out: {coverage['held_out']['sentences']} sentences of {coverage['held_out']['videos']} other videos"
    ]
    for axis, strata in coverage["axes"].items():
        cells = "  ".join(f"{entry['from']:g}-{entry['to']:g}: {entry['samples']}" for entry in strata)
        lines.append(f"  {axis:<18} {cells}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ManifestOnlyBackend:
    """A backend that is only asked what it takes."""

    manifest: Manifest

    def run(self, batch: Batch) -> Any:
        raise AssertionError("this backend runs nothing")


def _videos(names: Sequence[str]) -> str:
    """Return how many videos there are, with the first of their names."""
    message = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} video{'s' if len(names) > 1 else ''} ({message})"


def _too_few(result: str) -> str:
    return (
        f"{result} and at least {LEAST_SAMPLES} are needed: with fewer, strata of query length, video length and "
        f"moment position stay empty and single videos set the ranges; take {SAMPLES}, or a larger data set."
    )


def _usable(annotations: Sequence[Annotation], manifest: Manifest) -> tuple[list[Annotation], list[list[str]]]:
    """Return the annotations that the model can be asked, and their words as its vocabulary spells them."""
    known = manifest.vocabulary.words
    usable, words = [], []
    for annotation in annotations:
        tokens = tokenize(annotation.sentence)
        spelt = [token if token in known else token.lower() for token in tokens]
        if len(tokens) <= manifest.max_query_length and any(word in known for word in spelt):
            usable.append(annotation)
            words.append(spelt)
    return usable, words


def _apart(annotations: Sequence[Annotation], seed: int) -> set[str]:
    """Return the videos held out: the same for everything that is drawn with one seed."""
    videos = sorted({entry.video for entry in annotations})
    count = round(HELD_OUT_SHARE * len(videos))
    return set(np.random.default_rng([seed, 20]).permutation(videos)[:count].tolist())


def _traits(data_set: DataSet, annotations: Sequence[Annotation], words: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return, for each axis of the spread, one number per annotation."""
    spans = data_set.spans(annotations)
    return {
        "query tokens": np.array([len(entry) for entry in words], np.float64),
        "video seconds": np.array([data_set.durations[entry.video] for entry in annotations], np.float64),
        "moment centre": spans.mean(axis=1),
        "moment share": spans[:, 1] - spans[:, 0],
    }


def _strata(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the borders of up to `BINS` strata of about equal size, and the stratum of each value."""
    borders = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)))
    return borders, np.clip(np.searchsorted(borders, values, side="right") - 1, 0, max(len(borders) - 2, 0))


def _spread(
    annotations: Sequence[Annotation],
    words: Sequence[Sequence[str]],
    traits: dict[str, np.ndarray],
    among: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Return `count` positions out of `among` (all, if it has fewer), chosen as in `sample_calibration_set`."""
    if len(among) <= count:
        return among.tolist()
    strata = np.stack([_strata(values)[1] for values in traits.values()], axis=1)[among]
    held = np.zeros((strata.shape[1], BINS))
    video_names, video = np.unique([annotations[index].video for index in among], return_inverse=True)
    taken_of_video = np.zeros(len(video_names))
    vocabulary = sorted({word for index in among for word in words[index]})
    number = {word: index for index, word in enumerate(vocabulary)}
    bearers: list[list[int]] = [[] for _ in vocabulary]
    fresh = np.zeros(len(among))
    for position, index in enumerate(among):
        for word in set(words[index]):
            bearers[number[word]].append(position)
            fresh[position] += 1
    chance = rng.random(len(among)) * 1e-3
    axes = np.arange(strata.shape[1])
    expected = np.array([count / len(np.unique(column)) for column in strata.T])
    left = np.ones(len(among), bool)
    chosen = []
    for _ in range(count):
        # An empty stratum counts as much as a new word, a full one nothing; a second sentence of a video comes last.
        score = (1 - held[axes, strata] / expected).sum(axis=1) + np.minimum(fresh, 2) + chance
        score -= 100 * taken_of_video[video]
        best = int(np.where(left, score, -np.inf).argmax())
        left[best] = False
        chosen.append(int(among[best]))
        held[axes, strata[best]] += 1
        taken_of_video[video[best]] += 1
        for word in set(words[among[best]]):
            fresh[bearers[number[word]]] -= 1
            bearers[number[word]] = []
    return sorted(chosen)


def _coverage(
    annotations: Sequence[Annotation],
    words: Sequence[Sequence[str]],
    traits: dict[str, np.ndarray],
    chosen: Sequence[int],
) -> dict[str, Any]:
    tokens = Counter(word for entry in words for word in entry)
    covered = {word for index in chosen for word in words[index]}
    axes = {}
    for axis, values in traits.items():
        borders, stratum = _strata(values)
        axes[axis] = [
            {
                "from": round(float(borders[index]), 4),
                "to": round(float(borders[min(index + 1, len(borders) - 1)]), 4),
                "samples": int((stratum[list(chosen)] == index).sum()),
                "of": int((stratum == index).sum()),
            }
            for index in range(max(len(borders) - 1, 1))
        ]
    return {
        "sentences": len(chosen),
        "videos": len({annotations[index].video for index in chosen}),
        "words": {
            "covered": len(covered),
            "of": len(tokens),
            "of_all_tokens": round(sum(tokens[word] for word in covered) / sum(tokens.values()), 6),
        },
        "axes": axes,
    }
