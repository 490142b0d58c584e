"""Run a model on all queries of a split and compute the metrics."""

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
from runtime.core.pooling import Segments
from runtime.core.presence import Presence
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

MAX_NAMED_SENTENCES = 5
# Number of queries whose videos are in memory together.
CHUNK_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The detections for N queries, and the metrics.

    Attributes:
        detections: IoU threshold to (N, 6, 3) float32 start, end (fractions of the video) and score, best first; NaN in
            rows without a detection.
        truth: ground truth, (N, 2) or (N, W, 2) fractions of the video; see `DataSet.truths`.
    """

    detections: dict[float, np.ndarray]
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
    """Ground every annotation of a data set and compare the detections with the ground truth.

    Args:
        protocol: protocol of NMS and hit rule, `mmaction2` or `drn`; that of the model when None.
        batch_size: maximum number of queries in a batch; affects speed only.
        segments_of: returns the segments of a video by name, or their encoding; read from the data set when None.
        on_progress: called with the number of queries grounded since the last call.
        warn: whether to warn of unknown words. Sentences without a known word are not run and count as misses.

    Raises:
        QueryError: a sentence is too long, or has an unknown word that the vocabulary rejects.
        FeatureError: features are missing, or do not fit the model.
        ModelFileError: the output of the network is not finite.
    """
    decoding = grounder.manifest.decoding
    decoding = dataclasses.replace(decoding, protocol=protocol or decoding.protocol)
    thresholds = data_set.preset.iou_thresholds
    shape = (len(annotations), PUBLISHED_COUNT, 3)
    detections = {threshold: np.full(shape, np.nan, np.float32) for threshold in thresholds}
    askable = askable_rows(grounder.manifest.vocabulary, annotations, warn)
    requested = [annotations[row] for row in askable]
    for rows, heads in run_heads(grounder, data_set, requested, batch_size, segments_of, warn):
        try:
            proposals = score_proposals_with_fallback(heads, decoding)
        except ModelFileError as error:
            raise cause_of(error, grounder, data_set, [requested[row] for row in rows], segments_of) from error
        for threshold, result in nms_per_threshold(proposals, decoding, thresholds):
            detections[threshold][askable[rows]] = result
        on_progress(len(rows))
    truth = data_set.truths(annotations)
    return Evaluation(detections, truth, report(detections, truth, decoding.protocol))


def cause_of(
    error: ModelFileError,
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    segments_of: Callable[[str], Encoding] | None = None,
) -> GroundingError:
    """Return the error to raise for heads that are not finite; see `Grounder.cause_of` and `evaluate`."""
    read = segments_of or (lambda name: grounder.segments(data_set.video(name)))
    segments = {name: read(name) for name in {entry.video for entry in annotations}}
    queries = encode_queries(grounder, annotations)
    return grounder.cause_of(error, [(segments[entry.video], query) for entry, query in zip(annotations, queries)])


def used_fallback(detections: np.ndarray) -> np.ndarray:
    """Return which queries are answered by the fallback only, (N,) bool: the entire video with score 1.

    Args:
        detections: (N, K, 3) starts and ends (fractions of the video) and scores, best first.
    """
    return (detections[:, 0] == (0, 1, 1)).all(axis=1)


def predictions(
    evaluation: Evaluation,
    annotations: Sequence[Annotation],
    data_set: DataSet,
    top_k: int = 5,
    presence: Presence | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the predictions for each annotation in QVHighlights format, in their order.

    Args:
        top_k: maximum number of moments for each query, at most 6.
        presence: no-match threshold of the model, for `pred_exist_score`. Moments below it are predicted all the same.
    """
    detections = evaluation.detections[0.5]
    unlikely = used_fallback(detections) | np.isnan(detections[:, 0, 2])
    best_scores = np.where(unlikely, -np.inf, detections[:, 0, 2])
    for index, annotation in enumerate(annotations):
        moments = to_moments(detections[index, :top_k], data_set.durations[annotation.video])
        yield {
            "qid": annotation.name,
            "query": annotation.sentence,
            "vid": annotation.video,
            "pred_relevant_windows": [[moment.start, moment.end, moment.score] for moment in moments],
            **({"pred_exist_score": presence.exist_score(float(best_scores[index]))} if presence else {}),
        }


