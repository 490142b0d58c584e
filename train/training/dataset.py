"""Pool the features of all videos into a memory-mapped file, and collate training batches from it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.artifacts.manifest import Features
from runtime.core.batch import Batch, collate
from runtime.core.cli import report_written
from runtime.core.errors import AnnotationError, FeatureError, OutputError, QueryError
from runtime.core.io.array_files import load_array
from runtime.core.io.atomic_files import atomic_write
from runtime.core.pooling import Segments, max_over_rows, segment_rows
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import check_features, check_varies
from runtime.datasets.dataset import Annotation, DataSet

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class PooledFeatures:
    """The segments of V videos.

    Attributes:
        rows: video name to row.
        features: (V, T, D) memory map, in the dtype of the feature files.
        spans: (V, T, 2) float64, start and end as fractions of the video.
        key: hash of everything that the values depend on.
    """

    rows: dict[str, int]
    features: np.ndarray
    spans: np.ndarray
    key: str

    def segments(self, video: str) -> Segments:
        """Return the segments of a video: features (T, D) in the dtype of the files, and spans (T, 2) float64."""
        row = self.rows[video]
        return Segments(self.features[row], self.spans[row])


def pool(
    data_set: DataSet, videos: Sequence[str], num_segments: int, features: Features, cache: Path
) -> PooledFeatures:
    """Return the segments of `videos`, from the cache if it was written from the same files.

    The name of a cache file is a hash of everything that its content depends on: names, sizes, times and samples of the
    feature files, locations in an HDF5 file, frame counts, T, the clip timing and the pooling rule. The file ends with
    its SHA-256, which is checked here.

    Args:
        videos: distinct names of videos.

    Raises:
        FeatureError: a feature file is missing, cannot be used, or has another width.
        OutputError: the cache cannot be written.
    """
    store = data_set.store
    stamps = [store.stamp(video) for video in videos]
    num_frames = [data_set.frames(video) for video in videos]
    recipe = {
        "files": stamps,
        "num_frames": num_frames,
        "num_segments": num_segments,
        "features": dataclasses.asdict(features),
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = cache / f"pooled-{key}.npy"
    segments = [segment_rows(count, num_segments, features.pooling, features.clock) for count in num_frames]
    if _is_complete(path, (len(videos), num_segments, features.dim)):
        # The warning is given per run, but the file may come from another one.
        data_set.check_clips(videos, features.clock)
    else:
        try:
            _write(path, data_set, videos, segments, num_frames, num_segments, features)
        except OutputError as error:
            raise OutputError(
                f"{error} Pass another --cache than {cache} for the pooled features.", code=error.code
            ) from error
        report_written(path)
    mapped = load_array(path)
    spans = np.stack([spans for _, _, spans in segments])
    return PooledFeatures({video: row for row, video in enumerate(videos)}, mapped, spans, key)


def _is_complete(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a cache file exists and is undamaged."""
    if not path.is_file():
        return False
    # NumPy raises exceptions without a common base class for a damaged header.
    with contextlib.suppress(Exception):
        array = load_array(path)
        # Earlier versions wrote wrong values in another byte order.
        if array.shape == shape and array.dtype.isnative and _ends_with_digest(path):
            return True
    log.warning("%s is damaged and is written again.", path)
    return False


