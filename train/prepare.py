"""`python -m train.prepare`: any published data set in the common form, with its vocabulary, and what was left out."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import AnnotationError, FeatureError, GroundingError, MissingFeatures, OutputError, excerpt
from runtime.core.io.atomic_files import Staging, content_names, locked
from runtime.core.io.digests import sha256
from runtime.core.tokenizer import Vocabulary, tokenize, word_table
from runtime.core.video import ClipTiming
from runtime.datasets.dataset import Annotation, DataSet
from runtime.datasets.feature_stores import HDF5_SUFFIXES, FeatureStore, open_store
from runtime.datasets.qvhighlights import ABOUT, FORMAT, WORDS
from train.network.glove import glove_vectors

log = logging.getLogger("drn")

VECTORS = "word_vectors.txt"
# Of everything left out, so many are named; `dataset.json` has all counts.
NAMED = 3
NO_SENSE, NO_WORD, NO_FEATURES = (
    "the moment makes no sense",
    "no word of the sentence is known",
    "its video has no features",
)


@dataclasses.dataclass(frozen=True)
class FilteredSplit:
    """The rows of one split after filtering.

    Attributes:
        annotations: the sentences, with the moments that make sense.
        dropped: reason to the sentences left out for it, as the file calls them.
        cut_off: how many moments end after their video and are cut off there.
    """

    annotations: list[Annotation]
    dropped: Mapping[str, Sequence[str]]
    cut_off: int


def prepare(
    data: Path,
    output: Path,
    *,
    features: Path | None = None,
    glove: Path | None = None,
    embed_dim: int = 300,
    min_count: int = 1,
    clock: tuple[int, int] | None = None,
) -> Path:
    """Convert a data set to the common format: JSONL splits, a vocabulary, and default options.

    The input format is recognized by its files: Charades-STA, ActivityNet Captions, TACoS, QVHighlights or the
    common format itself. Excluded rows are counted by reason and named. Features are not copied.

    Args:
        data: directory of a data set. docs/formats.md lists the formats.
        output: directory to create: train.jsonl ..., vocabulary.json, dataset.json. It may already contain
            features.
        features: directory of .pt, .npy or .npz files, or HDF5 file. Default: the features in DATA or OUTPUT.
        glove: GloVe text file. Words of other splits with a vector join the vocabulary, and the vectors of all
            words are written to OUTPUT/word_vectors.txt for `train --glove`.
        embed_dim: dimension of the word vectors.
        min_count: exclude words with fewer occurrences in the training split. A published word table is not
            filtered.
        clock: clip length and stride of the features, in frames (C3D: 16 8). Default: set by the data set.

    Returns:
        `output`.

    Raises:
        AnnotationError: the annotations are malformed, or no row of them is usable.
        FeatureError: there are no features, or the features of a video cannot be used.
        OutputError: `output` contains other files, or cannot be written.
    """
    if min_count < 1 or embed_dim < 1:
        raise GroundingError(
            f"--min-count and --embed-dim are at least 1, and {min_count} and {embed_dim} were given.",
            code="invalid_option",
        )
    clip_timing = None if clock is None else ClipTiming(*clock)
    data_set = DataSet(data)
    _check_empty(output)
    location, store = _features(data_set, output, features)
    splits = {split: _with_features(data_set, split, store) for split in data_set.splits}
    words, vectors = _word_table(data_set, splits, min_count, glove, embed_dim)
    vocabulary = Vocabulary(words) if words else None
    splits = {split: _with_known_words(filtered, vocabulary) for split, filtered in splits.items()}
    empty = [split for split, filtered in splits.items() if not filtered.annotations]
    if empty or not splits:
        raise AnnotationError(
            f"Nothing is left of the {'/'.join(empty) or 'annotations'} split of {data}: "
            f"{_reasons(splits[empty[0]].dropped) if empty else 'there is none'}.",
            code="empty_split",
        )
    if store is not None:
        data_set.check_clips(
            sorted({a.video for filtered in splits.values() for a in filtered.annotations}), clip_timing, store
        )
    texts = {f"{split}.jsonl": _rows(data_set, filtered.annotations) for split, filtered in splits.items()}
    if words:
        texts[WORDS] = json.dumps(dict(words), indent=1) + "\n"
    texts[ABOUT] = json.dumps(_about(data_set, splits, location, store, clip_timing), indent=2) + "\n"
    if words and vectors:
        texts[VECTORS] = "".join(_vector_lines(words, vectors))
    _write(output, texts)
    _print_summary(data_set, splits, vocabulary, vectors if glove else None)
    if "train" not in splits:
        log.warning(
            "There is no training split: this can be evaluated on, and not trained on.", extra={"code": "empty_split"}
        )
    if store is None:
        log.warning("No features were found; put them into %s, or prepare again with --features.", output / "features")
    if "train" in splits:
        vector_words = ("--glove", output / VECTORS, "--embed-dim", embed_dim) if glove else ()
        suggest_next_command("train", "--data", output, "--output", "runs/first", *vector_words)
    else:
        suggest_next_command("runtime.evaluate", "--model", "drn.onnx", "--data", output, "--split", next(iter(splits)))
    return output


def _word_table(
    data_set: DataSet, splits: Mapping[str, FilteredSplit], min_count: int, glove: Path | None, embed_dim: int
) -> tuple[Mapping[str, int] | None, dict[int, np.ndarray]]:
    """Return the words and their numbers, None if there are none, and the vectors of --glove by number."""
    published = data_set.published_words
    words = published
    if words is None and "train" in splits:
        words = word_table((annotation.sentence for annotation in splits["train"].annotations), min_count)
    if glove is None:
        return words, {}
    return _with_vectors(words or {}, splits, glove, embed_dim, grow=published is None)


def _write(output: Path, texts: Mapping[str, str]) -> None:
    """Write all files or none."""
    with locked(output), Staging() as staging:
        _check_empty(output)
        for name, text in texts.items():
            staging.path(output / name).write_text(text, encoding="utf-8")
        staging.settle()


def _check_empty(output: Path) -> None:
    """Raise OutputError if `output` holds anything but features."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file and --output names a directory; choose another.", code="output_is_file")
    others = [name for name in content_names(output) if name != "features" and not name.endswith(HDF5_SUFFIXES)]
    if others:
        raise OutputError(
            f"{output} holds {others[0]} already; choose a new directory, or delete that one.", code="output_not_empty"
        )


