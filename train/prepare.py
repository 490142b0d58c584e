"""Convert a published data set to the common format, with its vocabulary: `python -m train.prepare`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import AnnotationError, FeatureError, MissingFeatures, OutputError, check_option, excerpt
from runtime.core.io.atomic_files import content_names, locked
from runtime.core.io.digests import sha256
from runtime.core.io.staging import Staging
from runtime.core.pooling import ClipTiming
from runtime.core.tokenizer import Vocabulary, tokenize, word_table
from runtime.datasets.dataset import Annotation, DataSet
from runtime.datasets.feature_stores import HDF5_SUFFIXES, FeatureStore, open_store
from runtime.datasets.qvhighlights import DESCRIPTION, FORMAT, WORDS
from train.network.glove import glove_vectors

log = logging.getLogger("drn")

VECTORS = "word_vectors.txt"
# Maximum number of excluded rows that the summary names per reason.
NAMED = 3
# Reasons, as `dataset.json` records them.
NO_SENSE, NO_WORD, NO_FEATURES = (
    "the moment makes no sense",
    "no word of the sentence is known",
    "its video has no features",
)


@dataclasses.dataclass(frozen=True)
class FilteredSplit:
    """The rows of one split after filtering.

    Attributes:
        annotations: the sentences, with their valid moments.
        dropped: reason to the labels of the rows that were excluded.
        cut_off: number of moments that ended after their video and were cut there.
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
    check_option("--min-count", min_count, 1)
    check_option("--embed-dim", embed_dim, 1)
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
            f"{data} has no usable row in the split {'/'.join(empty)}: {_reasons(splits[empty[0]].dropped)}. Correct "
            "these rows."
            if empty
            else f"{data} has no split. Check --data.",
            code="empty_split",
        )
    if store is not None:
        data_set.check_clips(sorted(_videos(splits)), clip_timing, store)
    texts = {f"{split}.jsonl": _rows(data_set, filtered.annotations) for split, filtered in splits.items()}
    if words:
        texts[WORDS] = json.dumps(dict(words), indent=1) + "\n"
    texts[DESCRIPTION] = json.dumps(_description(data_set, splits, location, store, clip_timing), indent=2) + "\n"
    if words and vectors:
        known = {word: vectors[number] for word, number in words.items() if number in vectors}
        texts[VECTORS] = "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in known.items())
    _write(output, texts)
    _print_summary(data_set, splits, vocabulary, vectors if glove else None)
    _warn_of_shared_videos(splits)
    report_written(*(output / name for name in texts))
    if "train" not in splits:
        log.warning(
            "The data set has no training split; it can be used for evaluation only.", extra={"code": "empty_split"}
        )
    if store is None:
        log.warning("%s has no features. Add them to %s, or repeat with --features.", data, output / "features")
    if "train" in splits:
        vector_words = ("--glove", output / VECTORS, "--embed-dim", embed_dim) if glove else ()
        suggest_next_command("train", "--data", output, "--output", "runs/first", *vector_words)
    else:
        suggest_next_command("runtime.evaluate", "--model", "drn.onnx", "--data", output, "--split", next(iter(splits)))
    return output


def _word_table(
    data_set: DataSet, splits: Mapping[str, FilteredSplit], min_count: int, glove: Path | None, embed_dim: int
) -> tuple[Mapping[str, int] | None, dict[int, np.ndarray]]:
    """Return the word table, None if there is none, and the vectors of --glove by word id."""
    published = data_set.published_words
    words = published
    if words is None and "train" in splits:
        words = word_table((annotation.sentence for annotation in splits["train"].annotations), min_count)
    if glove is None:
        return words, {}
    return _with_vectors(words or {}, splits, glove, embed_dim, grow=published is None)


def _videos(splits: Mapping[str, FilteredSplit]) -> set[str]:
    return {annotation.video for filtered in splits.values() for annotation in filtered.annotations}


def _write(output: Path, texts: Mapping[str, str]) -> None:
    with locked(output), Staging() as staging:
        _check_empty(output)
        for name, text in texts.items():
            staging.path(output / name).write_text(text, encoding="utf-8")
        staging.commit()