def _ends_with_digest(path: Path) -> bool:
    """Return whether the last 32 bytes of a file, after the array, are the SHA-256 of all others."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        left = path.stat().st_size - digest.digest_size
        while left > 0:
            block = stream.read(min(left, 1 << 20))
            if not block:
                return False
            digest.update(block)
            left -= len(block)
        return stream.read() == digest.digest()


def _write(
    path: Path,
    data_set: DataSet,
    videos: Sequence[str],
    segments: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    num_frames: Sequence[int],
    num_segments: int,
    features: Features,
) -> None:
    """Write the cache file: an npy array of all segments, and its SHA-256."""
    store, dim = data_set.store, features.dim
    dtype = store.load(videos[0]).dtype
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        # No memory map, because one that outgrows the disk kills the process instead of raising an error.
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (len(videos), num_segments, dim),
        }
        encoded_header = io.BytesIO()
        np.lib.format.write_array_header_2_0(encoded_header, header)
        stream.write(encoded_header.getvalue())
        digest = hashlib.sha256(encoded_header.getvalue())
        items = zip(videos, segments, num_frames, strict=True)
        progress = tqdm(items, "pooling features", len(videos), unit="video", leave=False, disable=None)
        for video, (first, last, _), frames in progress:
            clips = store.load(video)
            check_features(clips, video)
            source = f"{store.path(video)}, features of {video}"
            if clips.shape[1] != dim:
                raise FeatureError(
                    f"{source}: expected the width {dim} of the first video, got {clips.shape[1]}. Extract both "
                    "again with one extractor.",
                    code="feature_width_mismatch",
                )
            if clips.dtype != dtype:
                raise FeatureError(
                    f"{source}: expected {dtype} as for the first video, got {clips.dtype}. Store all features in "
                    "one type.",
                    code="feature_type_mismatch",
                )
            data_set.origin.check(video, len(clips), frames, features.clock)
            check_varies(clips, video)
            rows = np.ascontiguousarray(max_over_rows(clips, first, last)).tobytes()
            stream.write(rows)
            digest.update(rows)
        stream.write(digest.digest())


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
    """A batch of pairs of a query and a video.

    Attributes:
        inputs: B matching pairs, then mismatched ones.
        truth: (B, 2) float32 moments of the matching pairs, start and end as fractions of the video.
    """

    inputs: Batch
    truth: np.ndarray


class TrainingData:
    """Encoded queries of a split, and the segments of their videos.

    Args:
        data_set: source of the moments.
        annotations: the queries.
        pooled: segments of all their videos.
        vocabulary: encodes the sentences.
        blind: whether to replace the features by zeros, to measure the recall without visual input.
    """

    def __init__(
        self,
        data_set: DataSet,
        annotations: Sequence[Annotation],
        pooled: PooledFeatures,
        vocabulary: Vocabulary,
        blind: bool = False,
    ) -> None:
        self.annotations = annotations
        self.queries = encode(annotations, vocabulary)
        self.truth = data_set.spans(annotations).astype(np.float32)
        self.pooled = pooled
        self.video_rows = np.array([pooled.rows[annotation.video] for annotation in annotations], np.int64)
        self.blind = blind

    def __len__(self) -> int:
        return len(self.annotations)

    def segments(self, video: str) -> Segments:
        """Return the segments of a video, for training and validation; features (T, D) are zeros if `blind`."""
        segments = self.pooled.segments(video)
        return Segments(np.zeros_like(segments.features), segments.spans) if self.blind else segments

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of (N,) rows of `pooled.features`, (N, T, D) float32; zeros if `blind`."""
        features = self.pooled.features[rows]
        return np.zeros(features.shape, np.float32) if self.blind else features.astype(np.float32)

    def batch(self, indices: np.ndarray, mismatched: np.ndarray | None = None) -> TrainingBatch:
        """Return a batch: matching pairs, then mismatched ones; see `query_video_pairs` for the arguments."""
        queries, videos = query_video_pairs(indices, mismatched)
        segments = [self.segments(self.annotations[index].video) for index in videos]
        return TrainingBatch(collate([self.queries[index] for index in queries], segments), self.truth[indices])

    def epoch(self, batch_size: int, seed: Sequence[int], rank: int = 0, processes: int = 1) -> list[np.ndarray]:
        """Return the queries of every batch of one epoch of one process.

        The order depends on `seed` only. A step takes `batch_size` times `processes` queries. As published, the
        remaining queries of an epoch are dropped.

        Returns:
            (batch_size,) int64 indices for each batch.
        """
        order = np.random.default_rng(list(seed)).permutation(len(self))
        step = batch_size * processes
        starts = range(rank * batch_size, len(self) - step + rank * batch_size + 1, step)
        return [order[start : start + batch_size] for start in starts]

    def mismatched(
        self, epoch: Sequence[np.ndarray], count: int, seed: Sequence[int], rank: int = 0, processes: int = 1
    ) -> list[np.ndarray]:
        """Draw mismatched pairs for every batch of an epoch: a query of the batch, and the video of another query.

        The draw depends on `seed` only, and all processes together use the pairs that a single one would.

        Args:
            epoch: the batches, as `epoch` returns them.
            count: pairs per batch, spread evenly over its queries.

        Returns:
            For each batch (2, count) indices: of the query, and of a query of the other video.
        """
        steps = len(epoch)
        drawn = np.random.default_rng([*seed, 1]).random((steps, processes, count))[:, rank]
        by_video = np.argsort(self.video_rows, kind="stable")
        rows = self.video_rows[by_video]
        pairs = []
        for batch, draw in zip(epoch, drawn, strict=True):
            queries = batch[np.arange(count) * len(batch) // count]
            first, end = (np.searchsorted(rows, self.video_rows[queries], side) for side in ("left", "right"))
            # Skips the queries of the same video, which are adjacent.
            index = (draw * (len(rows) - (end - first))).astype(np.int64)
            pairs.append(np.stack((queries, by_video[np.where(index < first, index, index + end - first)])))
        return pairs


def query_video_pairs(indices: np.ndarray, mismatched: np.ndarray | None = None) -> np.ndarray:
    """Return the pairs of a batch as indices of queries.

    Args:
        indices: (B,) int indices of the queries of the matching pairs.
        mismatched: (2, M) int, for each mismatched pair the index of its query and of a query of the other video.

    Returns:
        (2, B + M) int: for each pair its query, and a query of its video; the B matching pairs first.
    """
    matching = np.stack((indices, indices))
    return matching if mismatched is None else np.concatenate((matching, mismatched), axis=1)


def encode(annotations: Sequence[Annotation], vocabulary: Vocabulary) -> list[np.ndarray]:
    """Return the word ids of every sentence, (L,) int32 each, and warn about unknown words.

    Raises:
        AnnotationError: a sentence has no known word.
    """
    unknown: Counter[str] = Counter()
    queries = []
    for annotation in annotations:
        try:
            queries.append(vocabulary.encode(annotation.sentence, unknown))
        except QueryError as error:
            source = f"Sentence {annotation.line} of the annotations, of {annotation.video}"
            raise AnnotationError(f"{source}, cannot be used: {error}", code=error.code) from error
    vocabulary.tell(unknown)
    return queries


def split_by_video(
    annotations: Sequence[Annotation], fraction: float, seed: int
) -> tuple[list[Annotation], list[Annotation]]:
    """Split annotations into those to train on and those to validate on, so that no video is in both.

    Args:
        annotations: annotations of the training split.
        fraction: fraction of the videos to validate on, 0 to 1; at least one video is used.
        seed: random seed of the choice of videos.

    Returns:
        The annotations to train on, and those to validate on.
    """
    videos = sorted({annotation.video for annotation in annotations})
    count = max(1, round(fraction * len(videos)))
    held_out = {videos[index] for index in np.random.default_rng([seed, 1]).permutation(len(videos))[:count]}
    retained = [annotation for annotation in annotations if annotation.video not in held_out]
    return retained, [annotation for annotation in annotations if annotation.video in held_out]


def windows_of(data_set: DataSet, annotations: Sequence[Annotation]) -> Windows:
    """Return how a model trained on these annotations splits videos that are longer than theirs."""
    durations = [data_set.durations[video] for video in sorted({annotation.video for annotation in annotations})]
    moments = [
        min(annotation.end, data_set.durations[annotation.video]) - annotation.start
        for annotation in annotations
        if annotation.end > annotation.start
    ]
    return Windows.of(durations, moments)