def _features(data_set: DataSet, output: Path, given: Path | None) -> tuple[str | None, FeatureStore | None]:
    """Return where features are, as `dataset.json` says it, and the store; None twice where there are none yet."""
    if given is not None:
        if not given.exists():
            raise FeatureError(
                f"The features {given} do not exist; check the path, or leave --features out.", code="missing_file"
            )
        if given.is_file() and given.suffix not in HDF5_SUFFIXES:
            raise FeatureError(
                f"--features is a directory with a file for each video, or one HDF5 file ({', '.join(HDF5_SUFFIXES)}), "
                f"and {given} is neither.",
                code="unknown_feature_store",
            )
        return str(given.resolve()), open_store(given.parent, given)
    own = open_store(output, None)
    if own.place.exists():
        return None, own
    published = data_set.store
    return (str(published.place.resolve()), published) if published.place.exists() else (None, None)


def _with_features(data_set: DataSet, split: str, store: FeatureStore | None) -> FilteredSplit:
    """Return the sentences of a split whose moments make sense and whose videos have features."""
    annotations: list[Annotation] = []
    dropped: dict[str, list[str]] = {}
    has_features: dict[str, bool] = {}
    cut_off = 0
    for row, annotation, problems in data_set.judged(split):
        if problems:
            dropped.setdefault(NO_SENSE, []).append(f"{row.label}: {problems[0]}")
        if annotation is None:
            continue
        video = annotation.video
        if store is not None and not has_features.setdefault(video, _has(store, video)):
            dropped.setdefault(NO_FEATURES, []).append(row.label)
            continue
        duration = data_set.durations[video]
        cut_off += sum(end > duration for _, end in annotation.moments)
        annotations.append(annotation.narrowed(tuple((s, min(e, duration)) for s, e in annotation.moments)))
    return FilteredSplit(annotations, dropped, cut_off)


def _has(store: FeatureStore, video: str) -> bool:
    try:
        store.path(video)
    except MissingFeatures:
        return False
    return True


def _with_known_words(filtered: FilteredSplit, vocabulary: Vocabulary | None) -> FilteredSplit:
    """Return what is left without the sentences of which no word is known, or which hold none."""
    known, mute = [], []
    for annotation in filtered.annotations:
        tokens = tokenize(annotation.sentence)
        if any(vocabulary is None or {token, token.lower()} & vocabulary.words.keys() for token in tokens):
            known.append(annotation)
        else:
            mute.append(f"{annotation.line}: {excerpt(annotation.sentence)}")
    dropped = {**filtered.dropped, NO_WORD: mute} if mute else filtered.dropped
    return dataclasses.replace(filtered, annotations=known, dropped=dropped)