def _check_empty(output: Path) -> None:
    """Raise OutputError if `output` contains anything but features."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file. Choose a directory.", code="output_is_file")
    others = [name for name in content_names(output) if name != "features" and not name.endswith(HDF5_SUFFIXES)]
    if others:
        raise OutputError(
            f"{output} already contains {others[0]}. Choose a new --output, or delete the directory.",
            code="output_not_empty",
        )


def _features(data_set: DataSet, output: Path, given: Path | None) -> tuple[str | None, FeatureStore | None]:
    """Return the location of the features as `dataset.json` records it, and the store; None twice without features.

    The location is None for features in the output directory.
    """
    if given is not None:
        if not given.exists():
            raise FeatureError(
                f"The features {given} do not exist. Check the path, or remove --features.", code="missing_file"
            )
        if given.is_file() and given.suffix not in HDF5_SUFFIXES:
            raise FeatureError(
                f"Expected --features to be a directory or an HDF5 file ({', '.join(HDF5_SUFFIXES)}), got {given}. "
                "Pass one of these.",
                code="unknown_feature_store",
            )
        return str(given.resolve()), open_store(given.parent, given)
    own = open_store(output, None)
    if own.location.exists():
        return None, own
    published = data_set.store
    return (str(published.location.resolve()), published) if published.location.exists() else (None, None)


def _with_features(data_set: DataSet, split: str, store: FeatureStore | None) -> FilteredSplit:
    """Return the rows of a split that have a valid moment, and features of their video."""
    annotations: list[Annotation] = []
    dropped: dict[str, list[str]] = {}
    has_features: dict[str, bool] = {}
    cut_off = 0
    for row, annotation, problems in data_set.checked_rows(split):
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
    known, unknown = [], []
    for annotation in filtered.annotations:
        tokens = tokenize(annotation.sentence)
        if any(vocabulary is None or {token, token.lower()} & vocabulary.words.keys() for token in tokens):
            known.append(annotation)
        else:
            unknown.append(f"{annotation.line}: {excerpt(annotation.sentence)}")
    dropped = {**filtered.dropped, NO_WORD: unknown} if unknown else filtered.dropped
    return dataclasses.replace(filtered, annotations=known, dropped=dropped)


def _with_vectors(
    words: Mapping[str, int], splits: Mapping[str, FilteredSplit], glove: Path, width: int, *, grow: bool
) -> tuple[Mapping[str, int], dict[int, np.ndarray]]:
    """Return the word table and the vectors by word id.

    If `grow`, the words of other splits that have a vector are appended to the table.
    """
    all_words = word_table(a.sentence for filtered in splits.values() for a in filtered.annotations)
    new = [word for word in all_words if word not in words] if grow else []
    candidates = {**words, **{word: len(words) + index for index, word in enumerate(new, 1)}}
    vectors = glove_vectors(glove, candidates, width)
    appended = [word for word in new if candidates[word] in vectors]
    table = {**words, **{word: len(words) + index for index, word in enumerate(appended, 1)}}
    return table, {table[word]: vectors[candidates[word]] for word in table if candidates[word] in vectors}


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


def _description(
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
    videos = _videos(splits)
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
            print(f"  {filtered.cut_off} moments end after their video and are cut there")
        if filtered.dropped:
            print(f"  excluded: {_reasons(filtered.dropped)}")
    if vocabulary is not None:
        with_vector = "" if vectors is None else f", {len(vectors)} of them with a vector"
        print(f"vocabulary: {len(vocabulary)} words{with_vector}")


def _warn_of_shared_videos(splits: Mapping[str, FilteredSplit]) -> None:
    """Warn of splits that share videos with the training split, on which recall is too high."""
    by_split = {split: _videos({split: filtered}) for split, filtered in splits.items()}
    training = by_split.pop("train", set())
    for split, videos in by_split.items():
        if shared := sorted(training & videos):
            log.warning(
                "%d of the %d videos of the split %s are training videos too (%s%s). Recall on them is too high: put "
                "all queries of a video into one split.",
                *(len(shared), len(videos), split),
                *(", ".join(map(excerpt, shared[:NAMED])), ", …" if len(shared) > NAMED else ""),
                extra={"code": "test_videos_used"},
            )


def _reasons(dropped: Mapping[str, Sequence[str]]) -> str:
    """Return the number of excluded rows per reason, with the first few labels."""
    reasons = (
        f"{len(names)} because {reason} ({'; '.join(names[:NAMED])}{'; …' if len(names) > NAMED else ''})"
        for reason, names in dropped.items()
    )
    return ", ".join(reasons)


if __name__ == "__main__":
    command(prepare)