def batches_of(
    grounder: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield the batches of a split for a model that was not split; see `evaluate` for the arguments.

    All sentences are encoded before the first video is read. Each video is read once.

    Yields:
        (B,) int64 indices of the annotations of a batch, and the batch.
    """
    for chunk in chunks(grounder, data_set, annotations):
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
    """Run the network on every annotation; see `evaluate` for the arguments. A split model encodes each video once.

    Yields:
        (B,) int64 indices of the annotations of a batch, and their heads.
    """
    for chunk in chunks(grounder, data_set, annotations, segments_of, warn):
        yield from run_chunk(grounder, chunk, batch_size)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """C queries whose videos are in memory.

    Attributes:
        rows: (C,) int64 indices of the annotations.
        queries: word ids of each query, (L,) int32.
        segments: segments of the video of each query, or their encoding.
        names, durations: name, and duration in seconds, of the video of each query.
    """

    rows: np.ndarray
    queries: list[np.ndarray]
    segments: Sequence[Encoding]
    names: list[str]
    durations: list[float]


def run_chunk(grounder: Grounder, chunk: Chunk, batch_size: int = BATCH_SIZE) -> Iterator[tuple[np.ndarray, Heads]]:
    """Yield annotation indices and heads of the batches of a chunk, as `run_heads` does; each video is encoded once."""
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
    """Yield the queries in chunks sorted by video, so that each video is read once; see `evaluate`."""
    queries = encode_queries(grounder, annotations, warn)
    order = sorted(range(len(annotations)), key=lambda index: annotations[index].video)
    for start in range(0, len(order), CHUNK_SIZE):
        rows = order[start : start + CHUNK_SIZE]
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
    """Yield each IoU threshold of the metrics and the detections to evaluate at it.

    Args:
        proposals: candidates of B queries.
        iou_thresholds: IoU from which a moment counts as a hit, 0 to 1.

    Yields:
        The threshold, and (B, 6, 3) float32 starts and ends (fractions of the video) and scores, best first.
    """
    result = None
    for threshold in iou_thresholds:
        # Only the authors' protocol runs NMS with the threshold of the metric.
        if result is None or decoding.protocol == "drn":
            result = apply_nms(proposals, decoding, PUBLISHED_COUNT, threshold)
        yield threshold, result


def encode_queries(grounder: Grounder, annotations: Sequence[Annotation], warn: bool = True) -> list[np.ndarray]:
    """Return the word ids of every sentence, (L,) int32 each, with one warning for all unknown words.

    Raises:
        QueryError: a sentence is invalid; the message contains its line and video.
    """
    unknown_words: Counter[str] = Counter()
    queries = []
    for annotation in annotations:
        try:
            queries.append(grounder.encode_query(annotation.sentence, unknown_words, check_content=False))
        except QueryError as error:
            location = f"Sentence {annotation.line} of the annotations, of {annotation.video}"
            raise QueryError(f"{location}: {error}", code=error.code) from error
    if warn:
        grounder.manifest.vocabulary.tell(unknown_words)
    return queries


def askable_rows(vocabulary: Vocabulary, annotations: Sequence[Annotation], warn: bool = True) -> np.ndarray:
    """Return the indices of the sentences with at least one known word, (M,) int64, and warn of the others."""
    rows, skipped = [], []
    for row, annotation in enumerate(annotations):
        if vocabulary.knows_any(annotation.sentence):
            rows.append(row)
        else:
            skipped.append(f"{annotation.line} ({excerpt(annotation.sentence)})")
    if skipped and warn:
        others = len(skipped) - MAX_NAMED_SENTENCES
        log.warning(
            "%d of %d sentences are skipped, because the model knows none of their words: sentence %s%s.",
            len(skipped),
            len(annotations),
            "; ".join(skipped[:MAX_NAMED_SENTENCES]),
            f"; and {others} others" if others > 0 else "",
        )
    return np.array(rows, np.int64)
