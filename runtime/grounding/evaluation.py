"""Ask a model every question of a split, and score the answers."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from runtime.backends.network import Encoding
from runtime.core.batch import Batch, Heads, batches
from runtime.core.decoding import (
    PUBLISHED_COUNT,
    Decoding,
    Proposals,
    Protocol,
    apply_nms,
    score_proposals_with_fallback,
)
from runtime.core.errors import GroundingError, ModelFileError, QueryError, excerpt
from runtime.core.metrics import Report, report
from runtime.core.moments import to_moments
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import Segments
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

# Sentences that a warning names, of however many.
NAMED = 5
# Videos are read and pooled for this many queries at a time, which bounds memory whatever the split.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The answers to N queries and their score.

    Attributes:
        picks: for each IoU threshold (N, 6, 3) starts, ends (fractions of the video) and scores.
        truth: (N, 2) fractions of the video, or (N, W, 2); see `DataSet.truths`.
        report: the metrics.
    """

    picks: dict[float, np.ndarray]
    truth: np.ndarray
    report: Report


def evaluate(
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    *,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    segments_of: Callable[[str], Encoding] | None = None,
    on_progress: Callable[[int], Any] = lambda queries: None,
    warn: bool = True,
) -> Evaluation:
    """Answer every annotation of a data set and compare with its moment.

    Args:
        grounder: the model.
        data_set: where durations and features come from.
        annotations: the N queries.
        protocol: whose NMS and hit rule; the model's own when None.
        batch_size: queries that go through the network together. Changes nothing but speed.
        segments_of: pooled segments, or the model's encoding of them, by video name, for callers that have them.
        on_progress: called with the number of queries answered since the last call.
        warn: whether unknown words are named, and sentences of which no word is known. The latter get no answer and
            count as misses.
    """
    decoding = grounder.manifest.decoding
    decoding = dataclasses.replace(decoding, protocol=protocol or decoding.protocol)
    thresholds = data_set.preset.iou_thresholds
    # Without an answer to a query: a miss, as recall is measured over all queries.
    picks = {threshold: np.full((len(annotations), PUBLISHED_COUNT, 3), np.nan, np.float32) for threshold in thresholds}
    askable = askable_rows(grounder.manifest.vocabulary, annotations, warn)
    requested = [annotations[row] for row in askable]
    for rows, heads in run_heads(grounder, data_set, requested, batch_size, segments_of, warn):
        try:
            proposals = score_proposals_with_fallback(heads, decoding)
        except ModelFileError as error:
            raise cause_of(error, grounder, data_set, [requested[row] for row in rows], segments_of) from error
        for threshold, result in nms_per_threshold(proposals, decoding, thresholds):
            picks[threshold][askable[rows]] = result
        on_progress(len(rows))
    truth = data_set.truths(annotations)
    return Evaluation(picks, truth, report(picks, truth, decoding.protocol))


def cause_of(
    error: ModelFileError,
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    segments_of: Callable[[str], Encoding] | None = None,
) -> GroundingError:
    """Return the error to raise where the heads of these queries are not finite; see `Grounder.cause_of`."""
    read = segments_of or (lambda name: grounder.segments(data_set.video(name)))
    segments = {name: read(name) for name in {entry.video for entry in annotations}}
    queries = encode_queries(grounder, annotations)
    return grounder.cause_of(error, [(segments[entry.video], query) for entry, query in zip(annotations, queries)])


def used_fallback(picks: np.ndarray) -> np.ndarray:
    """Return which of (N, K, 3) answers are the whole video with score 1, for want of a likely location; (N,)."""
    return (picks[:, 0] == (0, 1, 1)).all(axis=1)


