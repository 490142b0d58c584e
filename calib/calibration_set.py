"""Select calibration queries from the training split, stratified by properties of queries and videos."""

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

# With fewer samples some strata hold a handful of queries, and a single video can set a range.
MIN_SAMPLES = 32
MIN_HELD_OUT = 8
# Strata of each property.
STRATA = 5
# Share of the training videos that is held out to compare methods; the others are calibrated on.
HELD_OUT_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Queries of training videos.

    Attributes:
        data_set: the source of the queries.
        annotations: queries to measure ranges on.
        held_out: queries of other training videos, to compare calibration methods on.
        coverage: distribution of the queries, for reports.

    Raises:
        CalibrationError: a video is in the test split.
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
        """The videos of `annotations`, sorted."""
        return sorted({annotation.video for annotation in self.annotations})

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the queries, moments and feature files of `annotations`."""
        total = hashlib.sha256()
        for annotation in self.annotations:
            row = [annotation.video, annotation.start, annotation.end, annotation.sentence]
            total.update(json.dumps(row).encode() + b"\n")
        for video in self.videos:
            total.update(self.data_set.store.content(video))
        return total.hexdigest()

    def batches(self, manifest: Manifest, batch_size: int = BATCH_SIZE) -> Iterator[Batch]:
        """Yield the inputs of a model in batches of queries of similar length; features are read batch by batch.

        Args:
            manifest: manifest of the model, for its vocabulary and features.

        Raises:
            FeatureError: a video has no features, or features of another dimension.
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

    Queries are added one at a time. The next one has the query length, video length, moment position and moment length
    that are rarest in the set so far, and the most new words. A second query of a video follows after all other videos.

    Args:
        data_set: data set whose `train` split is drawn from; videos of its `test` split are rejected.
        manifest: manifest of the model, for its vocabulary and maximum query length.
        samples: number of queries to calibrate on. A smaller data set gives all it has, with a warning.
        seed: random seed of the held-out videos, and of the order of equal queries.
        held_out: maximum number of queries of other videos, to compare methods on.
        at_most: suppress the warning about too few queries, because `samples` is a default limit.

    Raises:
        CalibrationError: there are fewer than `MIN_SAMPLES`, or training videos are in the test split.
    """
    if samples < MIN_SAMPLES:
        raise _too_few_samples(samples, "the option")
    annotations = data_set.annotations("train", invalid="drop")
    forbid_test_videos(data_set, {entry.video for entry in annotations})
    usable, words = _usable(annotations, manifest)
    held_out_videos = _held_out_videos(usable, seed)
    traits = _traits(data_set, usable, words)
    excluded = set(exclude)
    allowed = np.array([entry.video not in excluded for entry in usable], bool)
    inside = np.array([entry.video not in held_out_videos for entry in usable], bool) & allowed
    available = int(inside.sum())
    if available < MIN_SAMPLES:
        raise _too_few_samples(available, str(data_set.annotations_path("train")))
    if available < samples and not at_most:
        log.warning("Expected %d calibration samples, got %d beside the held-out videos.", samples, available)
    rng = np.random.default_rng([seed, 21])
    chosen = _spread(usable, words, traits, np.flatnonzero(inside), samples, rng)
    rng = np.random.default_rng([seed, 22])
    reserved = _spread(usable, words, traits, np.flatnonzero(allowed & ~inside), held_out, rng)
    return CalibrationSet(
        data_set,
        [usable[index] for index in chosen],
        [usable[index] for index in reserved],
        {
            "asked": samples,
            "unusable": len(annotations) - len(usable),
            **_coverage(usable, words, traits, chosen),
            "held_out": {"sentences": len(reserved), "videos": len({usable[index].video for index in reserved})},
        },
    )


def sample_held_out(
    data_set: DataSet, manifest: Manifest, count: int = HELD_OUT, seed: int = 0, exclude: Collection[str] = ()
) -> list[Annotation]:
    """Draw queries of held-out training videos, stratified as in `sample_calibration_set`.

    Args:
        data_set: data set whose `train` split is drawn from; videos of its `test` split are rejected.
        manifest: manifest of the model, for its vocabulary and maximum query length.
        count: maximum number of queries.
        seed: random seed; with the seed of `sample_calibration_set` the videos are those that it held out.

    Raises:
        CalibrationError: there are fewer than `MIN_HELD_OUT`, or training videos are in the test split.
    """
    annotations = data_set.annotations("train", invalid="drop")
    forbid_test_videos(data_set, {entry.video for entry in annotations}, "The training split")
    usable, words = _usable(annotations, manifest)
    videos = _held_out_videos(usable, seed) - set(exclude)
    candidates = np.array([index for index, entry in enumerate(usable) if entry.video in videos], int)
    check_held_out(min(count, len(candidates)))
    rng = np.random.default_rng([seed, 22])
    chosen = _spread(usable, words, _traits(data_set, usable, words), candidates, count, rng)
    return [usable[index] for index in chosen]


def check_held_out(count: int) -> None:
    """Raise CalibrationError if there are fewer than `MIN_HELD_OUT` held-out queries."""
    if count < MIN_HELD_OUT:
        raise CalibrationError(
            f"Expected at least {MIN_HELD_OUT} held-out training queries to compare methods on, got {count}. "
            "Raise --held-out, use a larger data set, or name the calibration method.",
            code="too_few_held_out",
        )


def forbid_test_videos(data_set: DataSet, videos: Collection[str], what: str = "The calibration set") -> None:
    """Raise CalibrationError if a video is in the test split.

    Args:
        data_set: data set with the test split; a warning replaces the check if it has none.
        what: source of the videos, the subject of the message.
    """
    if "test" not in data_set.splits:
        log.warning("%s has no test split, so overlap with test videos is not checked.", data_set.root)
        return
    shared = sorted(set(videos) & data_set.videos("test"))
    if shared:
        names = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
        raise CalibrationError(
            f"{what} contains {len(shared)} of the test videos ({names}). Use training videos that are not in the test "
            "split.",
            code="test_videos_used",
        )


def coverage_table(coverage: dict[str, Any]) -> str:
    """Return the coverage of a set or of a table as text: totals, and the number of samples per stratum."""
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
    """A backend that only has a manifest, for a `Grounder` that prepares inputs."""

    manifest: Manifest

    def run(self, batch: Batch) -> Any:
        raise AssertionError("this backend has no network")


def _too_few_samples(actual: int, source: str) -> CalibrationError:
    return CalibrationError(
        f"Expected at least {MIN_SAMPLES} calibration samples, got {actual} from {source}. Use {SAMPLES} or a larger "
        "data set, because single videos set the ranges of few samples.",
        code="too_few_samples",
    )


def _usable(annotations: Sequence[Annotation], manifest: Manifest) -> tuple[list[Annotation], list[list[str]]]:
    """Return the annotations whose query the model accepts, and their words as its vocabulary spells them."""
    known = manifest.vocabulary.words
    usable, words = [], []
    for annotation in annotations:
        tokens = tokenize(annotation.sentence)
        spelled = [token if token in known else token.lower() for token in tokens]
        if len(tokens) <= manifest.max_query_length and any(word in known for word in spelled):
            usable.append(annotation)
            words.append(spelled)
    return usable, words


def _held_out_videos(annotations: Sequence[Annotation], seed: int) -> set[str]:
    """Return the held-out videos, the same for all functions of this module that get the same seed."""
    videos = sorted({entry.video for entry in annotations})
    count = round(HELD_OUT_SHARE * len(videos))
    return set(np.random.default_rng([seed, 20]).permutation(videos)[:count].tolist())


def _traits(
    data_set: DataSet, annotations: Sequence[Annotation], words: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Return the properties to stratify by, one number per annotation."""
    spans = data_set.spans(annotations)
    return {
        "query tokens": np.array([len(entry) for entry in words], np.float64),
        "video seconds": np.array([data_set.durations[entry.video] for entry in annotations], np.float64),
        "moment centre": spans.mean(axis=1),
        "moment share": spans[:, 1] - spans[:, 0],
    }