def _with_vectors(
    words: Mapping[str, int], splits: Mapping[str, FilteredSplit], glove: Path, width: int, *, grow: bool
) -> tuple[Mapping[str, int], dict[int, np.ndarray]]:
    """Return the word table, with the words of other splits that have a vector where it may grow, and the vectors."""
    everything = word_table(a.sentence for filtered in splits.values() for a in filtered.annotations)
    new = [word for word in everything if word not in words] if grow else []
    candidates = {**words, **{word: len(words) + index for index, word in enumerate(new, 1)}}
    vectors = glove_vectors(glove, candidates, width)
    joining = [word for word in new if candidates[word] in vectors]
    table = {**words, **{word: len(words) + index for index, word in enumerate(joining, 1)}}
    return table, {table[word]: vectors[candidates[word]] for word in table if candidates[word] in vectors}


def _vector_lines(words: Mapping[str, int], vectors: Mapping[int, np.ndarray]) -> Iterator[str]:
    for word, identity in words.items():
        if identity in vectors:
            yield f"{word} {' '.join(map(str, vectors[identity]))}\n"


def _rows(data_set: DataSet, annotations: Sequence[Annotation]) -> str:
    rows = (
        {
            "qid": annotation.name,
            "query": annotation.sentence,
            "vid": annotation.video,
            "duration": data_set.durations[annotation.video],
            "relevant_windows": [list(moment) for moment in annotation.moments],
        }
        for annotation in annotations
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _about(
    data_set: DataSet,
    splits: Mapping[str, FilteredSplit],
    location: str | None,
    store: FeatureStore | None,
    clock: ClipTiming | None,
) -> dict[str, Any]:
    features = data_set.preset.features
    if store is not None:
        first = next(iter(splits.values())).annotations[0].video
        features = dataclasses.replace(features, dim=store.load(first).shape[1])
    if clock is not None:
        features = dataclasses.replace(features, window=clock.window, stride=clock.stride)
    preset = dataclasses.replace(data_set.preset, features=features)
    videos = {annotation.video for filtered in splits.values() for annotation in filtered.annotations}
    return {
        "format": FORMAT,
        "preset": preset.to_dict(),
        **({"features": location} if location else {}),
        "simulated": data_set.simulated,
        "sources": {data_set.annotations_path(s).name: sha256(data_set.annotations_path(s)) for s in splits},
        "dropped": {
            s: {reason: len(names) for reason, names in filtered.dropped.items()} for s, filtered in splits.items()
        },
        "cut_off": {split: filtered.cut_off for split, filtered in splits.items()},
        "num_frames": {video: count for video, count in data_set.num_frames.items() if video in videos},
    }


def _print_summary(
    data_set: DataSet,
    splits: Mapping[str, FilteredSplit],
    vocabulary: Vocabulary | None,
    vectors: Mapping[int, Any] | None,
) -> None:
    print(f"{data_set.preset.title}, T = {data_set.preset.num_segments}")
    for split, filtered in splits.items():
        videos = len({annotation.video for annotation in filtered.annotations})
        moments = sum(len(annotation.moments) for annotation in filtered.annotations)
        print(f"{split}: {len(filtered.annotations)} sentences, {moments} moments, {videos} videos")
        if vocabulary is not None:
            tokens = Counter(token.lower() for a in filtered.annotations for token in tokenize(a.sentence))
            known = sum(count for word, count in tokens.items() if word in vocabulary.words)
            print(f"  {100 * known / tokens.total():.1f} % of the words are in the vocabulary")
        if filtered.cut_off:
            print(f"  {filtered.cut_off} moments end after their video and are cut off there")
        if filtered.dropped:
            print(f"  left out: {_reasons(filtered.dropped)}")
    if vocabulary is not None:
        with_vector = "" if vectors is None else f", {len(vectors)} of them with a vector"
        print(f"vocabulary: {len(vocabulary)} words{with_vector}")


def _reasons(dropped: Mapping[str, Sequence[str]]) -> str:
    """Return how many were left out for which reason, the first few by name."""
    reasons = (
        f"{len(names)} as {reason} ({'; '.join(names[:NAMED])}{'; …' if len(names) > NAMED else ''})"
        for reason, names in dropped.items()
    )
    return ", ".join(reasons)


if __name__ == "__main__":
    command(prepare)