def predictions(
    evaluation: Evaluation, annotations: Sequence[Annotation], data_set: DataSet, top_k: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield every query's answer in the QVHighlights form, in the order of the annotations."""
    picks = evaluation.picks[0.5]
    for index, annotation in enumerate(annotations):
        moments = to_moments(picks[index, :top_k], data_set.durations[annotation.video])
        yield {
            "qid": annotation.name,
            "query": annotation.sentence,
            "vid": annotation.video,
            "pred_relevant_windows": [[moment.start, moment.end, moment.score] for moment in moments],
        }


def batches_of(
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int = BATCH_SIZE,
    segments_of: Callable[[str], Segments] | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield what the network is asked, each batch after the positions of its queries; arguments as for `evaluate`.

    Every sentence is read before any video; each video is read once, and few at a time.
    """
    for chunk in chunks(grounder, data_set, annotations, segments_of):
        for indices, batch in batches(chunk.queries, cast("Sequence[Segments]", chunk.segments), batch_size):
            yield chunk.rows[indices], batch


def run_heads(
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int = BATCH_SIZE,
    segments_of: Callable[[str], Encoding] | None = None,
    warn: bool = True,
) -> Iterator[tuple[np.ndarray, Heads]]:
    """Yield what the network answers; as `batches_of`. A model that was split encodes each video once."""
    for chunk in chunks(grounder, data_set, annotations, segments_of, warn):
        yield from run_chunk(grounder, chunk, batch_size)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A bounded number of queries whose videos have been read.

    Attributes:
        rows: (C,) their positions in the annotations.
        queries: C times (L,) word ids.
        segments: C times the segments of the video, or the model's encoding of them.
        names, durations: C times the video's name and its length in seconds.
    """

    rows: np.ndarray
    queries: list[np.ndarray]
    segments: Sequence[Encoding]
    names: list[str]
    durations: list[float]


def run_chunk(grounder: Grounder, chunk: Chunk, batch_size: int = BATCH_SIZE) -> Iterator[tuple[np.ndarray, Heads]]:
    """Yield the positions and heads of each batch of a chunk. A model that was split encodes each video once."""
    encoded: dict[str, Encoding] = {}
    for name, segments, duration in zip(chunk.names, chunk.segments, chunk.durations):
        if name not in encoded and isinstance(segments, Segments):
            encoded[name] = grounder.network.encode(segments, duration, name)
        elif name not in encoded:
            encoded[name] = segments
    for indices, heads in grounder.run(chunk.queries, [encoded[name] for name in chunk.names], batch_size):
        yield chunk.rows[indices], heads


def chunks(
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    segments_of: Callable[[str], Encoding] | None = None,
    warn: bool = True,
) -> Iterator[Chunk]:
    """Yield the queries of `annotations` a bounded number at a time, those of one video together: each is read once."""
    queries = encode_queries(grounder, annotations, warn)
    for rows in _by_video(annotations):
        names = [annotations[i].video for i in rows]
        if segments_of is None:
            known = {name: grounder.segments(data_set.video(name)) for name in set(names)}
            segments: list[Encoding] = [known[name] for name in names]
        else:
            segments = [segments_of(name) for name in names]
        durations = [data_set.durations[name] for name in names]
        yield Chunk(np.asarray(rows), [queries[i] for i in rows], segments, names, durations)


def nms_per_threshold(
    proposals: Proposals, decoding: Decoding, iou_thresholds: Sequence[float]
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield for each IoU threshold of the metrics the (B, 6, 3) picks to judge at it."""
    result = None
    for threshold in iou_thresholds:
        # Only the authors' protocol suppresses differently for each metric.
        if result is None or decoding.protocol == "drn":
            result = apply_nms(proposals, decoding, PUBLISHED_COUNT, threshold)
        yield threshold, result


def encode_queries(grounder: Grounder, annotations: Sequence[Annotation], warn: bool = True) -> list[np.ndarray]:
    """Return the word ids of every sentence; one warning, if any, names all the words that the model does not know.

    Raises:
        QueryError: a sentence cannot be asked; it is named by its place and its video.
    """
    unheard: Counter[str] = Counter()
    queries = []
    for annotation in annotations:
        try:
            queries.append(grounder.encode_query(annotation.sentence, unheard, check_content=False))
        except QueryError as error:
            location = f"Sentence {annotation.line} of the annotations, of {annotation.video}"
            raise QueryError(f"{location}: {error}", code=error.code) from error
    if warn:
        grounder.manifest.vocabulary.tell(unheard)
    return queries


def askable_rows(vocabulary: Vocabulary, annotations: Sequence[Annotation], warn: bool = True) -> np.ndarray:
    """Return the positions of the sentences of which a word is known, (M,) int64; a warning counts and names others."""
    rows, others = [], []
    for row, annotation in enumerate(annotations):
        if vocabulary.knows_any(annotation.sentence):
            rows.append(row)
        else:
            others.append(f"{annotation.line} ({excerpt(annotation.sentence)})")
    if others and warn:
        more = f"; and {len(others) - NAMED} others" if len(others) > NAMED else ""
        log.warning(
            "No word of %d of %d sentences is known, and they are not asked: sentence %s%s.",
            *(len(others), len(annotations), "; ".join(others[:NAMED]), more),
        )
    return np.array(rows, np.int64)


def _by_video(annotations: Sequence[Annotation]) -> Iterator[list[int]]:
    """Yield positions in chunks, the queries of one video next to each other, so that it is read once."""
    order = sorted(range(len(annotations)), key=lambda index: annotations[index].video)
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]