def _strata(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the borders of up to `STRATA` strata of about equal size, and the stratum of each value."""
    borders = np.unique(np.quantile(values, np.linspace(0, 1, STRATA + 1)))
    return borders, np.clip(np.searchsorted(borders, values, side="right") - 1, 0, max(len(borders) - 2, 0))


def _spread(
    annotations: Sequence[Annotation],
    words: Sequence[Sequence[str]],
    traits: dict[str, np.ndarray],
    candidates: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> list[int]:
    """Return `count` of the candidates (all if there are fewer), chosen as in `sample_calibration_set`."""
    if len(candidates) <= count:
        result: list[int] = candidates.tolist()
        return result
    strata = np.stack([_strata(values)[1] for values in traits.values()], axis=1)[candidates]
    stratum_counts = np.zeros((strata.shape[1], STRATA))
    video_names, video = np.unique([annotations[index].video for index in candidates], return_inverse=True)
    video_counts = np.zeros(len(video_names))
    # Candidates that contain each word that no chosen query has yet, and the number of such words in each candidate.
    new_words: dict[str, list[int]] = {}
    num_new_words = np.zeros(len(candidates))
    for position, index in enumerate(candidates):
        for word in set(words[index]):
            new_words.setdefault(word, []).append(position)
            num_new_words[position] += 1
    tie_breaker = rng.random(len(candidates)) * 1e-3
    axes = np.arange(strata.shape[1])
    expected = np.array([count / len(np.unique(column)) for column in strata.T])
    remaining = np.ones(len(candidates), bool)
    chosen = []
    for _ in range(count):
        # An empty stratum counts as much as a new word, a full one nothing. A second query of a video is last.
        score = (1 - stratum_counts[axes, strata] / expected).sum(axis=1) + np.minimum(num_new_words, 2) + tie_breaker
        score -= 100 * video_counts[video]
        best = int(np.where(remaining, score, -np.inf).argmax())
        remaining[best] = False
        chosen.append(int(candidates[best]))
        stratum_counts[axes, strata[best]] += 1
        video_counts[video[best]] += 1
        for word in set(words[candidates[best]]):
            num_new_words[new_words.pop(word, [])] -= 1
    return sorted(chosen)


def _coverage(
    annotations: Sequence[Annotation],
    words: Sequence[Sequence[str]],
    traits: dict[str, np.ndarray],
    chosen: Sequence[int],
) -> dict[str, Any]:
    """Return the distribution of the chosen queries, as JSON values."""
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
